"""What `nmflow bench kernels` answers: the cells, the table of the worst shapes, and what falls short."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nmflow.bench.cells import CONV, CONV_LAST, Cell, ConvCell, MaskCell
from nmflow.bench.goals import disturbed, short, verdicts, worst
from nmflow.bench.machine import Setup

FORMAT = "nmflow-bench-kernels"
VERSION = 2


@dataclass(frozen=True)
class KernelResult:
    """Every cell, and where it was measured."""

    setup: Setup
    rounds: int
    cells: tuple[Cell, ...]
    convolutions: tuple[ConvCell, ...]
    masks: tuple[MaskCell, ...]

    @property
    def disturbed(self) -> int:
        """Rounds of all cells that were kept although the process lost a core in them."""
        return sum(cell.disturbed for cells in (self.cells, self.convolutions, self.masks) for cell in cells)

    def summary(self) -> list[str]:
        """For people, after the cells: a table a part (products: worst shape / goal), then what falls short."""
        lines = []
        for title, head, rows in self._tables():
            widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
            lines += ["", title]
            lines += ["  ".join(text.rjust(w) for text, w in zip(row, widths, strict=True)) for row in [head, *rows]]
        return [*lines, "", *disturbed(self.disturbed), *short(verdicts(self.cells, self.masks))]

    def markdown(self) -> str:
        """The same as a page, with every cell below."""
        parts = ["# Kernels", "", *(f"- {line}" for line in self.setup.lines()), f"- {self.rounds} rounds a cell", ""]
        for title, head, rows in self._tables():
            parts += [f"## {title[0].upper()}{title[1:]}", "", *markdown_table(head, rows), ""]
        if self.masks:
            parts += ["## Masks", "", "```", *(cell.line() for cell in self.masks), "```", ""]
        parts += ["## Goals", "", *_indented(short(verdicts(self.cells, self.masks))), ""]
        parts += [*disturbed(self.disturbed), ""]
        if self.cells:
            parts += ["## Every cell", "", "```", *(cell.line() for cell in self.cells), "```", ""]
        return "\n".join(parts)

    def _tables(self) -> list[Table]:
        return [*_tables(self.cells), *_conv_tables(self.convolutions)]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "setup": self.setup.to_dict(),
            "rounds": self.rounds,
            "cells": [cell.to_dict() for cell in self.cells],
            "convolutions": [cell.to_dict() for cell in self.convolutions],
            "masks": [cell.to_dict() for cell in self.masks],
            "short": [verdict.line() for verdict in verdicts(self.cells, self.masks) if verdict.reached is False],
        }

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> KernelResult:
        """The inverse of `to_dict`. Raises `ValueError` on anything else."""
        if (found.get("format"), found.get("version")) != (FORMAT, VERSION):
            raise ValueError(f"these are no results of nmflow bench kernels, version {VERSION}")
        return cls(
            Setup.from_dict(found["setup"]),
            found["rounds"],
            tuple(Cell.from_dict(cell) for cell in found["cells"]),
            tuple(ConvCell.from_dict(cell) for cell in found["convolutions"]),
            tuple(MaskCell.from_dict(cell) for cell in found["masks"]),
        )


Table = tuple[str, list[str], list[list[str]]]
"""Title, head, rows."""


def _tables(cells: tuple[Cell, ...]) -> list[Table]:
    """One of every part and dtype: a row a pattern, a column a number of tokens."""
    tables = []
    low = worst(cells)
    for part, dtype in dict.fromkeys((cell.part, cell.dtype) for cell in low):
        mine = [cell for cell in low if (cell.part, cell.dtype) == (part, dtype)]
        by_place = {(cell.pattern, cell.tokens): cell for cell in mine}
        counts = sorted({cell.tokens for cell in mine})
        layers = f", {mine[0].layers} layers in turn" if mine[0].layers > 1 else ""
        rows = [
            [pattern, *(_beside_goal(by_place[pattern, n]) if (pattern, n) in by_place else "-" for n in counts)]
            for pattern in dict.fromkeys(cell.pattern for cell in mine)
        ]
        head = ["pattern", *(f"{n} token{'s' * (n > 1)}" for n in counts)]
        tables.append((f"{part}, {dtype}{layers}: times F.linear, worst shape / goal (! below)", head, rows))
    return tables


def _conv_tables(cells: tuple[ConvCell, ...]) -> list[Table]:
    """One of every dtype: a row a layer, a column a pattern; what the layer does not choose is in brackets."""
    tables = []
    for dtype in dict.fromkeys(cell.dtype for cell in cells):
        mine = {(cell.name, cell.pattern): cell for cell in cells if cell.dtype == dtype}
        patterns = list(dict.fromkeys(pattern for _, pattern in mine))
        rows = [
            [name, *(_over_convolution(mine[name, pattern]) for pattern in patterns)]
            for name in dict.fromkeys(name for name, _ in mine)
        ]
        title = f"conv, {dtype}: the product, times the faster of {CONV} in both orders; ( ) where that is taken"
        tables.append((title, ["layer", *patterns], rows))
    return tables


def _over_convolution(cell: ConvCell) -> str:
    times = f"{min(cell.over[CONV], cell.over[CONV_LAST]):.2f}"
    return times if cell.product else f"({times})"


def _beside_goal(cell: Cell) -> str:
    if cell.goal is None:
        return f"{cell.over_dense:.2f}"
    return f"{cell.over_dense:.2f} / {cell.goal:g}{'' if cell.over_dense >= cell.goal else ' !'}"


def markdown_table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a table of Markdown."""
    ruler = ["---:"] * len(head)
    return [f"| {' | '.join(row)} |" for row in [head, ruler, *rows]]


def _indented(lines: list[str]) -> list[str]:
    """Lines as a list below their first one."""
    return [lines[0], *([""] if len(lines) > 1 else []), *(f"- {line.strip()}" for line in lines[1:])]
