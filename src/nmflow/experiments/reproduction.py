"""`nmflow reproduce`: a table of the paper beside our own runs, done where they are missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nmflow.experiments.catalogue import Table, catalogue, find_table
from nmflow.experiments.cells import Setup, setup
from nmflow.experiments.paper import half_unit
from nmflow.experiments.studies import Run, StudyFolder, studies
from nmflow.report.columns import columns
from nmflow.report.plots import plot_compare
from nmflow.report.side_by_side import Entry, SideBySide
from nmflow.report.tables import markdown
from nmflow.runtime.atomic import replacing
from nmflow.train.files import write_json, write_text


@dataclass(frozen=True)
class Place:
    """Where runs lie and data are found, at one scale."""

    scale: str
    out: Path
    """Runs in `out/scale/runs/STUDY`, tables in `out/scale/TABLE`."""
    data: Path

    def study(self, name: str) -> StudyFolder:
        """The runs of a study here."""
        return StudyFolder(studies(self.scale)[name], self.out / self.scale / "runs" / name, self.data)

    def table(self, name: str) -> Path:
        """The folder of a table here."""
        return self.out / self.scale / name


@dataclass(frozen=True)
class Reproduction:
    """One table at one scale: which runs it wants, and what they say."""

    table: Table
    place: Place

    @property
    def is_counted(self) -> bool:
        """True where the table needs no run."""
        return self.table.kind == "flops"

    @property
    def why_not(self) -> str | None:
        """Why the table cannot be done at this scale, where it cannot."""
        if self.is_counted or self.place.scale in self.table.studies:
            return None
        return f"nothing fills {self.table.name} at the scale {self.place.scale} yet"

    def state(self) -> str:
        """`exact`, `12 of 45 runs`, or why there is nothing."""
        if self.why_not:
            return "to come"
        if self.is_counted:
            return "counted"
        done, every = self.count()
        return f"{done} of {every} runs"

    def open_runs(self) -> Sequence[Run]:
        """Runs that can be begun now."""
        return self._study().open_runs(self._setups())

    def count(self) -> tuple[int, int]:
        """(done, all) runs."""
        return self._study().count(self._setups())

    def result(self) -> Counted | SideBySide:
        """The table as it can be told now."""
        return Counted.of(self.table) if self.is_counted else self.side_by_side()

    def write(self, result: Counted | SideBySide) -> Path:
        """Write table.md, table.json and a plot into the table's folder; returns it."""
        folder = self.place.table(self.table.name)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "table.md", "\n".join(result.lines()) + "\n")
        write_json(folder / "table.json", {"name": self.table.name, **result.to_dict()})
        if isinstance(result, SideBySide) and any(cell.n for cell in result.cells):
            with replacing(folder / "plot.png") as partial:
                plot_compare(result.cells, partial)
        return folder

    def side_by_side(self) -> SideBySide:
        """The table from what the runs' folders hold."""
        study, places = self._study(), self.table.setups()
        results = dict(zip(places, study.results(list(places.values())), strict=True))
        paper = self.table.paper
        note = [paper.note] if paper is not None and paper.note else []
        entries = tuple(
            Entry(row, column, cell, None if paper is None else paper.value(row, column))
            for (row, column), cell in results.items()
        )
        return SideBySide(
            f"{self.table.name}: {self.table.title}",
            entries,
            dense=study.results([setup("dense")])[0],
            paper_dense=None if paper is None else paper.dense,
            paper_measure=None if paper is None else paper.measure,
            differs=(f"here: {study.study.title}; {study.study.differs}", *note),
        )

    def _study(self) -> StudyFolder:
        return self.place.study(self.table.studies[self.place.scale])

    def _setups(self) -> list[Setup]:
        return [setup("dense"), *self.table.setups().values()]


@dataclass(frozen=True)
class Counted:
    """A table of the paper that is counted, value by value."""

    table: Table
    values: dict[str, tuple[float, ...]]

    @classmethod
    def of(cls, table: Table) -> Counted:
        """Count it."""
        from nmflow.experiments.flops_tables import flops_table

        return cls(table, flops_table(table.name))

    def misses(self) -> list[str]:
        """Values that are further than 0.5 % and further than one unit of the last printed digit from the paper's."""
        assert self.table.paper is not None
        found = []
        for row, printed in self.table.paper.rows.items():
            for column, text, value in zip(self.table.columns, printed, self.values[row], strict=True):
                if abs(value - float(text)) > max(2 * half_unit(text), 0.005 * float(text)):
                    found.append(f"{row}, {column}: printed {text}, counted {value:.4f}")
        return found

    def lines(self) -> list[str]:
        """For people: printed and counted side by side, and the verdict."""
        assert self.table.paper is not None
        rows = [["", *self.table.columns]]
        for row, printed in self.table.paper.rows.items():
            pairs = zip(printed, self.values[row], strict=True)
            rows.append([row, *(f"{text} / {value:.{len(text.partition('.')[2]) + 1}f}" for text, value in pairs)])
        misses = self.misses()
        count = sum(map(len, self.table.paper.rows.values()))
        verdict = f"all {count} values agree to one unit of the last printed digit or 0.5 %"
        title = f"{self.table.name}: {self.table.title}"
        note = [self.table.paper.note] if self.table.paper.note else []
        return [title, "", *markdown(rows), "", "printed / counted", *(misses or [verdict]), *note]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        assert self.table.paper is not None
        return {
            "format": 1,
            "title": self.table.title,
            "cells": [
                {"row": row, "column": column, "paper": text, "counted": value}
                for row, printed in self.table.paper.rows.items()
                for column, text, value in zip(self.table.columns, printed, self.values[row], strict=True)
            ],
            "misses": self.misses(),
        }


@dataclass(frozen=True)
class Several:
    """Several tables as one sweep: a run that two of them want is done once."""

    parts: tuple[Reproduction, ...]

    def open_runs(self) -> Sequence[Run]:
        """Runs that can be begun now, table by table."""
        return list({run.folder.path: run for part in self.parts for run in part.open_runs()}.values())

    def count(self) -> tuple[int, int]:
        """(done, all) runs, those of two tables in both."""
        counts = [part.count() for part in self.parts]
        return sum(done for done, _ in counts), sum(every for _, every in counts)


def reproductions(names: Sequence[str], place: Place) -> list[Reproduction]:
    """The tables of these names at a place, all that there are for `all`. Raises `ValueError` for unknown names."""
    tables = list(catalogue().values()) if "all" in names else [find_table(name) for name in dict.fromkeys(names)]
    return [Reproduction(table, place) for table in tables]


def state_lines(parts: Sequence[Reproduction]) -> list[str]:
    """Tables with their states, for people."""
    return columns([(part.table.name, part.state(), part.table.title) for part in parts])
