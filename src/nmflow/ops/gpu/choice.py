"""Which product a compressed weight runs on a GPU: what was measured there at its size and tokens, else dense.

No rule stands in for a measurement: none of these kernels has been timed on enough GPUs to make one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from nmflow.ops import plan_file
from nmflow.ops.gpu.product import UNROLL, SharedTiling, Tiling, shared_tilings, tilings
from nmflow.ops.gpu.two_four import Algorithm

Cut: TypeAlias = Tiling | SharedTiling | Algorithm


class Key(NamedTuple):
    """What a choice depends on; tokens count by their power of two (`bucket`)."""

    device: str
    """Name of the GPU."""
    out_features: int
    in_features: int
    n: int
    m: int
    v: int
    dtype: str
    bucket: int
    graph: bool
    """Whether it is replayed in a CUDA graph, where launching costs nothing."""

    def line(self) -> str:
        """For people."""
        weight = f"{self.out_features}x{self.in_features} {self.n}:{self.m}{f'v{self.v}' if self.v > 1 else ''}"
        place = f"{self.device}{', in a CUDA graph' if self.graph else ''}"
        return f"{weight} {self.dtype}, up to {1 << self.bucket} tokens on {place}"


class Way(NamedTuple):
    """One way to multiply: a kernel and how it cuts the product."""

    kernel: Literal["dense", "gather", "shared", "2:4"]
    cut: Cut | None = None

    @property
    def by(self) -> str:
        """Who computes it, as the registry names its kernels."""
        return _BY[self.kernel]

    def line(self) -> str:
        """For people."""
        sizes = self.cut._asdict() if self.cut else {}
        return " ".join([self.kernel, *(f"{name}={size}" for name, size in sizes.items())])


DENSE = Way("dense")
_BY = {"dense": "dense", "gather": "triton", "shared": "triton", "2:4": "cusparselt"}

_FORMAT, _VERSION = "nmflow-gpu-plan", 2
_CUTS = {"gather": Tiling, "shared": SharedTiling, "2:4": Algorithm}


@dataclass
class Plan:
    """Choices that were measured on GPUs."""

    choices: dict[Key, Way] = field(default_factory=dict)
    seconds: dict[Key, dict[str, float]] = field(default_factory=dict)
    """What was measured to choose: the best time of each kernel that was right."""
    changes: int = field(default=0, compare=False)
    """Counts the calls of `note` and `adopt`: who remembers a choice sees by it that he must ask again."""

    def note(self, key: Key, medians: Mapping[Way, float]) -> None:
        """Choose the fastest of what was measured, seconds of a call, and keep why."""
        best: dict[str, float] = {}
        for way, taken in sorted(medians.items(), key=lambda item: item[1]):
            best.setdefault(way.kernel, taken)
        self.seconds[key] = best
        self.choices[key] = min(medians, key=lambda way: medians[way])
        self.changes += 1

    def adopt(self, other: Plan) -> None:
        """Take over the choices of another plan; where both have one, the other's."""
        self.choices.update(other.choices)
        self.seconds.update(other.seconds)
        self.changes += 1

    def part(self, keys: Iterable[Key]) -> Plan:
        """The choices for these keys alone."""
        keys = tuple(keys)
        return Plan({key: self.choices[key] for key in keys}, {key: self.seconds.get(key, {}) for key in keys})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan, whole or not at all."""
        rows = (
            {
                **key._asdict(),
                "kernel": way.kernel,
                "cut": way.cut and way.cut._asdict(),
                "seconds": self.seconds.get(key, {}),
            }
            for key, way in sorted(self.choices.items(), key=lambda item: item[0])
        )
        plan_file.write(path, plan_file.text_of(rows, _FORMAT, _VERSION))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read what `save` wrote. Raises `FileNotFoundError`, or `ValueError` where it is something else."""
        plan = cls()
        for row in plan_file.rows_of(Path(path).read_text(encoding="utf-8"), _FORMAT, _VERSION):
            key, way, seconds = _choice(row)
            plan.choices[key] = way
            plan.seconds[key] = seconds
        return plan

    def why_not(self, kernel: str, key: Key) -> str | None:
        """Why a kernel of the registry does not run; None where it was the fastest."""
        way = self.choices.get(key)
        if way is None:
            return "it has not been measured at this size on this GPU; nmflow.tune(model, example) does"
        if way.by == kernel:
            return None
        seconds = self.seconds.get(key, {})
        own = min((taken for name, taken in seconds.items() if _BY.get(name) == kernel), default=None)
        if own is None or way.kernel not in seconds:
            return f"{way.by} was chosen when it was measured"
        return f"{way.by} was faster when it was measured, {seconds[way.kernel] * 1e6:.3g} against {own * 1e6:.3g} us"

    def lines(self) -> list[str]:
        """For people: every choice, and what the others took."""
        found = []
        for key, way in sorted(self.choices.items(), key=lambda item: item[0]):
            times = sorted(self.seconds.get(key, {}).items(), key=lambda item: item[1])
            taken = ", ".join(f"{name} {seconds * 1e6:.3g} us" for name, seconds in times)
            found.append(f"{key.line()}: {way.line()}{f' ({taken})' if taken else ''}")
        return found


def _choice(row: Any) -> tuple[Key, Way, dict[str, float]]:
    try:
        key = Key(**{name: row[name] for name in Key._fields})
        kind: Any = _CUTS.get(row["kernel"])
        cut: Cut | None = kind(**row["cut"]) if row["kernel"] != "dense" else None
        seconds = {str(name): float(taken) for name, taken in row["seconds"].items()}
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"plan: the choice {row!r} lacks or misspells a field ({error})") from None
    if cut is not None and not _fits(cut):
        raise ValueError(f"plan: the choice {row!r} has tiles that no kernel takes")
    return key, Way(row["kernel"], cut), seconds


def _fits(cut: Cut) -> bool:
    """Tiles are powers of two; the slots of a program are whole turns of its loop."""
    if isinstance(cut, Algorithm):
        return type(cut.number) is int and cut.number >= 0
    if any(type(number) is not int or number < 1 for number in cut):
        return False
    tiles = cut._replace(slots=1) if isinstance(cut, Tiling) else cut
    turns = not isinstance(cut, Tiling) or cut.slots % UNROLL == 0
    return turns and all(number & (number - 1) == 0 for number in tiles)


def candidates(key: Key) -> list[Way]:
    """Sparse ways worth timing.

    Rows that choose for themselves gather, at many tokens where they keep few enough weights for it; rows that share
    their columns are multiplied together, or, at few tokens, as if they did not.

    >>> key = Key("a GPU", 4096, 1024, 1, 8, 64, "bfloat16", 11, False)
    >>> {way.kernel for way in candidates(key)}, {way.kernel for way in candidates(key._replace(v=1, bucket=0))}
    ({'shared'}, {'gather'})
    """
    tokens, slots = 1 << key.bucket, -(-key.in_features // key.m) * key.n
    found = [Way("shared", cut) for cut in shared_tilings(key.v, tokens)] if key.v >= _SHARED_FROM else []
    worth_it = key.v < _SHARED_FROM and _GATHERED * key.n <= key.m
    if worth_it or tokens <= _FEW:
        found += [Way("gather", cut) for cut in tilings(key.out_features, slots, tokens)]
    return found


_SHARED_FROM = 8
"""Rows that tensor cores, which take 16, are worth it for."""
_FEW = 64
"""Tokens below which tensor cores may be idle."""
_GATHERED = 8
"""Of so many weights one may be kept: every kept one reads its entries of x from shared memory, 33 TB/s on an H200, and
a quarter of the weights would take it longer than dense float32 takes, without TF32, at any number of tokens."""
