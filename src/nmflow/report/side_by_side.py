"""The paper's numbers and ours in one table, and whether recipes come in the same order."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from nmflow.report.measures import MEASURES
from nmflow.report.plots import plot_table
from nmflow.report.tables import Cell, cell_to_json, markdown

ERRORS = 2.0
"""Standard errors of a difference below which two cells are not told apart."""


@dataclass(frozen=True)
class Entry:
    """One place of a table: what the paper prints there, if it does, and what our runs came to."""

    row: str
    column: str
    cell: Cell
    paper: str | None = None


@dataclass(frozen=True)
class Order:
    """Pairs of recipes in one row of the paper that our runs order alike, otherwise, not clearly, or not yet."""

    same: int = 0
    other: int = 0
    unclear: int = 0
    missing: int = 0

    def text(self) -> str:
        """In words."""
        told = self.same + self.other
        found = f"{self.same} of the {told} pairs that the runs tell apart" if told else "no pair is told apart"
        parts = [f"order as in the paper: {found}", f"{self.unclear} lie within {ERRORS:g} standard errors"]
        return "; ".join([*parts, *([f"{self.missing} missing"] if self.missing else [])])


@dataclass(frozen=True)
class SideBySide:
    """A table of the paper or of our own, its rows by its columns."""

    title: str
    entries: tuple[Entry, ...]
    dense: Cell | None = None
    paper_dense: str | None = None
    paper_measure: str | None = None
    differs: tuple[str, ...] = ()
    """What is not the paper's, a line each."""

    @property
    def cells(self) -> list[Cell]:
        """What our runs came to, the dense ones first."""
        return [*([self.dense] if self.dense else []), *(entry.cell for entry in self.entries)]

    @property
    def measure(self) -> str:
        """The name of what our runs are judged by."""
        return next((cell.measure for cell in self.cells if cell.n), self.cells[0].measure)

    def order(self) -> Order:
        """How many pairs of a row come in the paper's order.

            told apart:  |a - b| > 2·√(sd_a²/n_a + sd_b²/n_b)

        with a spread, so at least two runs, in both cells. Pairs that the paper gives the same value are left out.
        """
        found = {"same": 0, "other": 0, "unclear": 0, "missing": 0}
        for a, b in self._pairs():
            if a.paper is None or b.paper is None or float(a.paper) == float(b.paper):
                continue
            ahead = difference(a.cell, b.cell)
            if ahead is None:
                found["missing"] += 1
            elif ahead == 0:
                found["unclear"] += 1
            else:
                found["same" if (ahead > 0) == (float(a.paper) > float(b.paper)) else "other"] += 1
        return Order(**found)

    def best(self) -> dict[str, list[str]]:
        """Row -> the column with the best mean, then those that the runs do not tell from it; no row without a run."""
        found: dict[str, list[str]] = {}
        for row in dict.fromkeys(entry.row for entry in self.entries):
            done = [entry for entry in self.entries if entry.row == row and entry.cell.mean is not None]
            if done:
                first = max(done, key=lambda entry: _upwards(entry.cell))
                close = [each.column for each in done if each is not first and not difference(first.cell, each.cell)]
                found[row] = [first.column, *close]
        return found

    def _pairs(self) -> Iterator[tuple[Entry, Entry]]:
        for row in dict.fromkeys(entry.row for entry in self.entries):
            yield from combinations([entry for entry in self.entries if entry.row == row], 2)

    def lines(self) -> list[str]:
        """For people: the table, the order, what differs, what is missing."""
        measure = MEASURES[self.measure]
        columns = list(dict.fromkeys(entry.column for entry in self.entries))
        rows = list(dict.fromkeys(entry.row for entry in self.entries))
        by_place = {(entry.row, entry.column): entry for entry in self.entries}
        has_paper = any(entry.paper for entry in self.entries)
        table = [["", *columns]]
        for row in rows:
            cells = [by_place.get((row, column)) for column in columns]
            table.append([row, *("" if each is None else _text(each.paper, each.cell, has_paper) for each in cells)])
        paper = f"paper: {self.paper_measure}; " if self.paper_measure and has_paper else ""
        direction = "" if measure.higher_is_better else ", lower is better"
        legend = f"{paper}ours: test {measure.head}{direction}, mean ± sample standard deviation over seeds"
        lines = [self.title, "", *markdown(table), ""]
        if self.dense is not None:
            lines.append(f"dense: {_text(self.paper_dense, self.dense, has_paper)}")
        lines.append(legend)
        if has_paper:
            lines.append(self.order().text())
        for row, (first, *close) in self.best().items():
            lines.append(f"best at {row}: {first}" + (f", not told from {', '.join(close)}" if close else ""))
        return [*lines, *self.differs]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        order = self.order()
        return {
            "format": 1,
            "title": self.title,
            "measure": self.measure,
            "sd": "sample standard deviation over seeds, n - 1 in the denominator",
            "paper_measure": self.paper_measure,
            "dense": {"paper": self.paper_dense, "ours": None if self.dense is None else cell_to_json(self.dense)},
            "cells": [
                {"row": each.row, "column": each.column, "paper": each.paper, "ours": cell_to_json(each.cell)}
                for each in self.entries
            ],
            "order": {
                "same": order.same, "other": order.other, "unclear": order.unclear, "missing": order.missing,
                "standard_errors": ERRORS,
            },
            "best": self.best(),
            "differs": list(self.differs),
        }  # fmt: skip

    def draw(self, path: Path) -> bool:
        """Draw the cells that are done; False where none is."""
        if not any(cell.n for cell in self.cells):
            return False
        plot_table([(each.row, each.column, each.cell) for each in self.entries], self.dense, path)
        return True


def difference(a: Cell, b: Cell) -> int | None:
    """1 where `a` is better than `b`, -1 where it is worse, 0 where the runs do not tell; None where one is missing."""
    if a.mean is None or b.mean is None:
        return None
    if a.sd is None or b.sd is None:
        return 0
    error = math.sqrt(a.sd**2 / a.n + b.sd**2 / b.n)
    gap = _upwards(a) - _upwards(b)
    return 0 if abs(gap) <= ERRORS * error else 1 if gap > 0 else -1


def _text(paper: str | None, cell: Cell, has_paper: bool) -> str:
    """`77.325 / 48.31 ± 0.41`: the paper's and ours."""
    ours = cell.text() + (f" (n {cell.n})" if cell.n and cell.missing else "")
    return f"{paper or '-'} / {ours}" if has_paper else ours


def _upwards(cell: Cell) -> float:
    """The mean, so that higher is better."""
    return (cell.mean or 0.0) * (1 if MEASURES[cell.measure].higher_is_better else -1)
