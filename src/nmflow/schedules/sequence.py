"""Recipes that follow each other in one run: each in its own steps, and nothing that was let go comes back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

from nmflow.pattern import Pattern
from nmflow.schedules.base import PhasedRecipe, Recipe
from nmflow.schedules.checks import denser, group_problems, is_number, on_the_way, step_in_run, whole
from nmflow.schedules.stage import Stage
from nmflow.schedules.window import Window, step_of


@dataclass(frozen=True)
class Part:
    """One recipe of a sequence, up to the fraction `until` of the run, where it has reached `pattern`."""

    recipe: PhasedRecipe
    until: float
    pattern: Pattern | None = None
    """None: the target of the run. It has the V of the target, too, where it says none."""


@dataclass(frozen=True)
class Sequence(Recipe):
    """Parts i = 1, 2, ... of a run, part i in the steps [⌊u(i-1)·T + 0.5⌋, ⌊u(i)·T + 0.5⌋).

        W~ = W ⊙ [Φ + D·(Φ_outer - Φ)],     Φ_outer of the pattern the part before ended in, 1 at first

    A part counts its own steps: its fractions are of its length. The dense phase of a later part stays at
    Φ_outer (Φ = Φ_outer, D = 0); the whole has one fine-tune phase, the last part's. Source: docs/method.md, section 4.

    Raises `ValueError` where a density would rise, where D > 0 meets masks that are not nested, and where a pattern on
    the way has another V than the target.
    """

    name: ClassVar[str] = "sequence"

    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        if problems := list(_problems(self.parts)):
            raise ValueError(f"recipe sequence: {'; '.join(problems)}")

    @property
    def label(self) -> str:
        return ", then ".join(part.recipe.name for part in self.parts)

    def at(self, step: int, total_steps: int, target: Pattern | str, axis: int | None = None) -> Stage:
        total_steps = whole(total_steps, "total_steps", least=1)
        step = step_in_run(step, total_steps)
        legs = self._legs(total_steps, Pattern.parse(target), axis)
        number = max(number for number, leg in enumerate(legs) if leg.start <= step)
        leg = legs[number]
        stage = leg.recipe.at(step - leg.start, leg.length, leg.end, axis)
        if number > 0 and stage.phase == "dense":
            return replace(stage, pattern=leg.outer, decay=0.0, phase="decay", outer=leg.outer)
        if number < len(legs) - 1 and stage.phase == "fine-tune":
            return replace(stage, phase="decay", outer=leg.outer)
        return replace(stage, outer=leg.outer)

    def changes(self, total_steps: int, target: Pattern | str, axis: int | None = None) -> tuple[int, ...]:
        legs = self._legs(whole(total_steps, "total_steps", least=1), Pattern.parse(target), axis)
        inner = (leg.start + step for leg in legs for step in leg.recipe.changes(leg.length, leg.end, axis))
        return tuple(sorted(set(inner)))

    def notes(self, target: Pattern | str, axis: int | None = None) -> tuple[str, ...]:
        return tuple(
            f"part {number} ({part.recipe.name}): {note}"
            for number, part in enumerate(self.parts, 1)
            for note in part.recipe.notes(part.pattern or target, axis)
        )

    def to_dict(self) -> dict[str, Any]:
        parts = [
            {
                "recipe": part.recipe.to_dict(),
                "until": part.until,
                "pattern": None if part.pattern is None else str(part.pattern),
            }
            for part in self.parts
        ]
        return {"name": self.name, "parts": parts}

    def _legs(self, total_steps: int, target: Pattern, axis: int | None) -> list[_Leg]:
        """The parts over the steps of this run, all of them checked."""
        legs: list[_Leg] = []
        problems = []
        start, outer = 0, Pattern.dense()
        for number, part in enumerate(self.parts, 1):
            stop, end = step_of(part.until, total_steps), on_the_way(part.pattern or target, target)
            leg = _Leg(part.recipe, start, stop - start, outer, end)
            problems += [f"part {number}: {problem}" for problem in leg.problems(axis)]
            legs.append(leg)
            start, outer = stop, end
        problems += group_problems((leg.end for leg in legs), target)
        if legs[-1].end != target:
            problems.append(f"the last part ends in {legs[-1].end}, the target is {target}")
        if problems:
            raise ValueError(f"recipe sequence, total_steps={total_steps}: {'; '.join(problems)}")
        return legs


@dataclass(frozen=True)
class _Leg:
    """A part in the steps [start, start + length) of a run, between two patterns."""

    recipe: PhasedRecipe
    start: int
    length: int
    outer: Pattern
    end: Pattern

    def problems(self, axis: int | None) -> Iterator[str]:
        if self.length < 1:
            yield f"{self.recipe.name} has no step of its own; take more steps or fractions further apart"
            return
        try:
            window = self.recipe.window(self.length, self.end, axis)
        except ValueError as error:
            yield str(error)
            return
        first = window.patterns[0]
        if denser(first, self.outer):
            yield (
                f"{self.recipe.name} begins at {first}, denser than the {self.outer} reached before it; "
                "list sparser patterns by its option schedule"
            )
        elif self.recipe.decays_mask:
            yield from self._nesting_problems(window)

    def _nesting_problems(self, window: Window) -> Iterator[str]:
        """D > 0 blends Φ into Φ_outer, which has to hold it: N no larger, and whole outer blocks in a block."""
        for pattern in window.patterns:
            nested = pattern.n <= self.outer.n and pattern.m % self.outer.m == 0
            if not nested and not self.outer.is_dense:
                yield (
                    f"{self.recipe.name} decays from {self.outer} to {pattern}, whose masks are not nested "
                    f"(it takes N <= {self.outer.n} and M a multiple of {self.outer.m}); let the part before "
                    "end in such a pattern, or take a recipe without mask decay"
                )


def _problems(parts: tuple[Part, ...]) -> Iterator[str]:
    if not parts:
        yield "it has no part"
        return
    fractions = [part.until for part in parts]
    if not all(is_number(until) and 0.0 < until <= 1.0 for until in fractions):
        yield f"until={fractions}: fractions of the run, above 0, at most 1"
    elif fractions[-1] != 1.0 or not all(one < two for one, two in pairwise(fractions)):
        yield f"until={fractions}: they ascend, and the last one is 1.0"
    for number, part in enumerate(parts, 1):
        if part.recipe.mask != "fresh" or part.recipe.needs_gradients:
            yield f"part {number}: {part.recipe.name} keeps a mask of its own and cannot be a part"
        if part.recipe.freeze and number < len(parts):
            yield f"part {number}: freeze is for the fine-tune phase, which only the last part has"
    given = [part.pattern for part in parts if part.pattern is not None]
    for one, two in pairwise(given):
        if denser(two, one):
            yield f"the density rises from {one} to {two}"


def read_part(given: Any, as_recipe: Any) -> Part:
    """A part from (recipe, until), (recipe, until, pattern) or a mapping with these keys.

    `as_recipe` makes a recipe of a name or of what `to_dict` wrote. Raises `ValueError` or `TypeError` on
    anything else.
    """
    if isinstance(given, Part):
        return given
    if isinstance(given, Mapping):
        if not {"recipe", "until"} <= set(given) <= {"recipe", "until", "pattern"}:
            raise ValueError(f"a part has the keys recipe, until and pattern, not {', '.join(map(str, given))}")
        given = (given["recipe"], given["until"], given.get("pattern"))
    if not isinstance(given, (tuple, list)) or len(given) not in (2, 3):
        raise TypeError(f"a part is (recipe, until, pattern), not {given!r}")
    recipe, until, pattern = (*given, None)[:3]
    recipe = as_recipe(recipe)
    if not isinstance(recipe, PhasedRecipe):
        raise ValueError(f"{recipe.name} cannot be a part; a dense start is the option dense of the first part")
    return Part(recipe, until, None if pattern is None else Pattern.parse(pattern))
