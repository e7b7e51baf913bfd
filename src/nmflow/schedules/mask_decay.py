"""Mask decay (MdGf): the pattern is the target from step d on, and what is pruned fades out by D(j)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from nmflow.schedules.base import PhasedRecipe
from nmflow.schedules.checks import is_number

_FLOOR = 1e-3


@dataclass(frozen=True, kw_only=True)
class MaskDecay(PhasedRecipe):
    """What the two have in common: β, the rate of decay per step."""

    decays_mask: ClassVar[bool] = True

    beta: float | None = None
    """β per step; None: D reaches its end just as the decay phase does, whatever the length of the run."""

    def problems(self) -> list[str]:
        if self.beta is None or (is_number(self.beta) and self.beta > 0.0):
            return []
        return [f"beta={self.beta!r}: β is a number above 0"]


@dataclass(frozen=True, kw_only=True)
class MdgfLinear(MaskDecay):
    """Mask decay along a line.

        D(j) = 1 - j/(e - d),    or    D(j) = max(1 - β·j, 0)    where β is given;    0 from e on

    Source: Bambhaniya et al. 2025, section 3; docs/method.md, section 4.

    >>> [MdgfLinear(dense=0.0, decay_end=0.8).at(step, 10, "1:4").decay for step in (0, 2, 4, 8, 10)]
    [1.0, 0.75, 0.5, 0.0, 0.0]
    """

    name: ClassVar[str] = "mdgf-linear"

    def decay_at(self, j: int, length: int) -> float:
        if self.beta is not None:
            return max(1.0 - self.beta * j, 0.0)
        return 1.0 - j / length


@dataclass(frozen=True, kw_only=True)
class MdgfExponential(MaskDecay):
    """Mask decay along an exponential, cut to exactly 0 where fine-tune begins.

        D(j) = floor^(j/(e - d)),    or    D(j) = exp(-β·j)    where β is given;    0 from e on

    Source: Bambhaniya et al. 2025, section 3; docs/method.md, section 4. The paper's ViT runs have β = 1e-4.

    >>> [f"{MdgfExponential(dense=0.0, decay_end=0.9).at(step, 10, '1:4').decay:.3f}" for step in (0, 3, 6, 9)]
    ['1.000', '0.100', '0.010', '0.000']
    """

    name: ClassVar[str] = "mdgf-exponential"

    floor: float | None = None
    """What D has fallen to at the end of decay, 1e-3 where neither it nor β is given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.floor is None and self.beta is None:
            object.__setattr__(self, "floor", _FLOOR)

    def problems(self) -> list[str]:
        problems = super().problems()
        if self.floor is not None and not (is_number(self.floor) and 0.0 < self.floor < 1.0):
            problems.append(f"floor={self.floor!r}: between 0 and 1")
        if self.floor is not None and self.beta is not None:
            problems.append("beta and floor both say how fast D falls; leave one of them out")
        return problems

    def decay_at(self, j: int, length: int) -> float:
        if self.beta is not None:
            return math.exp(-self.beta * j)
        return float((self.floor or _FLOOR) ** (j / length))
