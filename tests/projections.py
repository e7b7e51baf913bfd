"""What a projection has to write: a stable sort, block by block, and weights that tell good ones from bad.

The oracle sorts the magnitudes of one block at a time in float64, where every magnitude is exact.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
NAN, INF = float("nan"), float("inf")


def survivors(w_RK: Tensor, n: int, m: int, v: int = 1) -> Tensor:
    """Φ by a stable descending sort of every block; a short last block is a block.

    Where v rows share their columns it is the one of their sums, added in float32, row by row, for all of them.
    """
    if v > 1:
        groups = [functools.reduce(torch.add, rows.float().abs()) for rows in w_RK.split(v)]
        chosen = [survivors(sums[None], n, m).expand(v, -1) for sums in groups]
        return torch.cat([*chosen, torch.zeros(0, w_RK.shape[1], dtype=torch.bool)])[: len(w_RK)]
    blocks = w_RK.double().abs().split(m, dim=1)
    kept = [block.sort(dim=1, descending=True, stable=True).indices[:, :n] for block in blocks]
    pairs = zip(blocks, kept, strict=True)
    return torch.cat([torch.zeros_like(block).bool().scatter(1, index, True) for block, index in pairs], dim=1)


def weights(kind: str, rows: int, axis: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """`random`, `tied` (a handful of values, both signs, both zeros) or `special` (NaN, inf, denormals, zeros too)."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, axis, generator=generator)
    if kind == "tied":
        w = w.round()
    if kind == "special":
        tiny = float(torch.finfo(dtype).smallest_normal) / 3
        table = torch.tensor([NAN, -NAN, INF, -INF, 0.0, -0.0, tiny, -tiny, 2 * tiny])
        pick = torch.randint(0, 18, (rows, axis), generator=generator)
        w = torch.where(pick < 9, table.to(dtype).float()[pick % 9], w)
    return w.to(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit, but that one NaN is as good as another."""
    nan = a.isnan() & b.isnan()
    return bool((nan | (a.contiguous().view(BITS[a.dtype]) == b.contiguous().view(BITS[b.dtype]))).all())


def lying(tensor_RK: Tensor, lie: str) -> Tensor:
    """The same tensor with its rows, or its columns, without gaps in memory."""
    return tensor_RK.t().contiguous().t() if lie == "columns" else tensor_RK.contiguous()


def convolution(rows_RK: Tensor, taps: int) -> Tensor:
    """Rows as the weight of a convolution stores them, [R, C, T]: entry k is channel k mod C of tap k // C."""
    rows, axis = rows_RK.shape
    return torch.stack(rows_RK.split(max(axis // taps, 1), dim=1), dim=2) if axis else rows_RK.new_empty(rows, 0, taps)


def rows_of(weight_RCT: Tensor) -> Tensor:
    """The rows [R, K] that `convolution` made the weight of."""
    return torch.cat([weight_RCT[:, :, tap] for tap in range(weight_RCT.shape[2])], dim=1)
