"""The patterns that a user lists by fraction of the run, in place of a recipe's own: the option `schedule`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

from nmflow.pattern import Pattern
from nmflow.schedules.checks import denser, is_number

Schedule = tuple[tuple[float, Pattern], ...]
"""(fraction of the run, pattern of Φ from there on), fractions ascending, densities not rising."""


def read_schedule(given: Mapping[float, Any] | Iterable[Any]) -> Schedule:
    """Pairs, or a mapping, of fraction and pattern as a `Schedule`.

    Raises `ValueError` where fractions do not ascend within 0 ... 1 or a density rises, `TypeError` where
    the entries are no such pairs.

    >>> read_schedule({0.05: "4:8", 0.4: "1:8"})
    ((0.05, Pattern(n=4, m=8, v=1)), (0.4, Pattern(n=1, m=8, v=1)))
    """
    schedule = tuple(_read_entry(entry) for entry in _entries(given))
    if not schedule:
        raise ValueError("it has no entry")
    problems = [f"{fraction:g} lies outside 0 to 1" for fraction, _ in schedule if not 0.0 <= fraction <= 1.0]
    for (one, first), (two, second) in pairwise(schedule):
        if not one < two:
            problems.append(f"the fractions do not ascend: {one:g}, {two:g}")
        if denser(second, first):
            problems.append(f"the density rises from {first} at {one:g} to {second} at {two:g}")
    if problems:
        raise ValueError("; ".join(problems))
    return schedule


def _entries(given: Mapping[float, Any] | Iterable[Any]) -> Iterable[Any]:
    if isinstance(given, Mapping):
        return given.items()
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(f"pairs of (fraction of the run, pattern), not {given!r}")
    return given


def _read_entry(entry: Any) -> tuple[float, Pattern]:
    pair = tuple(entry) if isinstance(entry, (tuple, list)) else ()
    if len(pair) != 2 or not is_number(pair[0]):
        raise TypeError(f"a pair of (fraction of the run, pattern), not {entry!r}")
    return float(pair[0]), Pattern.parse(pair[1])
