"""The paper's tables of speed beside this machine's: measured row by row, read where they have been measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nmflow.bench.cells import DENSE, OURS
from nmflow.bench.gpu.cells import CSR
from nmflow.bench.gpu.cells import EAGER as EAGER_NETWORK
from nmflow.bench.gpu.cells import NETWORK as COMPILED_NETWORK
from nmflow.bench.settings import GpuSettings, KernelSettings, ModelSettings
from nmflow.experiments.catalogue import Table
from nmflow.experiments.cells import setup
from nmflow.report.folder import read_json
from nmflow.report.tables import markdown
from nmflow.train.files import write_json
from nmflow.train.run import slug

NETWORK = "timm:vit_large_patch16_224"
SHAPES = ((4096, 1024), (1024, 4096))
"""The two products of ViT-Large's FF, at 196 tokens: the patches of an image."""
TOKENS = 196
REFERENCE = "2:4"
"""What table 19 compares the other patterns with."""


Values = Mapping[str, Mapping[str, float]]
"""Speeds by column of ours and row."""

_CANNOT = {
    "table-8": "the paper does not say with what dense product, batch or precision: 3.56 and 3.26 are more than the "
    "2.82 that FF-only sparsity can give by FLOPs, so its dense network was slower than its FLOPs",
    "table-19": "the paper's figures are of CuPy's CSR product over itself at 2:4, not over a dense product",
}
"""What the paper's tables of speed can and cannot have measured."""


@dataclass(frozen=True)
class Timed:
    """One table of speed at one scale, and the files of what was measured: one a row or one for all."""

    table: Table
    folder: Path
    scale: str = "cpu"

    @property
    def files(self) -> dict[str, Path]:
        """By row; rows of one measurement share its file."""
        if self.scale == "gpu":
            return dict.fromkeys(self.table.rows, self.folder / "gpu.json")
        whole = self.table.name == "table-19"
        return {row: self.folder / ("kernels.json" if whole else f"{slug(row)}.json") for row in self.table.rows}

    def count(self) -> tuple[int, int]:
        """(measured, all) rows."""
        files = self.files.values()
        return sum(file.exists() for file in files), len(files)

    def measure(self, tell: Callable[[str], None]) -> None:
        """Measure what is missing, each written as soon as it is known.

        Raises as `bench_model` and `bench_kernels` do, on a GPU `ValueError` where there is none.
        """
        for row, file in self.files.items():
            if not file.exists():
                measured = self._measured(row, tell)
                self.folder.mkdir(parents=True, exist_ok=True)
                write_json(file, measured)

    def _measured(self, row: str, tell: Callable[[str], None]) -> dict[str, Any]:
        tell(f"{self.table.name}: {row if self.scale == 'cpu' else 'every row'}")
        if self.scale == "gpu":
            return _on_gpu(self.table.name, tell)
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
        cannot = _CANNOT[self.table.name]
        if self.scale == "gpu":
            measured = next(iter(found.values()), None)
            if measured is None:
                return Timings(self.table, {"here": {}}, (cannot,))
            values, what = _products_on_gpu(measured) if self.table.name == "table-19" else _networks_on_gpu(measured)
            setup = measured["setup"]
            device = f"{setup['device']}, torch {setup['torch']}, CUDA {setup['cuda']}, Triton {setup['triton']}"
            return Timings(self.table, values, (what, device, cannot))
        if self.table.name == "table-19":
            speeds = {row: _over_reference(measured, _pattern(row)) for row, measured in found.items()}
            what = f"the FF products of ViT-Large, {TOKENS} tokens, float32, times the two products together"
        else:
            speeds = {row: float(measured["speed_up"]) for row, measured in found.items()}
            what = "one image, float32, eager, the replaced layers and all others, median over interleaved rounds"
        machines = dict.fromkeys(_machine(measured["setup"]["machine"]) for measured in found.values())
        return Timings(self.table, {"here": speeds}, (what, *machines, cannot))


@dataclass(frozen=True)
class Timings:
    """Speeds, the paper's and ours."""

    table: Table
    values: Values
    differs: tuple[str, ...]

    def lines(self) -> list[str]:
        """For people."""
        assert self.table.paper is not None
        rows = [["", *self.table.columns, *self.values]]
        for row, printed in self.table.paper.rows.items():
            ours = [f"{mine[row]:.2f}" if row in mine else "missing" for mine in self.values.values()]
            rows.append([row, *printed, *ours])
        title = f"{self.table.name}: {self.table.title}"
        said = [self.table.paper.measure or "", *(f"here: {each}" for each in self.differs)]
        return [title, "", *markdown(rows), "", *said]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        assert self.table.paper is not None
        return {
            "format": 2,
            "title": self.table.title,
            "measure": self.table.paper.measure,
            "rows": [
                {
                    "row": row,
                    "paper": dict(zip(self.table.columns, printed, strict=True)),
                    "ours": {name: mine.get(row) for name, mine in self.values.items()},
                }
                for row, printed in self.table.paper.rows.items()
            ],
            "differs": list(self.differs),
        }

    def draw(self, path: Path) -> bool:
        """A table says it."""
        return False


def _on_gpu(name: str, tell: Callable[[str], None]) -> dict[str, Any]:
    from nmflow.bench.gpu.run import bench_gpu

    part = "float32" if name == "table-19" else "network"
    result = bench_gpu(GpuSettings(parts=(part,), minutes=60), tell)
    if result.setup.device is None:
        raise ValueError(f"{name}: there is no CUDA device to measure; --scale cpu measures this machine")
    return result.to_dict()


def _products_on_gpu(measured: Mapping[str, Any]) -> tuple[Values, str]:
    """The two products together; CSR over itself, as the paper has it, then both beside torch's dense product."""
    us = {pattern: _summed(measured["cells"], pattern) for pattern in {_cell_pattern(c) for c in measured["cells"]}}
    csr = us.get(REFERENCE, {}).get(CSR)
    values: dict[str, dict[str, float]] = {"CSR over CSR at 2:4": {}, "CSR over dense": {}, "nmflow over dense": {}}
    for pattern, times in us.items():
        dense, row = times.get(DENSE), f"ff={pattern}"
        if CSR in times and csr is not None:
            values["CSR over CSR at 2:4"][row] = csr / times[CSR]
        if CSR in times and dense is not None:
            values["CSR over dense"][row] = dense / times[CSR]
        if OURS in times and dense is not None:
            values["nmflow over dense"][row] = dense / times[OURS]
    return values, "the FF products of ViT-Large, 1,568 tokens, float32 without TF32, in CUDA graphs, both together"


def _networks_on_gpu(measured: Mapping[str, Any]) -> tuple[Values, str]:
    values: dict[str, dict[str, float]] = {"over dense, compiled": {}, "over dense, eager": {}}
    for cell in measured["cells"]:
        us = cell["us"]
        if us:
            row = f"ff={_cell_pattern(cell)}"
            values["over dense, compiled"][row] = us[COMPILED_NETWORK] / us[OURS]
            values["over dense, eager"][row] = us[EAGER_NETWORK] / us[OURS]
    what = "32 images, bfloat16, compiled and in a CUDA graph; the dense network likewise, and eager"
    return values, what


def _cell_pattern(cell: Mapping[str, Any]) -> str:
    return str(cell["place"]["pattern"])


def _summed(cells: Iterable[Mapping[str, Any]], pattern: str) -> dict[str, float]:
    """Microseconds by contender that was measured at every shape, its shapes together."""
    times = [cell["us"] for cell in cells if _cell_pattern(cell) == pattern]
    shared = set(times[0]).intersection(*times[1:])
    return {name: sum(each[name] for each in times) for name in shared}


def _pattern(row: str) -> str:
    return row.partition("=")[2]


def _over_reference(measured: Mapping[str, Any], pattern: str) -> float:
    """How many times as fast as 2:4, over the products' times together."""
    return _time(measured["cells"], REFERENCE) / _time(measured["cells"], pattern)


def _time(cells: Iterable[Mapping[str, Any]], pattern: str) -> float:
    return sum(float(cell["us"][OURS]) for cell in cells if cell["pattern"] == pattern)


def _machine(machine: Mapping[str, Any]) -> str:
    return f"{machine['cpu']}, {machine['threads']} threads, {machine['isa']}, torch {machine['torch']}"
