"""Structure decay (SdGf): D = 0 throughout, and the pattern tightens step by step down to the target, V stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from nmflow.pattern import Pattern
from nmflow.schedules.base import PhasedRecipe

_LARGEST_K = 16


@dataclass(frozen=True, kw_only=True)
class SdgfStepwise(PhasedRecipe):
    """M stays, N falls: (M-1):M, then ⌈M/2^k⌉:M for k = 1, 2, ... while above N, then N:M.

    Source: Bambhaniya et al. 2025, section 3; docs/method.md, section 4.

    >>> [str(pattern) for pattern in SdgfStepwise().patterns(Pattern(1, 8), None)]
    ['7:8', '4:8', '2:8', '1:8']
    """

    name: ClassVar[str] = "sdgf-stepwise"

    def patterns(self, target: Pattern, axis: int | None) -> tuple[Pattern, ...]:
        return stepwise_patterns(target)


@dataclass(frozen=True, kw_only=True)
class SdgfGeometric(PhasedRecipe):
    """The density stays, the blocks shrink: (N·2^i):(M·2^i) for i = log2 k ... 0.

    k is the largest power of two up to 16 for which k·M divides the axis; where M itself does not (a shorter
    last block), for which k·M fits in it. k = 1 is plain STE in a decay phase. Source: Bambhaniya et al.
    2025, section 3, whose example decides over its formula; docs/method.md, section 4.

    >>> [str(pattern) for pattern in SdgfGeometric().patterns(Pattern(1, 8), 192)]
    ['8:64', '4:32', '2:16', '1:8']
    """

    name: ClassVar[str] = "sdgf-geometric"

    def patterns(self, target: Pattern, axis: int | None) -> tuple[Pattern, ...]:
        k = geometric_factor(target, axis)
        return tuple(Pattern(target.n * 2**i, target.m * 2**i, target.v) for i in reversed(range(k.bit_length())))

    def notes(self, target: Pattern | str, axis: int | None = None) -> tuple[str, ...]:
        target = Pattern.parse(target)
        if self.schedule is not None or target.is_dense:
            return ()
        k = geometric_factor(target, axis)
        why = "the axis is not known" if axis is None else ""
        if axis is not None and k < _LARGEST_K:
            relation = "does not fit in" if axis % target.m else "does not divide"
            why = f"{2 * k}·{target.m} {relation} {axis}"
        what = ", plain STE" if k == 1 else ""
        return (f"k = {k}{what}" + (f" ({why})" if why else ""),)


def stepwise_patterns(target: Pattern) -> tuple[Pattern, ...]:
    """The patterns of `SdgfStepwise`, ⌈M/2^k⌉ in whole numbers; a dense target alone stands for itself."""
    n, m = target.n, target.m
    kept = [m - 1] + [-(-m // 2**k) for k in range(1, m.bit_length() + 1)]
    between = sorted({number for number in kept if n < number < m}, reverse=True)
    return (*(Pattern(number, m, target.v) for number in between), target)


def geometric_factor(target: Pattern, axis: int | None) -> int:
    """k of `SdgfGeometric` for a reduction axis of this length, a power of two from 1 to 16."""
    if target.is_dense:
        return 1
    if axis is None:
        return _LARGEST_K
    k = _LARGEST_K
    while k > 1 and (k * target.m > axis if axis % target.m else axis % (k * target.m)):
        k //= 2
    return k
