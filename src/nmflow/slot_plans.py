"""What a recipe plans for the weights of a network: which patterns each passes through, and where it stands."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from nmflow.masks import Remainder
from nmflow.pattern import Pattern
from nmflow.schedules import Recipe, Stage, plan
from nmflow.targets import Slot, shape_problems

Planned = dict[tuple[Pattern, int], list[Stage]]
"""Pattern and axis of a slot -> the first stage of every segment of its plan."""


def plan_slots(
    slots: Iterable[Slot], recipe: Recipe, total_steps: int, remainder: Remainder
) -> tuple[Planned, list[str]]:
    """The plans of all slots, and what keeps them from being carried out."""
    problems: list[str] = []
    planned: Planned = {}
    for slot in slots:
        key = (slot.pattern, slot.axis)
        if key not in planned:
            try:
                segments = plan(recipe, total_steps, slot.pattern, slot.axis)
            except ValueError as error:
                problems.append(f"{slot.label}: {error}")
                segments = []
            planned[key] = [segment.first for segment in segments]
        for stage in planned[key]:
            if remainder != "partial" and slot.axis % slot.pattern.m == 0:
                problems += [each for p in (stage.pattern, stage.outer) for each in shape_problems(slot, p)]
    return planned, problems


def block_sizes(slots: Iterable[Slot], planned: Planned) -> frozenset[int]:
    """M of every pattern that these slots pass through."""
    stages = [stage for slot in slots for stage in planned[slot.pattern, slot.axis]]
    return frozenset(pattern.m for stage in stages for pattern in (stage.pattern, stage.outer))


def stages_at(slots: Sequence[Slot], recipe: Recipe, step: int, total_steps: int) -> list[Stage]:
    """The stage of every slot; slots of one pattern and axis share the work."""
    cache: dict[tuple[Pattern, int], Stage] = {}
    for slot in slots:
        key = (slot.pattern, slot.axis)
        if key not in cache:
            cache[key] = recipe.at(step, total_steps, slot.pattern, slot.axis)
    return [cache[slot.pattern, slot.axis] for slot in slots]
