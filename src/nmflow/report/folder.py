"""What lies in a run folder: the names of its files, and how they are read. Nothing here needs torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast


@dataclass(frozen=True)
class RunFolder:
    """The files of one run; a baseline is a run of its own in `dense`.

    >>> RunFolder(Path("runs/a")).dense.metrics.as_posix()
    'runs/a/dense/metrics.jsonl'
    """

    path: Path

    @property
    def config(self) -> Path:
        """Every setting, as `load_config` reads it."""
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        """Versions, threads, git commit."""
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a line: training every `log_every` steps, validation every `eval_every`."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoint(self) -> Path:
        """Everything that a run needs to go on (`nmflow.train.checkpoint`)."""
        return self.path / "checkpoint.safetensors"

    @property
    def shards(self) -> Path:
        """The same of a run that is spread over processes: this file names the folder beside it that they wrote."""
        return self.path / "checkpoint" / "checkpoint.json"

    @property
    def model(self) -> Path:
        """The finalized model in dense layout."""
        return self.path / "model.safetensors"

    @property
    def targets(self) -> Path:
        """Which weights are N:M."""
        return self.path / "targets.json"

    @property
    def compressed(self) -> Path:
        """The finalized model, compressed."""
        return self.path / "compressed.safetensors"

    @property
    def translations(self) -> Path:
        """What the finalized model makes of the test split, a line a sentence; of translation alone."""
        return self.path / "translations.txt"

    @property
    def result(self) -> Path:
        """Every figure of the run. Its presence says that the run is done."""
        return self.path / "result.json"

    @property
    def plot(self) -> Path:
        """D(j), density, loss and main measure over the steps."""
        return self.path / "training.png"

    @property
    def page(self) -> Path:
        """The report."""
        return self.path / "report.html"

    @property
    def dense(self) -> RunFolder:
        """The baseline's own folder."""
        return RunFolder(self.path / "dense")


@dataclass(frozen=True)
class CompareFolder:
    """The files of a comparison: one run folder a cell, and what follows from them."""

    path: Path

    @property
    def config(self) -> Path:
        """Every setting, as `load_compare_config` reads it."""
        return self.path / "config.yaml"

    @property
    def runs(self) -> Path:
        """The folder of the run folders."""
        return self.path / "runs"

    @property
    def table(self) -> Path:
        """The table as data."""
        return self.path / "table.json"

    @property
    def text(self) -> Path:
        """The table for people."""
        return self.path / "table.md"

    @property
    def plot(self) -> Path:
        """The main measure by pattern, recipe and seed."""
        return self.path / "compare.png"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises `FileNotFoundError`, and `ValueError` naming the file where it is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: no JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return cast("dict[str, Any]", value)


def read_result(folder: Path) -> dict[str, Any] | None:
    """Every figure of the run in a folder, None where it is not done."""
    file = RunFolder(folder).result
    return read_json(file) if file.exists() else None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics log, none where there is no file; a last line that is still being written is left out.

    Raises `ValueError` naming file and line where one is no JSON object.
    """
    return list(_lines(path)) if path.exists() else []


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for number, text in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            line = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: no JSON: {error}") from error
        if not isinstance(line, dict):
            raise ValueError(f"{path}, line {number}: expected a JSON object")
        yield line
