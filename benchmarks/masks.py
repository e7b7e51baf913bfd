"""What the step W -> (mask, W~) costs: native against argsort-and-scatter, plain torch and a copy of the weight.

    python benchmarks/masks.py                                   the whole table, float32
    python benchmarks/masks.py --patterns 2:4 1:8 --shapes 4096x4096 --dtype bfloat16 --decay 0.5 --json masks.json

Every round times all sides once, one after the other, so that a burst of other work on the machine touches all of
them; a ratio is the median of the rounds' ratios. The goals stand for two threads and float32. With one thread the
clock is that thread's processor time, which other work on the machine disturbs least.

The argsort is SR-STE's: not stable, so it may differ from the mask wanted here where magnitudes are equal.
A copy reads W and writes as much; the native pass writes the mask besides (and reads it, for the count of flips).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from nmflow.ops import native_library
from nmflow.ops.native_project import project_native
from nmflow.ops.projection import project
from nmflow.pattern import Pattern

SHAPES = ("768x3072", "4096x4096")
PATTERNS = ("2:4", "1:8", "1:32", "1:128", "4:16", "16:128", "1:16", "3:4", "7:8", "15:16", "8:16", "4:8", "64:128")
GOAL_OVER_ARGSORT = 20.0
GOAL_OF_COPY = {("2:4", "4096x4096"): 0.8, ("1:8", "4096x4096"): 0.8}


@dataclass(frozen=True)
class Cell:
    """One measurement: medians in nanoseconds an entry, ratios of the rounds' pairs."""

    shape: str
    pattern: str
    dtype: str
    decay: float
    native_ns: float
    native_best_ns: float
    argsort_ns: float
    torch_ns: float
    copy_ns: float
    over_argsort: float
    over_torch: float
    of_copy: float
    """Time of the copy over time of the native pass: 1 is copy speed."""
    goal_of_copy: float | None


def argsort_and_scatter(w_RK: Tensor, pattern: Pattern, decay: float) -> Tensor:
    """W~ as SR-STE's code computes it: sort every block, scatter zeros into a mask of ones, multiply."""
    blocks = w_RK.detach().abs().reshape(-1, pattern.m)
    dropped = torch.argsort(blocks, dim=1)[:, : pattern.m - pattern.n]
    mask = torch.ones(blocks.shape, dtype=w_RK.dtype).scatter_(1, dropped, decay).reshape(w_RK.shape)
    return w_RK * mask


def in_turn(runs: list[Callable[[], object]], seconds: float) -> list[list[float]]:
    """Times of every run, one after the other, at least seven rounds and until `seconds` have passed."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    for run in runs:
        run()
    times: list[list[float]] = [[] for _ in runs]
    stop = time.perf_counter() + seconds
    while len(times[0]) < 7 or time.perf_counter() < stop:
        for found, run in zip(times, runs, strict=True):
            start = clock()
            run()
            found.append(clock() - start)
    return times


def measure(shape: str, pattern: str, dtype: torch.dtype, decay: float, isa: str, seconds: float) -> Cell:
    rows, axis = (int(size) for size in shape.split("x"))
    form = Pattern.parse(pattern)
    w = torch.randn(rows, axis).to(dtype)
    mask, effective, copy = torch.zeros(w.shape, dtype=torch.bool), torch.empty_like(w), torch.empty_like(w)
    sides: list[Callable[[], object]] = [
        lambda: project_native(w, form, decay, "error", mask, effective, isa=isa),
        lambda: copy.copy_(w),
    ]
    slow: list[Callable[[], object]] = [
        sides[0],
        lambda: argsort_and_scatter(w, form, decay),
        lambda: project(w, form, decay, "error", mask, effective),
    ]
    own, other = in_turn(sides, seconds), in_turn(slow, seconds)

    def ratio(times: list[list[float]], side: int) -> float:
        return statistics.median(b / a for a, b in zip(times[0], times[side], strict=True))

    def nanoseconds(times: list[float]) -> float:
        return statistics.median(times) / w.numel() * 1e9

    return Cell(
        shape=shape,
        pattern=pattern,
        dtype=str(dtype).removeprefix("torch."),
        decay=decay,
        native_ns=nanoseconds(own[0]),
        native_best_ns=min(own[0]) / w.numel() * 1e9,
        argsort_ns=nanoseconds(other[1]),
        torch_ns=nanoseconds(other[2]),
        copy_ns=nanoseconds(own[1]),
        over_argsort=ratio(other, 1),
        over_torch=ratio(other, 2),
        of_copy=ratio(own, 1),
        goal_of_copy=GOAL_OF_COPY.get((pattern, shape)),
    )


def line(cell: Cell) -> str:
    reached = cell.over_argsort >= GOAL_OVER_ARGSORT and cell.of_copy >= (cell.goal_of_copy or 0)
    goals = f"goal x{GOAL_OVER_ARGSORT:g}" + (f", {cell.goal_of_copy:.0%} of copy" if cell.goal_of_copy else "")
    return (
        f"{cell.shape:>10} {cell.pattern:>7}  {cell.native_ns:7.3f} ns (best {cell.native_best_ns:.3f})  "
        f"argsort {cell.argsort_ns:7.2f} ns x{cell.over_argsort:6.1f}  torch x{cell.over_torch:6.1f}  "
        f"copy {cell.copy_ns:.3f} ns {cell.of_copy:5.0%}  {goals} {'yes' if reached else 'NO'}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--patterns", nargs="+", default=list(PATTERNS))
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--decay", type=float, default=0.0)
    parser.add_argument("--isa", choices=["auto", *native_library.ISAS], default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.0, help="at least so long for each of a cell's two groups")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    setup = {
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "library": native_library.describe(),
        "isa": given.isa,
        "threads": given.threads,
        "load": os.getloadavg()[0],
    }
    print(", ".join(f"{name} {value}" for name, value in setup.items()))
    cells = []
    for shape in given.shapes:
        for pattern in given.patterns:
            dtype = getattr(torch, given.dtype)
            cells.append(measure(shape, pattern, dtype, given.decay, given.isa, given.seconds))
            print(line(cells[-1]), flush=True)
    if given.json:
        given.json.write_text(json.dumps({"setup": setup, "cells": [asdict(cell) for cell in cells]}, indent=1))


if __name__ == "__main__":
    main()
