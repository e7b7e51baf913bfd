"""What `nmflow reproduce` knows: the paper's tables and our own, and which study fills each at which scale."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import resources
from typing import Any, Literal

import yaml

from nmflow.experiments.cells import Setup, setup
from nmflow.experiments.paper import PaperTable, paper_tables
from nmflow.experiments.studies import SCALES

Kind = Literal["flops", "cells", "glue", "noise", "training-flops", "inference-flops", "curves", "speed"]
"""How it comes about: counted, trained cell by cell or task by task, drawn from such runs, measured on a clock."""


@dataclass(frozen=True)
class Table:
    """One table to reproduce, by rows and columns."""

    name: str
    kind: Kind
    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    studies: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """The studies that fill it, by scale and, of GLUE, by task."""
    paper: PaperTable | None = None
    words: str = ""
    """What every cell says besides its row and column."""

    def setups(self) -> dict[tuple[str, str], Setup]:
        """(row, column) -> what that cell trains; columns that name a task of GLUE say nothing of it."""
        says_more = "overall" not in self.columns
        return {
            (row, column): setup(f"{row} {column if says_more else ''} {self.words}")
            for row in self.rows
            for column in self.columns
        }


@functools.cache
def catalogue() -> dict[str, Table]:
    """Every table, by name, the paper's first."""
    text = resources.files(__package__).joinpath("catalogue.yaml").read_text(encoding="utf-8")
    return {name: _table(name, entry) for name, entry in yaml.safe_load(text).items()}


def find_table(name: str) -> Table:
    """One table. Raises `ValueError` with the nearest names where there is none of that name."""
    tables = catalogue()
    if name not in tables:
        near = get_close_matches(name, tables, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f'no table "{name}"{hint} (nmflow reproduce --list shows all)')
    return tables[name]


def _table(name: str, entry: Mapping[str, Any]) -> Table:
    paper = paper_tables().get(name)
    studies = {}
    for scale in SCALES:
        if scale in entry:
            studies[scale] = entry[scale] if isinstance(entry[scale], dict) else {name: entry[scale]}
    if paper is not None:
        entry = {**entry, "title": paper.title, "rows": paper.rows, "columns": paper.columns}
    title, rows, columns = entry["title"], tuple(entry["rows"]), tuple(entry["columns"])
    return Table(name, entry["kind"], title, rows, columns, studies, paper, entry.get("words", ""))
