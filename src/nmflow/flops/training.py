"""What a run's steps cost: a weight's products are sparse in the steps in which its W~ is."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise

from nmflow.flops.report import LayerFlops, Stretch, products_of_step
from nmflow.pattern import Pattern
from nmflow.schedules import Recipe, plan
from nmflow.targets import Slot


def schedule_of(
    layers: Sequence[LayerFlops], slots: Iterable[Slot], recipe: Recipe, total_steps: int
) -> tuple[Stretch, ...]:
    """The stretches of a run of T steps, in order and without gaps. Raises as `Recipe.at` does."""
    kinds = list(dict.fromkeys((slot.pattern, slot.axis) for slot in slots))
    patterns = {kind: effective_patterns(recipe, total_steps, *kind) for kind in kinds}
    target, axis = kinds[0] if kinds else (Pattern.dense(), None)  # phases are the recipe's, whatever the target
    starts = {start for found in (*patterns.values(), recipe.changes(total_steps, target, axis)) for start in found}
    stretches: list[Stretch] = []
    for start, end in pairwise([*sorted(starts), total_steps]):
        now = {kind: found[max(first for first in found if first <= start)] for kind, found in patterns.items()}
        phase = recipe.at(start, total_steps, target, axis).phase
        stretch = Stretch(start, end, phase, *products_of_step(layers, now))
        if stretches and replace(stretches[-1], start=start, end=end) == stretch:
            stretch = replace(stretch, start=stretches.pop().start)
        stretches.append(stretch)
    return tuple(stretches)


def effective_patterns(recipe: Recipe, total_steps: int, target: Pattern, axis: int) -> dict[int, Pattern]:
    """From which step on W~ = W ⊙ [Φ + D·(Φ_outer - Φ)] has which pattern: Φ's where D = 0, before that Φ_outer's.

    >>> from nmflow.schedules import recipe
    >>> found = effective_patterns(recipe("mdgf-linear", beta=0.01), 1000, Pattern.parse("1:8"), 64)
    >>> {step: str(pattern) for step, pattern in found.items()}     # D = 0 a hundred steps after step 50
    {0: 'dense', 50: 'dense', 150: '1:8', 700: '1:8'}
    """
    found: dict[int, Pattern] = {}
    for segment in plan(recipe, total_steps, target, axis):
        steps = range(segment.start, segment.end)
        at = bisect_left(steps, True, key=lambda step: recipe.at(step, total_steps, target, axis).decay == 0.0)
        if at > 0:
            found[segment.start] = segment.first.outer
        if at < len(steps):
            found[steps[at]] = segment.first.pattern
    return found
