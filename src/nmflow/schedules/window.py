"""Where the phases and patterns of one run begin: fractions of a run made into whole steps."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass

from nmflow.pattern import Pattern
from nmflow.schedules.stage import Phase


@dataclass(frozen=True)
class Window:
    """The resolved steps of a run of T steps: dense [0, d), decay [d, e), fine-tune [e, T].

    `patterns[i]` is the pattern of Φ from step `starts[i]` on, and starts[0] = d. Source: docs/method.md, section 4.

    >>> window = Window((2, 5), 8, (Pattern(2, 4), Pattern(1, 4)))
    >>> [str(window.pattern_at(step)) for step in (1, 2, 4, 5, 9)]
    ['dense', '2:4', '2:4', '1:4', '1:4']
    >>> [window.phase_at(step) for step in (1, 2, 7, 8)]
    ['dense', 'decay', 'decay', 'fine-tune']
    """

    starts: tuple[int, ...]
    e: int
    patterns: tuple[Pattern, ...]

    @property
    def d(self) -> int:
        """First step after the dense phase."""
        return self.starts[0]

    def phase_at(self, step: int) -> Phase:
        """The phase of this step."""
        if step < self.d:
            return "dense"
        return "decay" if step < self.e else "fine-tune"

    def pattern_at(self, step: int) -> Pattern:
        """The pattern of Φ at this step."""
        number = bisect_right(self.starts, step) - 1
        return self.patterns[number] if number >= 0 else Pattern.dense()


def equal_starts(d: int, e: int, num_patterns: int) -> tuple[int, ...]:
    """First steps of S patterns in equal intervals of [d, e): pattern p = ⌊j·S/(e - d)⌋, j = step - d.

    Pattern p begins at the smallest whole j with j·S >= p·(e - d), found in whole numbers: exact for any T.

    >>> equal_starts(0, 10, 3)
    (0, 4, 7)
    """
    return tuple(d - (-p * (e - d) // num_patterns) for p in range(num_patterns))


def step_of(fraction: float, total_steps: int) -> int:
    """The step at this fraction of a run, ⌊fraction·T + 0.5⌋ in float64.

    >>> step_of(0.05, 1000), step_of(0.05, 10), step_of(0.05, 9)
    (50, 1, 0)
    """
    return math.floor(fraction * total_steps + 0.5)
