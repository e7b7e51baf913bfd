"""The paper's tables of speed beside this machine's: measured row by row, read where they have been measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nmflow.bench.cells import OURS
from nmflow.bench.settings import KernelSettings, ModelSettings
from nmflow.experiments.catalogue import Table
from nmflow.experiments.cells import setup
from nmflow.report.folder import read_json
from nmflow.report.tables import markdown
from nmflow.train.files import write_json
from nmflow.train.run import slug

HERE = "here"
"""The column of this machine."""
NETWORK = "timm:vit_large_patch16_224"
SHAPES = ((4096, 1024), (1024, 4096))
"""The two products of ViT-Large's FF, at 196 tokens: the patches of an image."""
TOKENS = 196
REFERENCE = "2:4"
"""What table 19 compares the other patterns with."""


@dataclass(frozen=True)
class Timed:
    """One table of speed, and the files of what was measured, one a row or one for all."""

    table: Table
    folder: Path

    @property
    def files(self) -> dict[str, Path]:
        """By row; rows of one measurement share its file."""
        whole = self.table.name == "table-19"
        return {row: self.folder / ("kernels.json" if whole else f"{slug(row)}.json") for row in self.table.rows}

    def count(self) -> tuple[int, int]:
        """(measured, all) rows."""
        files = self.files.values()
        return sum(file.exists() for file in files), len(files)

    def measure(self, tell: Callable[[str], None]) -> None:
        """Measure what is missing, each written as soon as it is known. Raises as `bench_model`, `bench_kernels` do."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for row, file in self.files.items():
            if not file.exists():
                tell(f"{self.table.name}: {row}")
                write_json(file, self._measured(row, tell))

    def _measured(self, row: str, tell: Callable[[str], None]) -> dict[str, Any]:
        if self.table.name == "table-19":
            from nmflow.bench.kernels import bench_kernels

            patterns = (REFERENCE, *(_pattern(row) for row in self.table.rows))
            return bench_kernels(
                KernelSettings(parts=("linear",), patterns=patterns, shapes=SHAPES, tokens=(TOKENS,)), tell
            ).to_dict()
        from nmflow.bench.model import bench_model

        return bench_model(NETWORK, ModelSettings(targets=dict(setup(f"ste {row}").targets)), tell).to_dict()

    def result(self) -> Timings:
        """The table from what has been measured."""
        found = {row: read_json(file) for row, file in self.files.items() if file.exists()}
        if self.table.name == "table-19":
            values = {row: _over_reference(measured, _pattern(row)) for row, measured in found.items()}
            what = f"the FF products of ViT-Large, {TOKENS} tokens, float32, times the two products together"
        else:
            values = {row: float(measured["speed_up"]) for row, measured in found.items()}
            what = "one image, float32, eager, the replaced layers and all others, median over interleaved rounds"
        machines = dict.fromkeys(_machine(measured["setup"]["machine"]) for measured in found.values())
        return Timings(self.table, values, (what, *machines))


@dataclass(frozen=True)
class Timings:
    """Speeds, the paper's and ours."""

    table: Table
    values: Mapping[str, float]
    """Ours, by row."""
    differs: tuple[str, ...]

    def lines(self) -> list[str]:
        """For people."""
        assert self.table.paper is not None
        rows = [["", *self.table.columns, HERE]]
        for row, printed in self.table.paper.rows.items():
            rows.append([row, *printed, f"{self.values[row]:.2f}" if row in self.values else "missing"])
        title = f"{self.table.name}: {self.table.title}"
        said = [self.table.paper.measure or "", *(f"here: {each}" for each in self.differs)]
        return [title, "", *markdown(rows), "", *said]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        assert self.table.paper is not None
        return {
            "format": 1,
            "title": self.table.title,
            "measure": self.table.paper.measure,
            "rows": [
                {"row": row, "paper": dict(zip(self.table.columns, printed, strict=True)), "ours": self.values.get(row)}
                for row, printed in self.table.paper.rows.items()
            ],
            "differs": list(self.differs),
        }

    def draw(self, path: Path) -> bool:
        """A table says it."""
        return False


def _pattern(row: str) -> str:
    return row.partition("=")[2]


def _over_reference(measured: Mapping[str, Any], pattern: str) -> float:
    """How many times as fast as 2:4, over the products' times together."""
    return _time(measured["cells"], REFERENCE) / _time(measured["cells"], pattern)


def _time(cells: Iterable[Mapping[str, Any]], pattern: str) -> float:
    return sum(float(cell["us"][OURS]) for cell in cells if cell["pattern"] == pattern)


def _machine(machine: Mapping[str, Any]) -> str:
    return f"{machine['cpu']}, {machine['threads']} threads, {machine['isa']}, torch {machine['torch']}"
