"""The step from W to W~ in plain torch: the one pass over the weights that training pays once a step.

Shape suffixes: R rows, K entries of the reduction axis; of a convolution as it is stored C channels, T taps, K = T·C.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nmflow.masks import Remainder, rows_mask
from nmflow.ops.registry import Kernel, register
from nmflow.pattern import Pattern


def project(
    w_RK: Tensor, pattern: Pattern, decay: float, remainder: Remainder, mask_RK: Tensor, effective_RK: Tensor
) -> Tensor:
    """Write Φ into `mask_RK` and W ⊙ [Φ + D·(1 - Φ)] into `effective_RK`; how many entries of the mask changed.

    The count is a tensor on the device of W, so that nobody waits for it. Source: Bambhaniya et al. 2025, section 3.
    """
    mask = rows_mask(w_RK.abs(), pattern, remainder)
    flips = (mask_RK != mask).sum()
    mask_RK.copy_(mask)
    apply_mask(w_RK, mask_RK, decay, effective_RK)
    return flips


def apply_mask(
    w_RK: Tensor, mask_RK: Tensor, decay: float, effective_RK: Tensor, outer_RK: Tensor | None = None
) -> None:
    """Write W ⊙ [Φ + D·(Φ_outer - Φ)] into `effective_RK`; Φ_outer is all ones where it is None.

    `where`, not a product: a pruned NaN or inf becomes 0 where D is 0 or Φ_outer has let it go.
    """
    pruned = w_RK * decay if decay else torch.zeros((), dtype=w_RK.dtype, device=w_RK.device)
    if outer_RK is not None and decay:
        pruned = torch.where(outer_RK, pruned, 0)
    torch.where(mask_RK, w_RK, pruned, out=effective_RK)


def by_rows(run: Callable[..., Any]) -> Callable[..., Any]:
    """A projection of rows [R, K], made to take the weight of a convolution [R, C, T] as well, by way of copies."""

    @functools.wraps(run)
    def either(
        w: Tensor, pattern: Pattern, decay: float, remainder: Remainder, mask: Tensor, effective: Tensor
    ) -> Any:
        if w.dim() == 2:
            return run(w, pattern, decay, remainder, mask, effective)
        w_RK, mask_RK, effective_RK = (tensor.transpose(1, 2).flatten(1) for tensor in (w, mask, effective))
        flips = run(w_RK, pattern, decay, remainder, mask_RK, effective_RK)
        for stored, rows_RK in ((mask, mask_RK), (effective, effective_RK)):
            stored.copy_(as_stored(rows_RK, stored))
        return flips

    return either


def as_stored(rows_RK: Tensor, stored: Tensor) -> Tensor:
    """Rows [R, K] in the shape of `stored`, which is [R, K] too or [R, C, T] of a convolution."""
    if stored.dim() == 2:
        return rows_RK
    rows, channels, taps = stored.shape
    return rows_RK.reshape(rows, taps, channels).transpose(1, 2)


register(Kernel("reference", "project", lambda **facts: None, by_rows(project)))
