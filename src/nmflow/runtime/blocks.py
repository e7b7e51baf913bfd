"""What is wrong with a weight, block by block: the one form in which `compress`, `verify` and files say it.

Shape suffixes: R rows, G blocks of a row, S stored entries of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nmflow.ops.reference import columns
from nmflow.pattern import Pattern

SHOWN = 3
"""Broken blocks that a message names; the rest is counted."""


@dataclass(frozen=True)
class BrokenBlock:
    """One block that breaks its pattern. `row` counts from the first row of the whole weight, `block` along it."""

    row: int
    block: int
    nonzeros: int
    reason: str
    """Why it is broken, with what is allowed: `3 non-zeros, 1 allowed`."""

    def __str__(self) -> str:
        return f"row {self.row}, block {self.block}: {self.reason}"


def too_full(counts_RG: Tensor, pattern: Pattern, first_row: int = 0) -> tuple[int, tuple[BrokenBlock, ...]]:
    """(how many, the first few) of the blocks whose count of non-zeros, [R, G], exceeds N."""
    broken_RG = counts_RG > pattern.n
    num_broken = int(broken_RG.count_nonzero())
    shown = _first(broken_RG) if num_broken else []
    return num_broken, tuple(
        BrokenBlock(
            first_row + row,
            block,
            int(counts_RG[row, block]),
            f"{int(counts_RG[row, block])} non-zeros, {pattern.n} allowed",
        )
        for row, block in shown
    )


def bad_offsets(
    offsets_RS: Tensor, values_RS: Tensor, axis: int, pattern: Pattern, first_row: int = 0
) -> tuple[int, tuple[BrokenBlock, ...]]:
    """(how many, the first few) of the blocks with an offset beyond their end or not above the one before it."""
    offsets = offsets_RS.to(torch.int64)
    block_S = torch.arange(offsets.shape[1], device=offsets.device) // pattern.n
    out_of_range = (offsets >= pattern.m) | (columns(offsets_RS, pattern.n, pattern.m) >= axis)
    unordered = torch.zeros_like(out_of_range)
    unordered[:, 1:] = (offsets.diff(dim=1) <= 0) & (block_S.diff() == 0)
    faulty = out_of_range | unordered
    if not bool(faulty.any()):
        return 0, ()
    num_blocks = -(-axis // pattern.m)
    faulty_RG = torch.zeros(offsets.shape[0], num_blocks, dtype=torch.bool, device=offsets.device)
    row_of, slot_of = faulty.nonzero(as_tuple=True)
    faulty_RG[row_of, block_S[slot_of]] = True
    shown = []
    for row, block in _first(faulty_RG):
        mine = slice(block * pattern.n, (block + 1) * pattern.n)
        found = offsets[row, mine].tolist()
        width = min(pattern.m, axis - block * pattern.m)
        reason = f"offsets {_short(found)} of a block of {width}; they must rise and lie below {width}"
        shown.append(BrokenBlock(first_row + row, block, int(values_RS[row, mine].count_nonzero()), reason))
    return int(faulty_RG.count_nonzero()), tuple(shown)


def finite_problems(name: str, weight: Tensor) -> list[str]:
    """One message where a weight holds NaN or inf, else none."""
    num_bad = weight.numel() - int(torch.isfinite(weight.detach()).count_nonzero())
    return [f"{name}: {num_bad} of its {weight.numel()} weights are NaN or inf"] if num_bad else []


def named(num_broken: int, shown: Sequence[BrokenBlock]) -> str:
    """The blocks in one phrase, `row 3, block 5: 2 non-zeros, 1 allowed; and 7 more blocks`."""
    rest = num_broken - len(shown)
    more = [f"and {rest} more block{'s' if rest > 1 else ''}"] if rest else []
    return "; ".join([*map(str, shown), *more])


def _first(broken_RG: Tensor) -> list[tuple[int, int]]:
    return [(int(row), int(block)) for row, block in broken_RG.nonzero()[:SHOWN].tolist()]


def _short(numbers: Sequence[int]) -> str:
    text = ", ".join(map(str, numbers[:4]))
    return f"[{text}, ...]" if len(numbers) > 4 else f"[{text}]"
