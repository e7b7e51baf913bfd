"""The product with a compressed weight in plain torch: the oracle of every faster kernel.

Shape suffixes: R rows (outputs), K entries of the reduction axis (inputs), S stored entries of a row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(
    x: Tensor,
    values_RS: Tensor,
    offsets_RS: Tensor,
    shape: tuple[int, int],
    n: int,
    m: int,
    bias: Tensor | None = None,
) -> Tensor:
    """y = x W^T + b, W [R, K] = `shape` given by its kept values and their offsets within blocks of `m`.

    `x` is [..., K] with any leading dimensions, none and empty ones included; the result is [..., R].
    """
    return F.linear(x, expand(values_RS, offsets_RS, shape[1], n, m), bias)


def expand(values_RS: Tensor, offsets_RS: Tensor, axis: int, n: int, m: int) -> Tensor:
    """Dense rows [R, K = `axis`]: stored entry s of a row lies at K-index m·⌊s / n⌋ + offset.

    Blocks before the last are full, so ⌊s / n⌋ is the block of s also where a tail block stores fewer than n.

    >>> expand(torch.tensor([[5.0, 7.0]]), torch.tensor([[1, 0]], dtype=torch.uint8), 3, 1, 2)
    tensor([[0., 5., 7.]])
    """
    rows_RK = values_RS.new_zeros(values_RS.shape[0], axis)
    return rows_RK.scatter_(1, columns(offsets_RS, n, m), values_RS)


def columns(offsets_RS: Tensor, n: int, m: int) -> Tensor:
    """K-index (int64) of every stored entry, m·⌊s / n⌋ + offset, [R, S]."""
    block_S = torch.arange(offsets_RS.shape[1], device=offsets_RS.device) // n
    return block_S * m + offsets_RS.to(torch.int64)
