"""What one step of a sparse run looks like: the value that every recipe returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from nmflow.pattern import Pattern

Phase = Literal["dense", "decay", "fine-tune"]
PrunedGradient = Literal["straight-through", "decay", "masked"]
MaskRule = Literal["fresh", "frozen", "inherit"]

_DENSE = Pattern.dense()

PRUNED_GRADIENTS: tuple[str, ...] = get_args(PrunedGradient)


@dataclass(frozen=True)
class Stage:
    """State of one parameter's sparsity at one optimizer step.

        W~ = W ⊙ [Φ + D(j)·(Φ_outer - Φ)]

    Φ is the mask of `pattern` taken from W, D(j) the `decay`, Φ_outer the mask of `outer` (all ones where it
    is dense, as it is but for recipes in sequence). Source: Bambhaniya et al. 2025, section 3.
    """

    pattern: Pattern
    """Pattern of Φ."""
    decay: float
    """D(j) in [0, 1]: what the forward still sees of a pruned weight."""
    phase: Phase
    pruned_gradient: PrunedGradient = "straight-through"
    """dL/dW of a pruned weight, g = dL/dW~: g (`straight-through`), D·g (`decay`) or 0 (`masked`)."""
    sr_ste: float = 0.0
    """λ of the term λ·(1 - Φ)⊙W that is added to the gradient once an optimizer step; 0 for none."""
    mask: MaskRule = "fresh"
    """`fresh`: Φ from W after every optimizer step; `frozen`: Φ as first taken in such a stage;
    `inherit`: Φ fixed within a pattern, the next one chosen among its survivors."""
    outer: Pattern = _DENSE
    """Pattern of Φ_outer: what the recipe before this one ended in."""
