"""What speed is wanted, and whether it was reached. Goals stand for 2 threads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from nmflow.bench.cells import Cell, MaskCell
from nmflow.bench.settings import SHAPES
from nmflow.roles import GROUPS

THREADS = 2
"""With another number of threads nothing is wanted, only reported."""

_LINEAR: dict[str, dict[int, float]] = {
    pattern: dict(zip((1, 16, 196, 1576), goals, strict=True))
    for pattern, goals in {
        "2:4": (3.5, 2.3, 1.75, 1.6),
        "1:4": (5.5, 4.3, 3.2, 2.9),
        "1:8": (9.0, 7.5, 5.6, 5.3),
        "1:16": (12.0, 13.0, 10.0, 9.0),
        "1:32": (13.5, 18.0, 15.5, 14.5),
        "1:128": (12.0, 25.0, 34.0, 34.0),
    }.items()
}
_COLD = {"2:4": 5.0, "1:8": 13.0, "1:32": 30.0}
_BF16 = {"2:4": 1.3, "1:8": 4.9, "1:16": 8.5}

_MASKS = ("2:4", "1:8", "1:32", "1:128", "4:16", "16:128")
_OVER_ARGSORT = 20.0
_OF_COPY = {("2:4", (4096, 4096)): 0.8, ("1:8", (4096, 4096)): 0.8}

MASK_SHARE = 0.01
"""Of a training step of ViT-Base at batch 4, at most."""


@dataclass(frozen=True)
class ModelGoal:
    """A speed-up of a whole network at batch 1 where these roles, and no others, have this pattern."""

    model: str
    roles: frozenset[str]
    pattern: str
    speed_up: float


_FF, _ALL = frozenset({"ff"}), frozenset({"ff", "q", "k", "v", "o"})
_MODELS = (
    ModelGoal("timm:vit_base_patch16_224", _FF, "1:8", 1.85),
    ModelGoal("timm:vit_base_patch16_224", _FF, "1:32", 2.1),
    ModelGoal("timm:vit_large_patch16_224", _FF, "1:16", 2.1),
    ModelGoal("timm:vit_base_patch16_224", _ALL, "1:16", 3.0),
    ModelGoal("transformers:gpt2", _ALL, "1:8", 3.0),
)


@dataclass(frozen=True)
class Verdict:
    """One figure beside its goal; a goal of None is no goal."""

    name: str
    value: float
    goal: float | None
    at_most: bool = False
    """The goal is not to be exceeded, rather than to be reached."""

    @property
    def reached(self) -> bool | None:
        """None where nothing is wanted."""
        if self.goal is None:
            return None
        return self.value <= self.goal if self.at_most else self.value >= self.goal

    def line(self) -> str:
        """`name: value, goal ...`, for the list of what falls short."""
        if self.goal is None:
            return f"{self.name}: {self.value:.3g}"
        return f"{self.name}: {self.value:.3g}, goal {'at most' if self.at_most else 'at least'} {self.goal:g}"


def of_product(
    part: str, shape: tuple[int, int], dtype: str, pattern: str, tokens: int, threads: int
) -> float | None:
    """Speed-up over the dense layer that a product is to have on each of `SHAPES`; None: no goal."""
    if threads != THREADS or shape not in SHAPES:
        return None
    if part == "cold":
        return _COLD.get(pattern) if (dtype, tokens) == ("float32", 1) else None
    if dtype == "bfloat16":
        return _BF16.get(pattern) if tokens == 196 else None
    return _LINEAR.get(pattern, {}).get(tokens)


def of_masks(pattern: str, shape: tuple[int, int], dtype: str, threads: int) -> tuple[float | None, float | None]:
    """(times faster than argsort and scatter, part of copy speed) that the step W -> W~ is to reach."""
    if threads != THREADS or dtype != "float32":
        return None, None
    return _OVER_ARGSORT if pattern in _MASKS and shape == (768, 3072) else None, _OF_COPY.get((pattern, shape))


def of_model(name: str, targets: Mapping[str, str], batch: int, threads: int) -> float | None:
    """Speed-up that a network with these targets is to have."""
    roles = {role: pattern for rule, pattern in targets.items() for role in GROUPS.get(rule, (rule,))}
    patterns = set(roles.values())
    if threads != THREADS or batch != 1 or len(patterns) != 1:
        return None
    known = {(goal.model, goal.roles, goal.pattern): goal.speed_up for goal in _MODELS}
    return known.get((name, frozenset(roles), patterns.pop()))


def of_mask_share(name: str, batch: int, threads: int) -> float | None:
    """Part of a training step that the masks may take."""
    wanted = (name, batch, threads) == ("timm:vit_base_patch16_224", 4, THREADS)
    return MASK_SHARE if wanted else None


def worst(cells: Iterable[Cell]) -> list[Cell]:
    """Of every part, dtype, pattern and token count the cell of the shape that gains least, in order of appearance."""
    least: dict[tuple[str, str, str, int], Cell] = {}
    for cell in cells:
        known = least.get(cell.place)
        if known is None or cell.over_dense < known.over_dense:
            least[cell.place] = cell
    return list(least.values())


def verdicts(cells: Sequence[Cell], masks: Sequence[MaskCell]) -> list[Verdict]:
    """A verdict on every worst cell, and on every mask cell for each of its two goals that it has."""
    found = [
        Verdict(
            f"{cell.part} {cell.dtype} {cell.pattern}, {cell.tokens} token{'s' * (cell.tokens > 1)}, "
            f"worst shape {cell.shape[0]}x{cell.shape[1]}, times F.linear",
            cell.over_dense,
            cell.goal,
        )
        for cell in worst(cells)
    ]
    for mask in masks:
        name = f"masks {mask.dtype} {mask.pattern}, {mask.shape[0]}x{mask.shape[1]}"
        found.append(Verdict(f"{name}, times argsort and scatter", mask.over_argsort, mask.goal_over_argsort))
        if mask.goal_of_copy is not None:
            found.append(Verdict(f"{name}, part of copy speed", mask.of_copy, mask.goal_of_copy))
    return found


def short(found: Iterable[Verdict]) -> list[str]:
    """For people: what falls short, by name, or that nothing does."""
    found = [verdict for verdict in found if verdict.goal is not None]
    missed = [verdict for verdict in found if verdict.reached is False]
    if not found:
        return ["no goals stand for these settings"]
    if not missed:
        return [f"every goal is reached ({len(found)})"]
    return [f"short of its goal, {len(missed)} of {len(found)}:", *(f"  {verdict.line()}" for verdict in missed)]


def disturbed(rounds: int) -> list[str]:
    """For people: how many rounds other work on the machine got into; nothing where there were none."""
    if not rounds:
        return []
    return [f"other work took a core in {rounds} of the rounds that count; a quiet machine gives better figures"]
