"""How an N:M weight is stored: the kept values of every block and where in the block they lie.

Shape suffixes: R rows, K entries of the reduction axis, G blocks of a row, H groups of V rows that share their columns
(each row, where V is 1), S stored entries of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nmflow.groups import joined, num_groups, spread
from nmflow.layout import Layout, from_rows, rows_shape, to_rows
from nmflow.masks import rows_mask
from nmflow.ops.reference import expand
from nmflow.pattern import Pattern
from nmflow.runtime.blocks import bad_offsets, named, too_full

LARGEST_M = 65_536
"""Blocks of more entries have offsets that 16 bits do not hold."""


@dataclass(frozen=True, eq=False)
class CompressedNM:
    """A weight of pattern N:M as its kept values and their offsets within the blocks.

        W[r, m·⌊s / n⌋ + offsets[⌊r / v⌋, s]] = values[r, s],    0 elsewhere,    s = 0 … S - 1,    S = pattern.kept(K)

    W is seen as rows [R, K] (`nmflow.layout`). Block g owns the slots g·n … (g+1)·n - 1; a last block of r < m
    entries owns the last min(n, r). Offsets strictly rise within a block. A block with fewer than n non-zeros is
    filled up with zeros at its lowest unused positions, so that equal weights have equal forms.

    Rows h·v … (h+1)·v - 1, the last ones possibly fewer, share row h of the offsets. So their part of a product is a
    gather of S entries of x, and a dense product with their [v, S] values.
    """

    values: Tensor
    """[R, S], any floating dtype: the dtype of the weight."""
    offsets: Tensor
    """[H, S] uint8, or uint16 where m > 256; H = ⌈R / v⌉."""
    shape: tuple[int, ...]
    """Shape of the dense weight."""
    pattern: Pattern
    layout: Layout = "rows"

    @classmethod
    def pack(cls, weight: Tensor, pattern: Pattern | str, layout: Layout = "rows") -> CompressedNM:
        """Compress a dense weight that has the pattern; the bits of every non-zero are kept.

        Raises `ValueError` naming row and block where the weight breaks the pattern (NaN is not zero), and where m
        exceeds 65536; `TypeError` where the weight is not of a floating dtype.

        >>> packed = CompressedNM.pack(torch.tensor([[0.0, 5.0, 0.0, 0.0], [7.0, 0.0, 0.0, 0.0]]), "1:4")
        >>> packed.values.tolist(), packed.offsets.tolist(), packed.nbytes
        ([[5.0], [7.0]], [[1], [0]], 10)
        >>> CompressedNM.pack(torch.tensor([[0.0, 5.0, 3.0, 0.0]]), "1:4")
        Traceback (most recent call last):
        ValueError: the weight is not 1:4: row 0, block 0: 2 non-zeros, 1 allowed
        >>> packed = CompressedNM.pack(torch.tensor([[0.0, 5.0, 0.0, 0.0], [0.0, 7.0, 0.0, 0.0]]), "1:4v2")
        >>> packed.values.tolist(), packed.offsets.tolist()
        ([[5.0], [7.0]], [[1]])
        """
        pattern = Pattern.parse(pattern)
        if not weight.is_floating_point():
            raise TypeError(f"a weight of a floating dtype is compressed, not one of {weight.dtype}")
        offset_dtype = offset_dtype_of(pattern)
        rows_RK = to_rows(weight.detach(), layout)
        num_broken, shown = too_full(rows_RK, pattern)
        if num_broken:
            raise ValueError(f"the weight is not {pattern}: {named(num_broken, shown)}")
        # Non-zeros score 1, so the mask holds all of them and, where they are too few, the lowest zeros: exactly
        # S a row. Row-major order then yields ascending offsets.
        used_HK = joined(rows_RK != 0, pattern.v)
        stored_HK = rows_mask(used_HK.to(torch.float32), Pattern(pattern.n, pattern.m), "partial")
        stored = pattern.kept(rows_RK.shape[1])
        values = rows_RK[spread(stored_HK, pattern.v, rows_RK.shape[0])].reshape(rows_RK.shape[0], stored)
        position = stored_HK.nonzero()[:, 1].reshape(stored_HK.shape[0], stored)
        return cls(
            values.masked_fill(values == 0, 0),  # a filler is +0 wherever it came from
            (position % pattern.m).to(offset_dtype),
            tuple(weight.shape),
            pattern,
            layout,
        )

    def unpack(self) -> Tensor:
        """The dense weight: the bits of every stored number (a NaN stays some NaN), +0 elsewhere."""
        rows_RK = expand(self.values, self.offsets, self.axis, self.pattern.n, self.pattern.m, self.pattern.v)
        return weight_of(rows_RK, self.shape, self.layout)

    @property
    def axis(self) -> int:
        """Length K of the reduction axis."""
        return rows_shape(self.shape, self.layout)[1]

    @property
    def nbytes(self) -> int:
        """Bytes of values and offsets."""
        return self.values.nbytes + self.offsets.nbytes

    def check(self) -> list[str]:
        """What is inconsistent: sizes, dtypes, offsets (with rows and block). An empty list means sound.

        The pattern needs no check beyond this one: a block has no room for more than n values.
        """
        if self.pattern.m > LARGEST_M:
            return [_too_wide(self.pattern)]
        axis = self.axis
        sizes = stored_sizes(rows_shape(self.shape, self.layout), self.pattern)
        problems = []
        for what, tensor, size in zip(("values", "offsets"), (self.values, self.offsets), sizes, strict=True):
            if tuple(tensor.shape) != size:
                problems.append(
                    f"{what} have shape {tuple(tensor.shape)}; a weight of shape {self.shape} at {self.pattern} "
                    f"has {size}"
                )
        if not self.values.is_floating_point():
            problems.append(f"values have dtype {self.values.dtype}, which is not a floating one")
        if self.offsets.dtype != offset_dtype_of(self.pattern):
            problems.append(f"offsets have dtype {self.offsets.dtype}, not {offset_dtype_of(self.pattern)}")
        if problems:
            return problems
        num_broken, shown = bad_offsets(self.offsets, self.values, axis, self.pattern)
        return [named(num_broken, shown)] if num_broken else []


def stored_sizes(shape: tuple[int, int], pattern: Pattern) -> tuple[tuple[int, int], tuple[int, int]]:
    """Sizes of values and of offsets of rows [R, K] = `shape`.

    >>> stored_sizes((130, 16), Pattern(1, 8, 64))
    ((130, 2), (3, 2))
    """
    rows, stored = shape[0], pattern.kept(shape[1])
    return (rows, stored), (num_groups(rows, pattern.v), stored)


def weight_of(rows_RK: Tensor, shape: tuple[int, ...], layout: Layout) -> Tensor:
    """The weight that these rows are, with the strides of a new tensor of its shape.

    `contiguous()` would not do: a 1x1 convolution counts as contiguous in several memory formats at once, and
    convolutions choose their algorithm by the strides.
    """
    return from_rows(rows_RK, shape, layout).reshape(-1).view(shape)


def offset_dtype_of(pattern: Pattern) -> torch.dtype:
    """uint8 where an offset fits (m up to 256), else uint16. Raises `ValueError` where neither does."""
    if pattern.m > LARGEST_M:
        raise ValueError(_too_wide(pattern))
    return torch.uint8 if pattern.m <= 256 else torch.uint16


def _too_wide(pattern: Pattern) -> str:
    return f"pattern {pattern}: blocks of more than {LARGEST_M} entries have no compressed form"
