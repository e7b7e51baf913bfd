"""Which weights survive: exact N:M masks, and the check that a tensor is N:M.

Shape suffixes: R rows, K entries of the reduction axis, G blocks of a row, M entries of a block, N kept ones. Of a
pattern whose V rows share their columns, V rows x M entries are a block, and R counts groups of V rows from there on.
"""

from __future__ import annotations

from math import prod
from typing import Literal, get_args

import torch
from torch import Tensor

from nmflow.groups import joined, spread, summed
from nmflow.layout import from_rows, to_rows
from nmflow.pattern import Pattern

Remainder = Literal["error", "partial", "skip"]
"""What a last block of r < M entries gets: `error` refuses, `partial` keeps min(N, r) of it,
`skip` leaves the whole weight dense. A last group of fewer than V rows likewise; `partial` lets it be shorter."""

REMAINDERS: tuple[str, ...] = get_args(Remainder)


def nm_mask(
    weight: Tensor,
    pattern: Pattern | str,
    dim: int = -1,
    scores: Tensor | None = None,
    remainder: Remainder = "error",
) -> Tensor:
    """Mask Φ of an N:M pattern: in every block of M along `dim` the N entries of the highest score are True.

        Φ[b, i] = 1  <=>  #{k : s[b, k] > s[b, i]} + #{k < i : s[b, k] = s[b, i]} < N,      s = abs(weight)

    Where V rows share their columns (`1:8v64`), s[b, i] is the sum of abs(weight) over column i of V neighbouring rows
    (`nmflow.groups.summed`), and Φ is that of all of them. Rows are those of `nmflow.layout`: all dimensions but `dim`.

    Of equal scores the lowest index survives, so ranks, devices and reruns agree; +0 and -0 are equal; NaN
    ranks above everything. `weight` has any shape and dtype; one with four dimensions is a convolution's
    [out, in/groups, kH, kW], whose axis under the default `dim=-1` is the flattened (kH, kW, in) order; any
    other `dim` is taken as it is. `scores` (same shape, signed, the higher the better) replace abs(weight).

    Returns a bool tensor shaped like `weight`, never part of a graph. Raises `ValueError` where M does not divide the
    axis, or V the rows, and `remainder` is "error". Source: Bambhaniya et al. 2025, section 3.

    >>> nm_mask(torch.tensor([[3.0, -4.0, 1.0, 1.0]]), "2:4")
    tensor([[ True,  True, False, False]])
    >>> nm_mask(torch.tensor([1.0, 1.0, 1.0, 5.0, 2.0]), "1:3", remainder="partial")
    tensor([ True, False, False,  True, False])
    >>> nm_mask(torch.tensor([[3.0, 2.0], [0.0, 2.0]]), "1:2v2")
    tensor([[False,  True],
            [False,  True]])
    """
    pattern = Pattern.parse(pattern)
    if scores is None:
        scores = weight.detach().abs()
    elif scores.shape != weight.shape:
        raise ValueError(f"scores have shape {tuple(scores.shape)}, the weight {tuple(weight.shape)}")
    if weight.dim() == 4 and dim == -1:
        rows = to_rows(scores.detach(), "conv")
        return from_rows(rows_mask(rows, pattern, remainder), tuple(weight.shape), "conv").contiguous()
    scores = scores.detach().movedim(dim, -1) if weight.dim() else scores.detach()
    keep = rows_mask(to_rows(scores, "rows"), pattern, remainder)
    keep = from_rows(keep, tuple(scores.shape), "rows")
    return (keep.movedim(-1, dim) if weight.dim() else keep).contiguous()


def is_nm(
    tensor: Tensor, pattern: Pattern | str, dim: int = -1, remainder: Remainder = "error"
) -> bool:
    """True if every block of M along `dim` (axes as in `nm_mask`) holds at most N non-zero entries.

    Where V rows share their columns: at most N columns that are not zero in all of them. Nearly zero is not zero, and
    NaN is not zero. With `remainder="skip"` a weight of which M does not divide the axis, or V the rows, is
    dense by agreement, hence True. Raises `ValueError` as `nm_mask` does.

    >>> is_nm(torch.tensor([0.0, 2.0, 0.0, 0.0]), "1:4"), is_nm(torch.tensor([1e-30, 2.0, 0.0, 0.0]), "1:4")
    (True, False)
    """
    pattern = Pattern.parse(pattern)
    if tensor.dim() == 4 and dim == -1:
        rows = to_rows(tensor, "conv")
    else:
        rows = to_rows(tensor.movedim(dim, -1) if tensor.dim() else tensor, "rows")
    if remainder != "partial" and _has_remainder(rows, pattern):
        _check_remainder(rows, pattern, remainder)
        return True
    return not bool((block_counts(rows, pattern) > pattern.n).any())


def rows_mask(scores_RK: Tensor, pattern: Pattern, remainder: Remainder = "error") -> Tensor:
    """`nm_mask` of scores that already lie as rows [R, K]: the one form that kernels implement."""
    if remainder != "partial" and _has_remainder(scores_RK, pattern):
        _check_remainder(scores_RK, pattern, remainder)
        return torch.ones_like(scores_RK, dtype=torch.bool)
    if pattern.is_dense:
        return torch.ones_like(scores_RK, dtype=torch.bool)
    return spread(_kept(summed(scores_RK, pattern.v), pattern), pattern.v, scores_RK.shape[0])


def _kept(scores_RK: Tensor, pattern: Pattern) -> Tensor:
    """The mask of rows, or of groups of rows that share their columns."""
    num_rows, axis = scores_RK.shape
    tail = axis % pattern.m
    blocks_RGM = scores_RK[:, : axis - tail].reshape(num_rows, axis // pattern.m, pattern.m)
    keep = top_n(blocks_RGM, pattern.n).reshape(num_rows, axis - tail)
    if not tail:
        return keep
    keep_tail = top_n(scores_RK[:, axis - tail :], min(pattern.n, tail))
    return torch.cat([keep, keep_tail], dim=1)


def top_n(scores: Tensor, n: int) -> Tensor:
    """Mask of the `n` highest scores along the last dimension; ties to the lowest index, NaN above all.

    A stable descending sort is the definition. One survivor of many, the case this project lives on, needs
    no sort: `argmax` returns the first of equal maxima and takes NaN for the largest.
    """
    if n >= scores.shape[-1]:
        return torch.ones_like(scores, dtype=torch.bool)
    if n == 1:
        kept = scores.argmax(dim=-1, keepdim=True)
    else:
        kept = scores.argsort(dim=-1, descending=True, stable=True)[..., :n]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, kept, True)


def block_counts(rows_RK: Tensor, pattern: Pattern) -> Tensor:
    """Non-zero columns of every block, [ceil(R / V), ceil(K / M)], the tails as blocks of their own.

    A column of one row is an entry; one of V rows counts where any of them is not zero.
    """
    used_RK = joined(rows_RK != 0, pattern.v)
    num_rows, axis = used_RK.shape
    tail = axis % pattern.m
    counts = used_RK[:, : axis - tail].reshape(num_rows, axis // pattern.m, pattern.m).sum(dim=-1)
    if not tail:
        return counts
    # Never filled up to M: it may come from a file, and be larger than any memory.
    return torch.cat([counts, used_RK[:, axis - tail :].sum(dim=1, keepdim=True)], dim=1)


def _has_remainder(rows_RK: Tensor, pattern: Pattern) -> bool:
    return bool(rows_RK.shape[1] % pattern.m or rows_RK.shape[0] % pattern.v)


def _check_remainder(rows_RK: Tensor, pattern: Pattern, remainder: str) -> None:
    if remainder not in REMAINDERS:
        raise ValueError(f'remainder "{remainder}": one of {", ".join(REMAINDERS)}')
    if remainder != "error":
        return
    num_rows, axis = rows_RK.shape
    if axis % pattern.m:
        raise ValueError(
            f"the axis has {axis} entries, {pattern.m} does not divide it; use a pattern whose M does, "
            'remainder="partial" (a shorter last block) or remainder="skip" (leave it dense)'
        )
    rows = f"{num_rows} row{'' if num_rows == 1 else 's'}"
    raise ValueError(
        f"{pattern}: the weight has {rows}, {pattern.v} does not divide them; use a pattern whose V does, "
        'remainder="partial" (a shorter last group) or remainder="skip" (leave it dense)'
    )


def pack_bits(mask: Tensor) -> Tensor:
    """Bool tensor of any shape -> uint8 [ceil(size / 8)], the first entry in the lowest bit."""
    flat = mask.reshape(-1).to(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).reshape(-1, 8)
    weights = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=mask.device)
    return (flat * weights).sum(dim=1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `pack_bits`, for a mask of this shape."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed.unsqueeze(1) >> shifts) & 1
    return bits.reshape(-1)[: prod(shape)].reshape(shape).bool()
