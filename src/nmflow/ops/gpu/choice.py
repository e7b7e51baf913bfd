"""Which product a compressed weight runs on a GPU: what was measured there at its size and tokens, else dense.

No rule stands in for a measurement: none of these kernels has been timed on enough GPUs to make one.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from nmflow.ops import plan_file
from nmflow.ops.gpu.product import UNROLL, SharedTiling, Tiling, shared_tilings, tilings


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

    def place(self) -> str:
        """Where it holds, for people."""
        return f"{self.device}{', in a CUDA graph' if self.graph else ''}"


class Way(NamedTuple):
    """One way to multiply: a kernel and how it cuts the product."""

    kernel: Literal["dense", "gather", "shared"]
    cut: Tiling | SharedTiling | None = None

    def line(self) -> str:
        """For people."""
        sizes = self.cut._asdict() if self.cut else {}
        return " ".join([self.kernel, *(f"{name}={size}" for name, size in sizes.items())])


DENSE = Way("dense")

_FORMAT, _VERSION = "nmflow-gpu-plan", 1
_CUTS = {"gather": Tiling, "shared": SharedTiling}


@dataclass
class Plan:
    """Choices that were measured on GPUs."""

    choices: dict[Key, Way] = field(default_factory=dict)

    def adopt(self, other: Plan) -> None:
        """Take over the choices of another plan; where both have one, the other's."""
        self.choices.update(other.choices)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan, whole or not at all."""
        rows = (
            {**key._asdict(), "kernel": way.kernel, "cut": way.cut and way.cut._asdict()}
            for key, way in sorted(self.choices.items(), key=lambda item: item[0])
        )
        plan_file.write(path, plan_file.text_of(rows, _FORMAT, _VERSION))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read what `save` wrote. Raises `FileNotFoundError`, or `ValueError` where it is something else."""
        return cls(dict(map(_choice, plan_file.rows_of(Path(path).read_text(encoding="utf-8"), _FORMAT, _VERSION))))

    def why_dense(self, key: Key) -> str | None:
        """Why the dense product runs; None where a sparse one was faster."""
        way = self.choices.get(key)
        if way is None:
            return "it has not been measured at this size on this GPU; nmflow.tune(model, example) does"
        return "the dense product was faster when it was measured" if way == DENSE else None


def _choice(row: Any) -> tuple[Key, Way]:
    try:
        key = Key(**{name: row[name] for name in Key._fields})
        kind: Any = _CUTS.get(row["kernel"])
        cut: Tiling | SharedTiling | None = kind(**row["cut"]) if row["kernel"] != "dense" else None
    except (TypeError, KeyError) as error:
        raise ValueError(f"plan: the choice {row!r} lacks or misspells a field ({error})") from None
    if cut is not None and not _fits(cut):
        raise ValueError(f"plan: the choice {row!r} has tiles that no kernel takes")
    return key, Way(row["kernel"], cut)


def _fits(cut: Tiling | SharedTiling) -> bool:
    """Tiles are powers of two; the slots of a program are whole turns of its loop."""
    if any(type(number) is not int or number < 1 for number in cut):
        return False
    tiles = cut._replace(slots=1) if isinstance(cut, Tiling) else cut
    turns = not isinstance(cut, Tiling) or cut.slots % UNROLL == 0
    return turns and all(number & (number - 1) == 0 for number in tiles)


def candidates(key: Key) -> list[Way]:
    """Sparse ways worth timing.

    Rows that choose for themselves gather; rows that share their columns are multiplied together, or, at few tokens,
    as if they did not.

    >>> key = Key("a GPU", 4096, 1024, 1, 8, 64, "bfloat16", 11, False)
    >>> {way.kernel for way in candidates(key)}, {way.kernel for way in candidates(key._replace(v=1, bucket=0))}
    ({'shared'}, {'gather'})
    """
    tokens, slots = 1 << key.bucket, -(-key.in_features // key.m) * key.n
    found = [Way("shared", cut) for cut in shared_tilings(key.v, tokens)] if key.v >= _SHARED_FROM else []
    if key.v < _SHARED_FROM or tokens <= _FEW:
        found += [Way("gather", cut) for cut in tilings(key.out_features, slots, tokens)]
    return found


_SHARED_FROM = 8
"""Rows that tensor cores, which take 16, are worth it for."""
_FEW = 64
"""Tokens below which tensor cores may be idle."""
