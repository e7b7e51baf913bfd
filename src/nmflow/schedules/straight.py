"""Recipes without a decay phase: dense, and N:M at once with a straight-through gradient (ste, sr-ste)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from nmflow.pattern import Pattern
from nmflow.schedules.base import PhasedRecipe, Recipe, gradient_problems
from nmflow.schedules.checks import is_number, step_in_run, whole
from nmflow.schedules.stage import PrunedGradient, Stage


@dataclass(frozen=True, kw_only=True)
class Dense(Recipe):
    """No sparsity at all: Φ = 1, D = 1. The baseline goes through the same code as every other run.

    >>> Dense().at(10, 10, "1:16").phase
    'dense'
    """

    name: ClassVar[str] = "dense"

    pruned_gradient: PrunedGradient = "straight-through"

    def __post_init__(self) -> None:
        if problems := gradient_problems(self.pruned_gradient):
            raise ValueError(f"recipe dense: {'; '.join(problems)}")

    def at(self, step: int, total_steps: int, target: Pattern | str, axis: int | None = None) -> Stage:
        Pattern.parse(target)
        step_in_run(step, whole(total_steps, "total_steps", least=1))
        return Stage(Pattern.dense(), 1.0, "dense", self.pruned_gradient)

    def changes(self, total_steps: int, target: Pattern | str, axis: int | None = None) -> tuple[int, ...]:
        self.at(0, total_steps, target)
        return (0,)

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "pruned_gradient": self.pruned_gradient}


@dataclass(frozen=True, kw_only=True)
class Ste(PhasedRecipe):
    """N:M from step d on, D = 0, straight-through gradients.

    >>> stage = Ste().at(0, 100, "1:4")
    >>> str(stage.pattern), stage.decay, stage.phase
    ('1:4', 0.0, 'fine-tune')
    """

    name: ClassVar[str] = "ste"
    default_dense: ClassVar[float] = 0.0
    default_decay_end: ClassVar[float | None] = None


@dataclass(frozen=True, kw_only=True)
class SrSte(Ste):
    """STE and a pull of the pruned weights towards zero: λ·(1 - Φ)⊙W is added to the gradient.

    Source: Zhou et al. 2021; docs/method.md, sections 3 and 4.
    """

    name: ClassVar[str] = "sr-ste"

    sr_ste: float = 2e-4
    """λ"""

    @property
    def lambda_(self) -> float:
        return self.sr_ste

    def problems(self) -> list[str]:
        if is_number(self.sr_ste) and self.sr_ste >= 0.0:
            return []
        return [f"sr_ste={self.sr_ste!r}: λ is a number of at least 0"]
