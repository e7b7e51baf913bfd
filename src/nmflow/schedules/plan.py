"""A whole run at a glance: the few stretches of steps over which only D changes, and only downwards."""

from __future__ import annotations

from dataclasses import dataclass, replace

from nmflow.pattern import Pattern
from nmflow.schedules.base import Recipe
from nmflow.schedules.stage import Stage


@dataclass(frozen=True)
class Segment:
    """Steps [start, end) of one phase, pattern and so on; D falls from first.decay to last.decay."""

    start: int
    end: int
    first: Stage
    last: Stage


def plan(
    recipe: Recipe, total_steps: int, target: Pattern | str, axis: int | None = None
) -> list[Segment]:
    """The segments of a run of T steps, in order and without gaps; asks the recipe at their ends only.

    Raises as `Recipe.at` does.

    >>> from nmflow.schedules import recipe
    >>> for part in plan(recipe("sdgf-geometric"), 1000, "1:8", axis=48):
    ...     print(part.start, part.end, part.first.phase, part.first.pattern)
    0 50 dense dense
    50 375 decay 2:16
    375 700 decay 1:8
    700 1000 fine-tune 1:8
    """
    starts = recipe.changes(total_steps, target, axis)
    segments: list[Segment] = []
    for start, end in zip(starts, (*starts[1:], total_steps), strict=True):
        first = recipe.at(start, total_steps, target, axis)
        last = recipe.at(end - 1, total_steps, target, axis)
        if segments and _goes_on(segments[-1].last, first):
            before = segments.pop()
            start, first = before.start, before.first
        segments.append(Segment(start, end, first, last))
    return segments


def _goes_on(one: Stage, two: Stage) -> bool:
    return replace(one, decay=two.decay) == two and one.decay >= two.decay
