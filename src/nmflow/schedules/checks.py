"""What counts as a step, a number, a falling density or patterns of one V: the checks that every recipe shares."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from dataclasses import replace
from fractions import Fraction

from nmflow.pattern import Pattern


def whole(value: object, name: str, least: int) -> int:
    """`value` as an int; `TypeError` where it is no whole number, `ValueError` where it is below `least`."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} is a whole number, not {value!r}")
    number = operator.index(value)
    if number < least:
        raise ValueError(f"{name}={number}: at least {least}")
    return number


def step_in_run(step: object, total_steps: int) -> int:
    """`step` as an int in 0 ... T; raises as `whole` does."""
    number = whole(step, "step", least=0)
    if number > total_steps:
        raise ValueError(f"step={number} lies beyond total_steps={total_steps}")
    return number


def is_number(value: object) -> bool:
    """True for a finite int or float; a bool is no number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def denser(one: Pattern, two: Pattern) -> bool:
    """True where `one` keeps a larger part than `two`, in exact arithmetic."""
    return Fraction(one.n, one.m) > Fraction(two.n, two.m)


def on_the_way(pattern: Pattern, target: Pattern) -> Pattern:
    """A listed pattern as weights of this target pass through it: where it says no V, V is the target's.

    >>> str(on_the_way(Pattern.parse("4:8"), Pattern.parse("1:8v64")))
    '4:8v64'
    """
    return replace(pattern, v=target.v) if pattern.v == 1 else pattern


def group_problems(patterns: Iterable[Pattern], target: Pattern) -> list[str]:
    """What is wrong with patterns on the way to a target: a V of their own, so that no mask would lie in another."""
    others = dict.fromkeys(pattern for pattern in patterns if not pattern.is_dense and pattern.v != target.v)
    return [
        f"{pattern} shares columns among {pattern.v} rows, the target {target} among {target.v}; leave v out of what "
        "lies before the target, it is the target's"
        for pattern in others
    ]
