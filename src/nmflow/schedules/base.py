"""What a recipe is, and the one template that the recipes of the table fill in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from nmflow.pattern import Pattern
from nmflow.schedules.checks import group_problems, is_number, on_the_way, step_in_run, whole
from nmflow.schedules.custom import Schedule, read_schedule
from nmflow.schedules.stage import PRUNED_GRADIENTS, MaskRule, PrunedGradient, Stage
from nmflow.schedules.window import Window, equal_starts, step_of


class Recipe(ABC):
    """The sparsity of one parameter as a pure function of (step, total steps, target): no state, no tensors."""

    name: ClassVar[str]
    mask: ClassVar[MaskRule] = "fresh"
    needs_gradients: ClassVar[bool] = False
    """True where gradients choose the mask, so that `Sparsifier.calibrate` has to run first."""

    @property
    def label(self) -> str:
        """What to call it in a heading."""
        return self.name

    @abstractmethod
    def at(self, step: int, total_steps: int, target: Pattern | str, axis: int | None = None) -> Stage:
        """The stage that rules the forward of `step` = 0 ... T-1; `step` = T gives the final state.

        `target` is the pattern to end in, `axis` the length of the reduction axis (None: not known, taken as
        long enough; only sdgf-geometric asks). Raises `ValueError`, at every step alike, where T is too short
        for the stages or the options do not fit the target, and where `step` lies outside 0 ... T;
        `TypeError` where a step is not a whole number.
        """

    @abstractmethod
    def changes(self, total_steps: int, target: Pattern | str, axis: int | None = None) -> tuple[int, ...]:
        """Steps of [0, T) at which phase or pattern may change, ascending from 0. Raises as `at` does."""

    def notes(self, target: Pattern | str, axis: int | None = None) -> tuple[str, ...]:
        """What a reader of the plan should know besides its stages."""
        return ()

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """{"name": ..., every option} in JSON's types; `from_dict` makes an equal recipe of it."""

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Recipe:
        """The recipe that `to_dict` wrote. Raises `ValueError` on an unknown name or option."""
        from nmflow.schedules.registry import from_dict  # the registry imports every recipe, hence this file

        return from_dict(data)


@dataclass(frozen=True, kw_only=True)
class PhasedRecipe(Recipe):
    """The template: three phases, patterns in equal intervals of the decay phase, a decay factor D(j).

        dense      [0, d)   Φ = 1,           D = 1           d = ⌊dense·T + 0.5⌋
        decay      [d, e)   Φ of pattern p,  D = decay_at    e = ⌊decay_end·T + 0.5⌋
        fine-tune  [e, T]   Φ of the target, D = 0
                            p = ⌊j·S/(e - d)⌋,  j = step - d,  S patterns, the last of which is the target

    A recipe of the table says its `patterns` (structure decay) or its `decay_at` (mask decay), nothing else.
    Raises `ValueError` with every option that is out of range. Source: docs/method.md, sections 2 and 4; Bambhaniya et
    al. 2025, section 3.
    """

    default_dense: ClassVar[float] = 0.05
    default_decay_end: ClassVar[float | None] = 0.70
    """None: no decay phase, fine-tune begins at d."""
    decays_mask: ClassVar[bool] = False

    dense: float | None = None
    """Fraction of the run without sparsity. Not given, it is the recipe's default; with `schedule`, None."""
    decay_end: float | None = None
    """Fraction of the run at which the target and D = 0 are reached. Not given, it is the recipe's default;
    None where the decay phase ends as the last pattern begins."""
    pruned_gradient: PrunedGradient = "straight-through"
    freeze: bool = False
    """Keep the mask that fine-tune begins with; otherwise it is taken from W after every step, to the end."""
    schedule: Schedule | None = None
    """Patterns by fraction of the run, pairs or a mapping, in place of `dense` and of the recipe's own
    patterns; the last one has to be the target (whose V all of them have), and without mask decay its start ends the
    decay phase."""

    def __post_init__(self) -> None:
        problems = self._settle_schedule()
        if not problems:
            problems = self._settle_window()
        problems += [*gradient_problems(self.pruned_gradient), *self.problems()]
        if problems:
            raise ValueError(f"recipe {self.name}: {'; '.join(problems)}")

    # What a recipe of the table may say of its own

    def patterns(self, target: Pattern, axis: int | None) -> tuple[Pattern, ...]:
        """The patterns of Φ in order, the last one the target."""
        return (target,)

    def decay_at(self, j: int, length: int) -> float:
        """D(j) at step j of `length` = e - d decay steps, in [0, 1]."""
        return 0.0

    @property
    def lambda_(self) -> float:
        """λ of SR-STE's term, 0 for none."""
        return 0.0

    def problems(self) -> list[str]:
        """What is wrong with the options of its own."""
        return []

    # What the template makes of it

    @property
    def first(self) -> float:
        """Fraction of the run at which sparsity begins."""
        if self.schedule is not None:
            return self.schedule[0][0]
        return self.default_dense if self.dense is None else self.dense

    def at(self, step: int, total_steps: int, target: Pattern | str, axis: int | None = None) -> Stage:
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
            mask="frozen" if self.freeze and phase == "fine-tune" else self.mask,
        )

    def changes(self, total_steps: int, target: Pattern | str, axis: int | None = None) -> tuple[int, ...]:
        window = self.window(total_steps, target, axis)
        return tuple(sorted({0, window.e, *window.starts} - {total_steps}))

    def window(self, total_steps: int, target: Pattern | str, axis: int | None = None) -> Window:
        """Where the phases and patterns of a run begin. Raises as `at` does."""
        total_steps = whole(total_steps, "total_steps", least=1)
        target = Pattern.parse(target)
        if axis is not None:
            axis = whole(axis, "axis", least=1)
        if self.schedule is not None:
            return self._scheduled_window(self.schedule, total_steps, target)
        patterns = self.patterns(target, axis)
        d = step_of(self.first, total_steps)
        if self.decay_end is None:
            return Window((d,), d, patterns)
        e = step_of(self.decay_end, total_steps)
        if e - d < len(patterns):
            raise ValueError(
                f"recipe {self.name}: total_steps={total_steps} is too short: the decay phase [{d}, {e}) of "
                f"dense={self.first:g}, decay_end={self.decay_end:g} needs a step for each of its "
                f"{len(patterns)} patterns ({', '.join(map(str, patterns))}); take more steps, a smaller dense "
                "or a later decay_end"
            )
        return Window(equal_starts(d, e, len(patterns)), e, patterns)

    def to_dict(self) -> dict[str, Any]:
        options = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.schedule is not None:
            options["schedule"] = [[fraction, str(pattern)] for fraction, pattern in self.schedule]
        return {"name": self.name, **options}

    def _scheduled_window(self, schedule: Schedule, total_steps: int, target: Pattern) -> Window:
        starts = tuple(step_of(fraction, total_steps) for fraction, _ in schedule)
        patterns = tuple(on_the_way(pattern, target) for _, pattern in schedule)
        e = starts[-1] if self.decay_end is None else step_of(self.decay_end, total_steps)
        problems = group_problems(patterns, target)
        if patterns[-1] != target:
            problems.append(f"the schedule ends in {patterns[-1]}, the target is {target}; make them the same")
        if len(set(starts)) < len(starts) or (self.decays_mask and e == starts[0]):
            problems.append(
                f"total_steps={total_steps} is too short: the schedule's entries begin at steps "
                f"{', '.join(map(str, starts))} and the decay phase ends at {e}; take more steps or fractions "
                "further apart"
            )
        if problems:
            raise ValueError(f"recipe {self.name}: {'; '.join(problems)}")
        return Window(starts, e, patterns)

    def _settle_schedule(self) -> list[str]:
        """Put the schedule into its one form; what is wrong with it."""
        if self.schedule is None:
            return []
        try:
            schedule = read_schedule(self.schedule)
        except (TypeError, ValueError) as error:
            return [f"schedule: {error}"]
        object.__setattr__(self, "schedule", schedule)
        if self.mask == "frozen" and len(schedule) > 1:
            return ["schedule: the mask is taken once and kept, so there can be only one entry"]
        return []

    def _settle_window(self) -> list[str]:
        """Put the defaults into `dense` and `decay_end`; what is wrong with the given ones."""
        problems = [
            f"{name}={value!r}: a fraction of the run, 0 to 1"
            for name, value in (("dense", self.dense), ("decay_end", self.decay_end))
            if value is not None and not (is_number(value) and 0.0 <= value <= 1.0)
        ]
        default_end = self.default_decay_end
        if default_end is None and self.decay_end is not None:
            problems.append("there is no decay phase; leave decay_end out")
        elif self.schedule is not None and not self.decays_mask:
            if self.decay_end is not None:
                problems.append("the last entry of schedule ends the decay phase; leave decay_end out")
            default_end = None
        if self.schedule is not None and self.dense is not None:
            problems.append("the run is dense up to the first entry of schedule; leave dense out")
        if problems:
            return problems
        if self.schedule is None:
            object.__setattr__(self, "dense", self.first)
        end = default_end if self.decay_end is None else self.decay_end
        object.__setattr__(self, "decay_end", end)
        if end is not None and self.first >= end:
            return [f"sparsity begins at {self.first:g} of the run, so decay_end={end:g} leaves no decay phase"]
        if end is not None and self.schedule is not None and self.schedule[-1][0] > end:
            return [f"the last entry of schedule, at {self.schedule[-1][0]:g}, lies after decay_end={end:g}"]
        return []


def gradient_problems(pruned_gradient: object) -> list[str]:
    """What is wrong with a `pruned_gradient`."""
    if pruned_gradient in PRUNED_GRADIENTS:
        return []
    return [f"pruned_gradient={pruned_gradient!r}: one of {', '.join(PRUNED_GRADIENTS)}"]
