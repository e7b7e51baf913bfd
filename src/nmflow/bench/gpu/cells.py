"""One measurement on a GPU, or the place of one that is missing: times by contender, figures, goals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from nmflow.bench.cells import DENSE, OURS
from nmflow.bench.gpu.places import OF_COPY, OVER_ARGSORT, OVER_DENSE, SHARE, Goal, Place

COMPILED, TF32, BF16 = "F.linear, compiled", "F.linear, TF32", "F.linear, bfloat16"
TORCH_24, CSR = "torch 2:4", "cuSPARSE CSR"
COPY, ARGSORT = "copy", "argsort and scatter"
EAGER, NETWORK, MASKS = "dense, eager", "dense, compiled", "masks alone"
"""Contenders beside OURS, which is nmflow, and DENSE, which is F.linear in the same dtype."""
UNMEASURED = "unmeasured"


@dataclass(frozen=True)
class GpuCell:
    """A place with what was measured there; `us` is empty where nothing was."""

    place: Place
    us: Mapping[str, float] = field(default_factory=dict)
    """Microseconds of one call, by contender: medians."""
    way: str = ""
    """What the plan chose, with its tiles."""
    notes: tuple[str, ...] = ()
    """What failed or was left out, and why."""

    @property
    def figures(self) -> dict[str, float]:
        """What goals speak of."""
        us, ours = self.us, self.us.get(OURS)
        if ours is None:
            return {}
        if self.place.part == "masks":
            return {OF_COPY: us[COPY] / ours, OVER_ARGSORT: us[ARGSORT] / ours}
        if self.place.part == "train":
            return {SHARE: us[MASKS] / ours}
        dense = us.get(NETWORK if self.place.part == "network" else DENSE)
        return {} if dense is None else {OVER_DENSE: dense / ours}

    def verdicts(self) -> list[tuple[Goal, float | None]]:
        """Every goal with its figure, None where it was not measured."""
        return [(goal, self.figures.get(goal.figure)) for goal in self.place.goals]

    def line(self) -> str:
        """For people."""
        if not self.us:
            wanted = ", ".join(f"{_number(goal, goal.value)} {goal.figure}" for goal in self.place.goals)
            return "  ".join([f"{self.place.name}: {UNMEASURED}", *([f"goal {wanted}"] if wanted else []), *self.notes])
        ours = self.us.get(OURS)
        times = [f"{name} {taken:.4g} us{_over(taken, ours, name)}" for name, taken in self.us.items()]
        goals = [
            f"goal {_number(goal, goal.value)} {'yes' if found is not None and goal.reached(found) else 'NO'}"
            for goal, found in self.verdicts()
        ]
        figures = [f"{_number(name, found)} {name}" for name, found in self.figures.items()]
        return "  ".join([f"{self.place.name}:", *figures, *goals, *times, self.way, *self.notes]).rstrip()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**asdict(self), "figures": self.figures}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> GpuCell:
        """The inverse of `to_dict`, also by way of JSON."""
        place = {**found["place"], "goals": tuple(Goal(**goal) for goal in found["place"]["goals"])}
        return cls(Place(**place), found["us"], found["way"], tuple(found["notes"]))


def _over(taken: float, ours: float | None, name: str) -> str:
    return "" if ours is None or name == OURS else f" x{taken / ours:.2f}"


def _number(of: Goal | str, value: float) -> str:
    figure = of.figure if isinstance(of, Goal) else of
    return f"{value:.1%}" if figure in (OF_COPY, SHARE) else f"{value:.3g}"
