"""The product with a compressed weight in plain torch: the oracle of every faster kernel.

Shape suffixes: R rows (outputs), K entries of the reduction axis (inputs), S stored entries of a row, G = ⌈R / V⌉
groups of V rows that share their offsets; where V is 1, G is R.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nmflow.groups import spread


def linear(
    x: Tensor,
    values_RS: Tensor,
    offsets_GS: Tensor,
    shape: tuple[int, int],
    n: int,
    m: int,
    bias: Tensor | None = None,
    v: int = 1,
) -> Tensor:
    """y = x W^T + b, W [R, K] = `shape` given by its kept values and their offsets within blocks of `m`.

    `x` is [..., K] with any leading dimensions, none and empty ones included; the result is [..., R].
    """
    return F.linear(x, expand(values_RS, offsets_GS, shape[1], n, m, v), bias)


def expand(values_RS: Tensor, offsets_GS: Tensor, axis: int, n: int, m: int, v: int = 1) -> Tensor:
    """Dense rows [R, K = `axis`]: stored entry s of row r lies at K-index m·⌊s / n⌋ + offset[⌊r / v⌋, s].

    Blocks before the last are full, so ⌊s / n⌋ is the block of s also where a tail block stores fewer than n.

    >>> expand(torch.tensor([[5.0, 7.0]]), torch.tensor([[1, 0]], dtype=torch.uint8), 3, 1, 2)
    tensor([[0., 5., 7.]])
    """
    rows_RK = values_RS.new_zeros(values_RS.shape[0], axis)
    return rows_RK.scatter_(1, spread(columns(offsets_GS, n, m), v, values_RS.shape[0]), values_RS)


def columns(offsets_GS: Tensor, n: int, m: int) -> Tensor:
    """K-index (int64) of every stored entry, m·⌊s / n⌋ + offset, [G, S]."""
    block_S = torch.arange(offsets_GS.shape[1], device=offsets_GS.device) // n
    return block_S * m + offsets_GS.to(torch.int64)
