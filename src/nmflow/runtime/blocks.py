"""What is wrong with a weight, block by block: the one form in which `compress`, `verify` and files say it.

Shape suffixes: R rows, H groups of V rows that share their columns (each row, where V is 1), G blocks of a row, S
stored entries of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nmflow.groups import joined, num_groups
from nmflow.masks import block_counts
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
    """Non-zeros of one row; of rows that share their columns, columns that are not zero in all of them."""
    reason: str
    """Why it is broken, with what is allowed: `3 non-zeros, 1 allowed`."""
    rows: int = 1
    """How many rows, from `row` on, have the block in common."""

    def __str__(self) -> str:
        which = f"row {self.row}" if self.rows == 1 else f"rows {self.row}-{self.row + self.rows - 1}"
        return f"{which}, block {self.block}: {self.reason}"


def too_full(rows_RK: Tensor, pattern: Pattern, first_row: int = 0) -> tuple[int, tuple[BrokenBlock, ...]]:
    """(how many, the first few) of the blocks of these rows that hold more non-zeros than N."""
    counts_HG = block_counts(rows_RK, pattern)
    broken_HG = counts_HG > pattern.n
    num_broken = int(broken_HG.count_nonzero())
    shown = _first(broken_HG) if num_broken else []
    return num_broken, tuple(
        too_full_block(group, block, int(counts_HG[group, block]), pattern, rows_RK.shape[0], first_row)
        for group, block in shown
    )


def too_full_block(
    group: int, block: int, count: int, pattern: Pattern, num_rows: int, first_row: int = 0
) -> BrokenBlock:
    """What is said of a block with `count` non-zeros; groups are counted within `num_rows` rows from `first_row` on."""
    what = "non-zeros" if pattern.v == 1 else "non-zero columns"
    reason = f"{count} {what}, {pattern.n} allowed"
    row = group * pattern.v
    return BrokenBlock(first_row + row, block, count, reason, min(pattern.v, num_rows - row))


def bad_offsets(
    offsets_HS: Tensor, values_RS: Tensor, axis: int, pattern: Pattern, first_row: int = 0
) -> tuple[int, tuple[BrokenBlock, ...]]:
    """(how many, the first few) of the blocks with an offset beyond their end or not above the one before it."""
    offsets = offsets_HS.to(torch.int64)
    block_S = torch.arange(offsets.shape[1], device=offsets.device) // pattern.n
    out_of_range = (offsets >= pattern.m) | (columns(offsets_HS, pattern.n, pattern.m) >= axis)
    unordered = torch.zeros_like(out_of_range)
    unordered[:, 1:] = (offsets.diff(dim=1) <= 0) & (block_S.diff() == 0)
    faulty = out_of_range | unordered
    if not bool(faulty.any()):
        return 0, ()
    num_blocks = -(-axis // pattern.m)
    faulty_HG = torch.zeros(offsets.shape[0], num_blocks, dtype=torch.bool, device=offsets.device)
    group_of, slot_of = faulty.nonzero(as_tuple=True)
    faulty_HG[group_of, block_S[slot_of]] = True
    shown = []
    for group, block in _first(faulty_HG):
        mine = slice(block * pattern.n, (block + 1) * pattern.n)
        found = offsets[group, mine].tolist()
        width = min(pattern.m, axis - block * pattern.m)
        reason = f"offsets {_short(found)} of a block of {width}; they must rise and lie below {width}"
        values = values_RS[group * pattern.v : (group + 1) * pattern.v, mine]
        nonzeros = int(joined(values != 0, values.shape[0]).count_nonzero())
        shown.append(BrokenBlock(first_row + group * pattern.v, block, nonzeros, reason, values.shape[0]))
    return int(faulty_HG.count_nonzero()), tuple(shown)


def num_blocks_of(num_rows: int, axis: int, pattern: Pattern) -> int:
    """Blocks of V x M entries that these rows have, shorter last ones included."""
    return num_groups(num_rows, pattern.v) * -(-axis // pattern.m)


def finite_problems(name: str, weight: Tensor) -> list[str]:
    """One message where a weight holds NaN or inf, else none."""
    num_bad = weight.numel() - int(torch.isfinite(weight.detach()).count_nonzero())
    return [f"{name}: {num_bad} of its {weight.numel()} weights are NaN or inf"] if num_bad else []


def named(num_broken: int, shown: Sequence[BrokenBlock]) -> str:
    """The blocks in one phrase, `row 3, block 5: 2 non-zeros, 1 allowed; and 7 more blocks`."""
    rest = num_broken - len(shown)
    more = [f"and {rest} more block{'s' if rest > 1 else ''}"] if rest else []
    return "; ".join([*map(str, shown), *more])


def _first(broken_HG: Tensor) -> list[tuple[int, int]]:
    return [(int(group), int(block)) for group, block in broken_HG.nonzero()[:SHOWN].tolist()]


def _short(numbers: Sequence[int]) -> str:
    text = ", ".join(map(str, numbers[:4]))
    return f"[{text}, ...]" if len(numbers) > 4 else f"[{text}]"
