"""The step W -> W~ natively and by other ways: prints a table for convolutions, and one for rows that share columns.

One thread, median of the rounds; the sides take turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from statistics import median

import torch
from torch import Tensor

from nmflow import Pattern
from nmflow.layout import to_rows, write_back
from nmflow.ops import project
from nmflow.ops.projection import project as project_in_torch

ROUNDS = 31
Step = Callable[[Tensor, Tensor, Tensor, Pattern], object]


def as_rows(weight: Tensor, mask: Tensor, effective: Tensor, pattern: Pattern) -> None:
    """As the sparsifier does it with [R, K]."""
    project(weight, pattern, 0.5, "partial", mask, effective)


def in_torch(weight: Tensor, mask: Tensor, effective: Tensor, pattern: Pattern) -> None:
    """In plain torch."""
    project_in_torch(weight, pattern, 0.5, "partial", mask, effective)


def each_for_itself(weight: Tensor, mask: Tensor, effective: Tensor, pattern: Pattern) -> None:
    """The same N:M with V = 1."""
    as_rows(weight, mask, effective, replace(pattern, v=1))


def in_place(weight: Tensor, mask: Tensor, effective: Tensor, pattern: Pattern) -> None:
    """A convolution as the sparsifier does it."""
    project(weight.flatten(2), pattern, 0.0, "partial", mask.flatten(2), effective.flatten(2))


def by_copies(weight: Tensor, mask: Tensor, effective: Tensor, pattern: Pattern) -> None:
    """A convolution by rows [R, K], which are copies, and back."""
    w_RK, mask_RK, effective_RK = (to_rows(tensor, "conv") for tensor in (weight, mask, effective))
    project(w_RK, pattern, 0.0, "partial", mask_RK, effective_RK)
    write_back(mask_RK, mask, "conv")
    write_back(effective_RK, effective, "conv")


def copying(weight: Tensor, mask: Tensor, effective: Tensor, pattern: Pattern) -> None:
    """W alone."""
    effective.copy_(weight)


def row(shape: tuple[int, ...], dtype: torch.dtype, text: str, other: Step, ours: Step, beside: Step) -> str:
    """One line of a table: milliseconds of three sides, and how many times as fast the second is as the first."""
    weight = torch.randn(shape).to(dtype)
    sides = (weight, torch.zeros(shape, dtype=torch.bool), torch.empty_like(weight), Pattern.parse(text))
    rounds = []
    for _ in range(ROUNDS):
        clock = [time.perf_counter()]
        for step in (other, ours, beside):
            step(*sides)
            clock.append(time.perf_counter())
        rounds.append([1e3 * (end - start) for start, end in pairwise(clock)])
    slow, fast, third = (median(side) for side in zip(*rounds, strict=True))
    times = median(one / two for one, two, _ in rounds)
    what = f"{'x'.join(map(str, shape))} | {str(dtype).removeprefix('torch.')} | {text}"
    return f"| {what} | {slow:.2f} | {fast:.2f} | {times:.1f} | {third:.2f} |"


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}\n")
    print("| convolution | dtype | pattern | by copies, ms | in place, ms | times | copying W alone, ms |")
    print("|---|---|---|---|---|---|---|")
    for shape in [(64, 64, 3, 3), (256, 256, 3, 3), (512, 512, 3, 3), (64, 64, 7, 7)]:
        for text in ("2:4", "1:16"):
            print(row(shape, torch.float32, text, by_copies, in_place, copying))
    print("\n| weight | dtype | pattern | plain torch, ms | native, ms | times | with V = 1, ms |")
    print("|---|---|---|---|---|---|---|")
    for shape in [(3072, 768), (768, 3072), (4096, 4096)]:
        for dtype in (torch.float32, torch.bfloat16):
            for text in ("1:8v8", "1:8v64", "2:4v4"):
                print(row(shape, dtype, text, in_torch, as_rows, each_for_itself))
