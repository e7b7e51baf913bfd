"""The step from W to W~ in plain torch: the one pass over the weights that training pays once a step.

Shape suffixes: R rows, K entries of the reduction axis.
"""

from __future__ import annotations

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


register(Kernel("reference", "project", lambda **facts: None, project))
