"""Which rows share the columns they keep: V neighbours of rows [R, K] are a group, the last one possibly shorter.

Shape suffixes: R rows, K entries of the reduction axis, G = ⌈R / V⌉ groups, X any second dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor


def num_groups(num_rows: int, v: int) -> int:
    """⌈R / V⌉.

    >>> num_groups(128, 64), num_groups(130, 64), num_groups(0, 64)
    (2, 3, 0)
    """
    return -(-num_rows // v)


def summed(scores_RK: Tensor, v: int) -> Tensor:
    """Scores of groups [G, K]: those of their rows, added one row after the other in row order.

    In float32, float64 where the scores are: no sum depends on how a device or a kernel would reduce, so all of them
    choose the same columns. NaN stays NaN.

    >>> summed(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), 2)
    tensor([[4., 6.],
            [5., 6.]])
    """
    if v == 1:
        return scores_RK
    wide = torch.float64 if scores_RK.dtype == torch.float64 else torch.float32
    sums_GK = scores_RK[::v].to(wide, copy=True)
    for row in range(1, min(v, scores_RK.shape[0])):
        next_GK = scores_RK[row::v]  # a shorter last group has run out of rows
        sums_GK[: next_GK.shape[0]] += next_GK
    return sums_GK


def joined(marked_RK: Tensor, v: int) -> Tensor:
    """Bool [G, K]: marked in any row of the group.

    >>> joined(torch.tensor([[True, False], [False, False], [False, True]]), 2)
    tensor([[ True, False],
            [False,  True]])
    """
    if v == 1:
        return marked_RK
    any_GK = marked_RK[::v].clone()
    for row in range(1, min(v, marked_RK.shape[0])):
        next_GK = marked_RK[row::v]
        any_GK[: next_GK.shape[0]] |= next_GK
    return any_GK


def spread(groups_GX: Tensor, v: int, num_rows: int) -> Tensor:
    """Rows [R, X], each with what its group has.

    Takes memory for R rows, however large V is: V may come from a file.

    >>> spread(torch.tensor([[1], [2]]), 2, 3).tolist()
    [[1], [1], [2]]
    """
    if v == 1:
        return groups_GX
    return groups_GX[torch.arange(num_rows, device=groups_GX.device) // v]
