"""The step W -> W~ of a convolution where its weight lies and by way of copied rows: prints a table.

One thread, float32, median of the rounds; the sides take turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from nmflow import Pattern
from nmflow.layout import to_rows, write_back
from nmflow.ops import project

SHAPES = [(64, 64, 3, 3), (256, 256, 3, 3), (512, 512, 3, 3), (64, 64, 7, 7)]
ROUNDS = 31


def in_place(weight: Tensor, mask: Tensor, effective: Tensor, pattern: Pattern) -> None:
    """As the sparsifier does it."""
    project(weight.flatten(2), pattern, 0.0, "partial", mask.flatten(2), effective.flatten(2))


def by_copies(weight: Tensor, mask: Tensor, effective: Tensor, pattern: Pattern) -> None:
    """By rows [R, K], which are copies, and back."""
    w_RK, mask_RK, effective_RK = (to_rows(tensor, "conv") for tensor in (weight, mask, effective))
    project(w_RK, pattern, 0.0, "partial", mask_RK, effective_RK)
    write_back(mask_RK, mask, "conv")
    write_back(effective_RK, effective, "conv")


def seconds(step: Callable[..., object], *arguments: object) -> float:
    """Of one call."""
    start = time.perf_counter()
    step(*arguments)
    return time.perf_counter() - start


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}\n")
    print("| weight | pattern | by copies, ms | in place, ms | times | copying W alone, ms |")
    print("|---|---|---|---|---|---|")
    for shape in SHAPES:
        weight = torch.randn(shape)
        mask, effective = torch.zeros(shape, dtype=torch.bool), torch.empty(shape)
        for text in ("2:4", "1:16"):
            sides = (weight, mask, effective, Pattern.parse(text))
            rounds = [
                (seconds(by_copies, *sides), seconds(in_place, *sides), seconds(effective.copy_, weight))
                for _ in range(ROUNDS)
            ]
            copied, ours, moved = (1e3 * median(side) for side in zip(*rounds, strict=True))
            times = median(one / other for one, other, _ in rounds)
            print(f"| {shape} | {text} | {copied:.2f} | {ours:.2f} | {times:.1f} | {moved:.2f} |")
