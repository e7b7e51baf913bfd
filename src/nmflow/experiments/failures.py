"""Runs that came to nothing among several, and why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Failure:
    """A run that came to nothing, and what it said."""

    run: str
    reason: str

    def __str__(self) -> str:
        return f"{self.run}: {self.reason}"


def failure_lines(failures: Iterable[Failure]) -> list[str]:
    """A line a reason: what many runs die of alike, such as data that are missing, is said once.

    >>> failure_lines([Failure("a", "no data"), Failure("b", "diverged"), Failure("c", "no data")])
    ['failed: 2 runs, the first a: no data', 'failed: b: diverged']
    """
    runs: dict[str, list[str]] = {}
    for failure in failures:
        runs.setdefault(failure.reason, []).append(failure.run)
    return [
        f"failed: {names[0] if len(names) == 1 else f'{len(names)} runs, the first {names[0]}'}: {reason}"
        for reason, names in runs.items()
    ]
