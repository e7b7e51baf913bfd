"""Runs small enough for a test: digits, one narrow layer, a dozen steps."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nmflow.report.folder import RunFolder
from nmflow.train.config import TrainConfig
from nmflow.train.data import Data, Inputs, Split, load_data
from nmflow.train.progress import Display
from nmflow.train.single import run_single

MODEL: dict[str, Any] = {"name": "vit-tiny", "width": 32, "depth": 1, "heads": 2, "patch": 4, "mlp_ratio": 2.0}
SETTINGS: dict[str, Any] = {
    "model": MODEL,
    "pattern": "1:8",
    "steps": 12,
    "batch": 16,
    "optim": {"lr": 0.01},
    "log_every": 2,
    "eval_every": 4,
    "checkpoint_every": 5,
    "baseline": False,
}
GENTLE = {"lr": 0.01, "eps": 1e-3}
"""An optimizer for runs that are compared: with a small eps AdamW makes large steps of rounding errors."""
SOURCE = Path(__file__).parents[2] / "src"


def small(**changes: Any) -> TrainConfig:
    """The settings of a small run, some of them changed."""
    settings = {**SETTINGS, **changes}
    if "targets" in changes:
        del settings["pattern"]
    return TrainConfig(**settings)


def one_run(config: TrainConfig, folder: Path, data: Data | None = None) -> RunFolder:
    """A run without baseline, plot and page in `folder`, from wherever it is."""
    run_single(config, RunFolder(folder), data or load_data(config.data), Display(None), "nmflow ...", "test")
    return RunFolder(folder)


def weights(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file."""
    return load_file(path)


def assert_same_bits(one: Path, two: Path) -> None:
    """Two safetensors files hold the same tensors."""
    a, b = weights(one), weights(two)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def assert_same_run(one: Path, two: Path) -> None:
    """Weights, optimizer and log of two folders are the same."""
    assert_same_bits(one / "checkpoint.safetensors", two / "checkpoint.safetensors")
    assert_same_end(one, two)


def assert_same_end(one: Path, two: Path) -> None:
    """Final weights and log of two folders are the same."""
    for name in ("model.safetensors", "compressed.safetensors"):
        assert_same_bits(one / name, two / name)
    assert (one / "metrics.jsonl").read_bytes() == (two / "metrics.jsonl").read_bytes()
    assert not list(two.glob(".*"))


class PowerCutError(Exception):
    """The end of a process, as far as a test in one process can have it."""


@dataclass(frozen=True)
class FailsAt:
    """A split that dies when it is asked for its `call`-th batch."""

    split: Split
    call: int
    calls: list[int]
    die: Callable[[], None]

    def __len__(self) -> int:
        return len(self.split)

    def batch(self, indices: Tensor, generator: torch.Generator | None = None) -> tuple[Inputs, Tensor]:
        self.calls.append(0)
        if len(self.calls) == self.call:
            self.die()
        return self.split.batch(indices, generator)


def power_cut() -> None:
    raise PowerCutError


def failing(data: Data, call: int, die: Callable[[], None] = power_cut) -> Data:
    return replace(data, train=FailsAt(data.train, call, [], die))


def assert_goes_on(config: TrainConfig, folder: Path, died: Iterable[int]) -> None:
    """A run that dies when it asks for these batches, each in its turn, ends as `folder/whole`, which never did."""
    one_run(config, folder / "whole")
    for call in died:
        with pytest.raises(PowerCutError):
            one_run(config, folder / "cut", failing(load_data(config.data), call))
        assert not (folder / "cut" / "result.json").exists()
    one_run(config, folder / "cut")
    assert_same_run(folder / "whole", folder / "cut")


def start(*arguments: str, threads: int = 1) -> subprocess.Popen[str]:
    """A Python process that finds this package; `python -m nmflow ...` is `start("-m", "nmflow", ...)`."""
    settings = {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": str(threads), "ACCELERATE_USE_CPU": "true"}
    environment = {**os.environ, **settings}
    return subprocess.Popen(
        [sys.executable, *arguments], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
