"""What a recipe is, and the one template that all recipes of the table fill in."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any, ClassVar

from nmflow.pattern import Pattern
from nmflow.schedules.stage import PRUNED_GRADIENTS, MaskRule, PrunedGradient, Stage
from nmflow.schedules.window import Window, equal_starts, step_of, whole

Schedule = tuple[tuple[float, Pattern], ...]
"""Patterns by fraction of the run: ((0.05, 4:8), (0.4, 1:8))."""


class Recipe(ABC):
    """The sparsity of one parameter as a pure function of (step, total steps, target): no state, no tensors."""

    name: ClassVar[str]
    mask: ClassVar[MaskRule] = "fresh"
    needs_gradients: ClassVar[bool] = False
    """True where the mask is chosen by gradients, so that `Sparsifier.calibrate` has to run first."""

    @abstractmethod
    def at(
        self, step: int, total_steps: int, target: Pattern | str, axis: int | None = None
    ) -> Stage:
        """The stage that rules the forward of `step` = 0 ... T-1; `step` = T gives the final state.

        `target` is the pattern to end in, `axis` the length of the reduction axis (None: not known, taken as
        long enough; only sdgf-geometric asks). Raises `ValueError`, at every step alike, where `step` lies
        outside 0 ... T, where T is too short for the stages, or where the options do not fit the target;
        `TypeError` where a step is not a whole number.
        """

    @abstractmethod
    def changes(self, total_steps: int, target: Pattern | str, axis: int | None = None) -> tuple[int, ...]:
        """Steps of [0, T) at which phase or pattern may change, ascending, 0 included."""

    def notes(self, target: Pattern | str, axis: int | None = None) -> tuple[str, ...]:
        """What a reader of the plan should know besides its stages."""
        return ()

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """{"name": ..., every option}, made of what JSON knows; `from_dict` gives an equal recipe back."""

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Recipe:
        """The recipe that `to_dict` wrote. Raises `ValueError` on an unknown name or option."""
        from nmflow.schedules.registry import from_dict

        return from_dict(data)


@dataclass(frozen=True, kw_only=True)
class PhasedRecipe(Recipe):
    """The template: three phases, patterns in equal intervals of the decay phase, and a decay factor D(j).

        dense      [0, d)   Φ = 1,           D = 1              d = ⌊dense·T + 0.5⌋
        decay      [d, e)   Φ of pattern p,  D = decay_at(j)    e = ⌊decay_end·T + 0.5⌋
        fine-tune  [e, T]   Φ of the target, D = 0
                            p = ⌊j·S/(e - d)⌋,  j = step - d,  S patterns, the last of which is the target

    A recipe of the table says its `patterns` (structure decay) or its `decay_at` (mask decay), nothing else.
    Raises `ValueError` with every option that is out of range. Source: spec, sections 2 and 4; Bambhaniya et
    al. 2025, section 3.
    """

    default_dense: ClassVar[float] = 0.05
    default_decay_end: ClassVar[float | None] = 0.70
    """None: no decay phase, fine-tune begins at d."""
    decays_mask: ClassVar[bool] = False

    dense: float | None = None
    """Fraction of the run without sparsity; None: the recipe's default, or what `schedule` says."""
    decay_end: float | None = None
    """Fraction of the run at which the target and D = 0 are reached; None as above."""
    pruned_gradient: PrunedGradient = "straight-through"
    schedule: Schedule | None = None
    """Patterns by fraction of the run, instead of `dense` and of the recipe's own patterns. Given as pairs
    or as a mapping. The last one has to be the target; without mask decay it also ends the decay phase."""

    def __post_init__(self) -> None:
        problems = self._settle_schedule() + self._settle_window() + self.problems()
        if problems:
            raise ValueError(f"recipe {self.name}: {'; '.join(problems)}")

    def patterns(self, target: Pattern, axis: int | None) -> tuple[Pattern, ...]:
        """The patterns of Φ in order, the last one the target."""
        return (target,)

    def decay_at(self, j: int, length: int) -> float:
        """D(j) at step j of `length` = e - d decay steps, in [0, 1]."""
        return 0.0

    @property
    def lambda_(self) -> float:
        """λ of SR-STE's term."""
        return 0.0

    def problems(self) -> list[str]:
        """What is wrong with the options that the template does not know."""
        return []

    def at(
        self, step: int, total_steps: int, target: Pattern | str, axis: int | None = None
    ) -> Stage:
        total_steps = whole(total_steps, "total_steps", least=1)
        step = step_in_run(step, total_steps)
        window = self.window(total_steps, target, axis)
        phase = window.phase_at(step)
        decay = 1.0 if phase == "dense" else 0.0
        if phase == "decay":
            decay = self.decay_at(step - window.d, window.e - window.d)
        return Stage(
            pattern=window.pattern_at(step),
            decay=decay,
            phase=phase,
            pruned_gradient=self.pruned_gradient,
            sr_ste=self.lambda_,
            mask=self.mask,
        )

    def changes(self, total_steps: int, target: Pattern | str, axis: int | None = None) -> tuple[int, ...]:
        window = self.window(whole(total_steps, "total_steps", least=1), target, axis)
        return tuple(sorted({0, window.d, window.e, *window.starts} - {total_steps}))

    def window(self, total_steps: int, target: Pattern | str, axis: int | None) -> Window:
        """The steps of a run of this length. Raises `ValueError` as `at` does."""
        target = Pattern.parse(target)
        if axis is not None:
            axis = whole(axis, "axis", least=1)
        if self.schedule is not None:
            return self._scheduled_window(self.schedule, total_steps, target)
        assert self.dense is not None  # settled in __post_init__
        patterns = self.patterns(target, axis)
        d = step_of(self.dense, total_steps)
        if self.decay_end is None:
            return Window(d, d, (d,), patterns)
        e = step_of(self.decay_end, total_steps)
        if e - d < len(patterns):
            raise ValueError(
                f"recipe {self.name}: total_steps={total_steps} is too short: the decay phase is steps {d} to "
                f"{e} (dense={self.dense:g}, decay_end={self.decay_end:g}) and has {len(patterns)} stage(s), "
                f"{', '.join(map(str, patterns))}, of at least one step each; take more steps, a smaller dense "
                "or a later decay_end"
            )
        return Window(d, e, equal_starts(d, e, len(patterns)), patterns)

    def to_dict(self) -> dict[str, Any]:
        options = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.schedule is not None:
            options["schedule"] = [[fraction, str(pattern)] for fraction, pattern in self.schedule]
        return {"name": self.name, **options}

    def _scheduled_window(self, schedule: Schedule, total_steps: int, target: Pattern) -> Window:
        starts = tuple(step_of(fraction, total_steps) for fraction, _ in schedule)
        patterns = tuple(pattern for _, pattern in schedule)
        problems = []
        if patterns[-1] != target:
            problems.append(f"the schedule ends in {patterns[-1]}, the target is {target}; make them the same")
        for (one, _), (two, _), start, following in zip(schedule, schedule[1:], starts, starts[1:]):
            if start == following:
                problems.append(
                    f"the schedule's entries at {one:g} and {two:g} both fall on step {start} of "
                    f"total_steps={total_steps}; take more steps or fractions further apart"
                )
        e = starts[-1]
        if self.decays_mask:
            assert self.decay_end is not None  # settled in __post_init__
            e = step_of(self.decay_end, total_steps)
            if e == starts[0]:
                problems.append(
                    f"total_steps={total_steps} is too short: the schedule begins and decay_end="
                    f"{self.decay_end:g} ends at step {e}; take more steps or a later decay_end"
                )
        if problems:
            raise ValueError(f"recipe {self.name}: {'; '.join(problems)}")
        return Window(starts[0], e, starts, patterns)

    def _settle_schedule(self) -> list[str]:
        """Put `schedule` into its one form; what is wrong with it."""
        if self.schedule is None:
            return []
        try:
            schedule = read_schedule(self.schedule)
        except (TypeError, ValueError) as error:
            return [f"schedule: {error}"]
        object.__setattr__(self, "schedule", schedule)
        if self.mask == "frozen" and len(schedule) > 1:
            return ["schedule: the mask is chosen once and kept, so there can be only one entry"]
        return []

    def _settle_window(self) -> list[str]:
        """Fill in the default fractions; what is wrong with the given ones."""
        problems = []
        for name in ("dense", "decay_end"):
            value = getattr(self, name)
            if value is not None and not (is_number(value) and 0.0 <= value <= 1.0):
                return [f"{name}={value!r}: a fraction of the run, 0 to 1"]
        ends_itself = self.schedule is not None and not self.decays_mask
        if self.schedule is not None and self.dense is not None:
            problems.append("dense and schedule exclude each other: the run is dense up to the first entry")
        if self.decay_end is not None and self.default_decay_end is None:
            problems.append("there is no decay phase, so leave decay_end out")
        elif self.decay_end is not None and ends_itself:
            problems.append("decay_end and schedule exclude each other: the decay phase ends at the last entry")
        if problems:
            return problems
        if self.schedule is None and self.dense is None:
            object.__setattr__(self, "dense", self.default_dense)
        if self.decay_end is None and not ends_itself:
            object.__setattr__(self, "decay_end", self.default_decay_end)
        return self._check_order()

    def _check_order(self) -> list[str]:
        if self.decay_end is None:
            return []
        if self.dense is not None and self.dense >= self.decay_end:
            return [f"dense={self.dense:g} leaves nothing of the run before decay_end={self.decay_end:g}"]
        if isinstance(self.schedule, tuple) and self.schedule[-1][0] > self.decay_end:
            return [
                f"the schedule's last entry is at {self.schedule[-1][0]:g}, after decay_end={self.decay_end:g}"
            ]
        return []


def read_schedule(given: Mapping[float, Any] | Iterable[Any]) -> Schedule:
    """Pairs or a mapping of (fraction of the run, pattern) as a `Schedule`.

    Raises `ValueError` where fractions do not ascend within 0 ... 1 or a density rises, `TypeError` where
    the entries are no such pairs.

    >>> read_schedule({0.05: "4:8", 0.4: "1:8"})
    ((0.05, Pattern(n=4, m=8)), (0.4, Pattern(n=1, m=8)))
    """
    pairs = list(given.items()) if isinstance(given, Mapping) else given
    if isinstance(pairs, str) or not isinstance(pairs, Iterable):
        raise TypeError(f"pairs of (fraction of the run, pattern), not {given!r}")
    schedule = []
    for entry in pairs:
        if isinstance(entry, str) or not isinstance(entry, Iterable):
            raise TypeError(f"a pair of (fraction of the run, pattern), not {entry!r}")
        pair = tuple(entry)
        if len(pair) != 2 or not is_number(pair[0]):
            raise TypeError(f"a pair of (fraction of the run, pattern), not {entry!r}")
        schedule.append((float(pair[0]), Pattern.parse(pair[1])))
    if not schedule:
        raise ValueError("it has no entry")
    problems = [f"{fraction:g} lies outside 0 to 1" for fraction, _ in schedule if not 0.0 <= fraction <= 1.0]
    for (one, first), (two, second) in zip(schedule, schedule[1:]):
        if not one < two:
            problems.append(f"the fractions do not ascend: {one:g}, {two:g}")
        if denser(second, first):
            problems.append(f"the density rises from {first} at {one:g} to {second} at {two:g}")
    if problems:
        raise ValueError("; ".join(problems))
    return tuple(schedule)


def denser(one: Pattern, two: Pattern) -> bool:
    """True where `one` keeps a larger part than `two`, exactly."""
    return Fraction(one.n, one.m) > Fraction(two.n, two.m)


def is_number(value: object) -> bool:
    """True for a finite int or float; a bool is no number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def step_in_run(step: object, total_steps: int) -> int:
    """`step` as an int in 0 ... T."""
    number = whole(step, "step", least=0)
    if number > total_steps:
        raise ValueError(f"step={number} lies beyond total_steps={total_steps}")
    return number


def gradient_problems(pruned_gradient: object) -> list[str]:
    """What is wrong with a `pruned_gradient`."""
    if pruned_gradient in PRUNED_GRADIENTS:
        return []
    return [f"pruned_gradient={pruned_gradient!r}: one of {', '.join(PRUNED_GRADIENTS)}"]
