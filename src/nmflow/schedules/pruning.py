"""The baselines that prune for good: what is cut gets no gradient and does not come back (snip, idp)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from nmflow.pattern import Pattern
from nmflow.schedules.base import PhasedRecipe
from nmflow.schedules.stage import MaskRule, PrunedGradient
from nmflow.schedules.structure_decay import stepwise_patterns


@dataclass(frozen=True, kw_only=True)
class Snip(PhasedRecipe):
    """One N:M mask by connection sensitivity, abs(g⊙W) on a few batches before training, then fixed.

    Source: Lee et al. 2019; docs/method.md, section 4.
    """

    name: ClassVar[str] = "snip"
    mask: ClassVar[MaskRule] = "frozen"
    needs_gradients: ClassVar[bool] = True
    default_dense: ClassVar[float] = 0.0
    default_decay_end: ClassVar[float | None] = None

    pruned_gradient: PrunedGradient = "masked"


@dataclass(frozen=True, kw_only=True)
class Idp(PhasedRecipe):
    """Inherited dynamic pruning: N falls to the target, each mask chosen among the survivors of the last.

    Source: Fang et al. 2022, known here by its description in Bambhaniya et al. 2025 only. Assumed, since the
    text is not at hand: the N's and equal intervals of sdgf-stepwise, magnitude as the score, and a mask that
    is fixed between two changes of N.
    """

    name: ClassVar[str] = "idp"
    mask: ClassVar[MaskRule] = "inherit"

    pruned_gradient: PrunedGradient = "masked"

    def patterns(self, target: Pattern, axis: int | None) -> tuple[Pattern, ...]:
        return stepwise_patterns(target)
