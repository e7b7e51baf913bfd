"""Where the phases and patterns of one run begin: fractions of a run made into whole steps."""

from __future__ import annotations

import math
import operator
from bisect import bisect_right
from dataclasses import dataclass

from nmflow.pattern import Pattern
from nmflow.schedules.stage import Phase


@dataclass(frozen=True)
class Window:
    """The resolved steps of a run of T steps: dense [0, d), decay [d, e), fine-tune [e, T].

    `patterns[i]` is the pattern of Φ from step `starts[i]` on, dense before the first. Source: spec, section 4.

    >>> window = Window(d=1, e=7, starts=(1, 3, 5), patterns=spread("3:4", "2:4", "1:4"))
    >>> [str(window.pattern_at(step)) for step in (0, 1, 2, 3, 5, 7)]
    ['dense', '3:4', '3:4', '2:4', '1:4', '1:4']
    >>> window.phase_at(0), window.phase_at(6), window.phase_at(7)
    ('dense', 'decay', 'fine-tune')
    """

    d: int
    e: int
    starts: tuple[int, ...]
    patterns: tuple[Pattern, ...]

    def phase_at(self, step: int) -> Phase:
        """The phase of this step."""
        if step < self.d:
            return "dense"
        return "decay" if step < self.e else "fine-tune"

    def pattern_at(self, step: int) -> Pattern:
        """The pattern of Φ at this step."""
        number = bisect_right(self.starts, step) - 1
        return self.patterns[number] if number >= 0 else Pattern.dense()


def spread(*patterns: Pattern | str) -> tuple[Pattern, ...]:
    """Patterns, parsed, as a tuple."""
    return tuple(Pattern.parse(pattern) for pattern in patterns)


def equal_starts(d: int, e: int, num_patterns: int) -> tuple[int, ...]:
    """First steps of S patterns in equal intervals of [d, e): pattern p = ⌊j·S/(e - d)⌋, j = step - d.

    p is reached at the smallest whole j with j·S >= p·(e - d), in whole numbers, hence exact for any T.

    >>> equal_starts(0, 10, 3)
    (0, 4, 7)
    """
    return tuple(d - (-number * (e - d) // num_patterns) for number in range(num_patterns))


def step_of(fraction: float, total_steps: int) -> int:
    """The step at this fraction of a run, ⌊fraction·T + 0.5⌋ in float64.

    >>> step_of(0.05, 1000), step_of(0.05, 10), step_of(0.05, 9)
    (50, 1, 0)
    """
    return math.floor(fraction * total_steps + 0.5)


def whole(value: object, name: str, least: int) -> int:
    """`value` as an int of at least `least`; anything that is not a whole number raises `TypeError`."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} is a whole number, not {value!r}")
    number = operator.index(value)
    if number < least:
        raise ValueError(f"{name}={number}: at least {least}")
    return number
