"""Which native algorithm and which tiles: a rule that is good everywhere, and measured choices that may replace it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from nmflow.ops import plan_file

Algorithm = Literal["tb", "rv", "dense"]
Split = Literal["rows", "tokens"]

PLAN_VERSION = 2
FORMAT = "nmflow-native-plan"


class Key(NamedTuple):
    """What a choice of tiles depends on; tokens count by their power of two (`bucket`)."""

    out_features: int
    in_features: int
    n: int
    m: int
    dtype: str
    bucket: int
    threads: int

    def line(self) -> str:
        """For people."""
        weight = f"{self.out_features}x{self.in_features} {self.n}:{self.m} {self.dtype}"
        return f"{weight}, up to {1 << self.bucket} tokens on {self.threads} threads"


@dataclass(frozen=True)
class Tiling:
    """How one product is cut; the fields mean what `native/nmflow.h` says of them."""

    algorithm: Algorithm
    chunk: int
    """TB: columns of one K-block, a multiple of m. RV: 0, as many as a vector reaches; m for few, in fewer bytes.
    Dense: 0."""
    tile_tokens: int
    tile_rows: int
    split: Split = "rows"

    def __post_init__(self) -> None:
        if self.algorithm not in get_args(Algorithm) or self.split not in get_args(Split):
            raise ValueError(f"a tiling is {get_args(Algorithm)} by {get_args(Split)}, not {self}")
        for value in (self.chunk, self.tile_tokens, self.tile_rows):
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"a tiling takes whole numbers, none below 0, not {self}")

    def line(self) -> str:
        """For people."""
        tile = f"{self.chunk} {self.tile_tokens}x{self.tile_rows} {self.split}"
        return self.algorithm if self == DENSE else f"{self.algorithm} {tile}"


DENSE = Tiling("dense", 0, 1, 1)
"""The choice of the dense product: it was faster, or is expected to be."""


@dataclass
class NativePlan:
    """Tilings that were measured, by `Key`; JSON keeps them between runs.

    >>> plan = NativePlan()
    >>> plan.choices[Key(8, 8, 1, 4, "float32", 0, 1)] = Tiling("rv", 0, 1, 4)
    >>> NativePlan.from_json(plan.to_json()) == plan
    True
    """

    choices: dict[Key, Tiling] = field(default_factory=dict)
    changes: int = field(default=0, compare=False)
    """Counts the calls of `choose` and `adopt`: who remembers a choice sees by it that he must ask again."""

    def choose(self, key: Key, tiling: Tiling) -> None:
        """Set the choice for one key."""
        self.adopt(NativePlan({key: tiling}))

    def adopt(self, other: NativePlan) -> None:
        """Take over the choices of another plan; where both have one, the other's."""
        self.choices.update(other.choices)
        self.changes += 1

    def lines(self) -> list[str]:
        """For people: every choice."""
        return [f"{key.line()}: {tiling.line()}" for key, tiling in sorted(self.choices.items())]

    def part(self, keys: Iterable[Key]) -> NativePlan:
        """The choices for these keys alone."""
        return NativePlan({key: self.choices[key] for key in keys})

    def to_json(self) -> str:
        """The plan as text; `from_json` gives it back."""
        rows = ({**key._asdict(), **asdict(tiling)} for key, tiling in sorted(self.choices.items()))
        return plan_file.text_of(rows, FORMAT, PLAN_VERSION)

    @classmethod
    def from_json(cls, text: str) -> NativePlan:
        """Read `to_json`'s text. Raises `ValueError` on anything else."""
        return cls(dict(_choice(row) for row in plan_file.rows_of(text, FORMAT, PLAN_VERSION)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan, whole or not at all."""
        plan_file.write(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> NativePlan:
        """Read what `save` wrote. Raises `FileNotFoundError`, or `ValueError` as `from_json` does."""
        return cls.from_json(Path(path).read_text(encoding="utf-8"))


def _choice(row: Any) -> tuple[Key, Tiling]:
    try:
        tiling = Tiling(**{name: row[name] for name in Tiling.__dataclass_fields__})
        key = Key(**{name: row[name] for name in Key._fields})
    except (TypeError, KeyError) as error:
        raise ValueError(f"plan: the choice {row!r} lacks or misspells a field ({error})") from None
    numbers = key._replace(dtype=0)  # type: ignore[arg-type]  # the one field that is none
    if not isinstance(key.dtype, str) or any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError(f"plan: the choice {row!r} is for no weight: sizes are whole numbers, dtype a name")
    tiles = (tiling.tile_tokens, tiling.tile_rows)
    widest = 65536 if tiling.algorithm == "tb" else key.m
    fits = key.m >= 1 and tiling.chunk % key.m == 0 and tiling.chunk <= widest
    if not fits or not all(1 <= tile < 1 << 31 for tile in tiles) or (tiling.algorithm == "tb" and not tiling.chunk):
        raise ValueError(f"plan: the choice {row!r} has tiles that fit no weight")
    return key, tiling


def bucket(tokens: int) -> int:
    """Token counts that share a choice: ⌈log2 tokens⌉; 1, 2, 3-4, 5-8, 9-16, ...

    >>> [bucket(tokens) for tokens in (1, 2, 3, 4, 5, 16, 196, 1576)]
    [0, 1, 2, 2, 3, 4, 8, 11]
    """
    return (tokens - 1).bit_length()


def expect_dense(key: Key, isa: str) -> bool:
    """Whether torch's dense product is expected to be faster, for a weight that was not measured.

    Dense arithmetic runs at 70 to 95 % of the machine's peak, sparse at 40 to 75 % of it on `density` of the work;
    at few tokens both wait for the weight. Portable vectors are too narrow to win.
    """
    if isa == "portable":
        return True
    density, few = key.n / key.m, key.bucket <= 4
    if key.dtype == "bfloat16":
        return density > (0.75 if few else 0.65)
    return not few and density > 0.7


_RV_REACH = 32
"""Widest block for RV in float32 at more than 8 tokens: two registers; further ones take a permutation more each."""


_X_OVER_WEIGHT = 4
"""Numbers in x for each kept weight above which RV shares out tokens: up to 20 % faster, below it 15 % slower."""


def default_tiling(key: Key, rv_reach: int) -> Tiling:
    """The tiling of a weight that was not measured; `rv_reach`: the widest block that RV permutes, 0 for no RV.

    RV needs no transposition of x, and in bfloat16 it multiplies two numbers a lane, where TB computes in float32. TB
    takes blocks that RV would have to gather. A few tokens wait for the weight, which RV then reads in its own order.
    In RV threads share out rows, so that each reads its part of the weight and all of x, but tokens where x is the
    larger by far; in TB tokens where there are enough: each transposes its own.
    """
    tokens = 1 << key.bucket
    enough_tokens = tokens >= 64 * key.threads
    far_larger_x = tokens * key.m > _X_OVER_WEIGHT * key.out_features * key.n
    if key.m <= rv_reach and tokens <= _in_order(key):
        return Tiling("rv", key.m if tokens <= 4 and _has_shorter(key, rv_reach) else 0, 8, 1)
    if rv_reach and tokens == 1:
        return Tiling("rv", 0, 1, 4)
    widest = rv_reach if key.dtype == "bfloat16" or tokens <= 8 else min(rv_reach, _RV_REACH)
    if key.m <= widest:
        return Tiling("rv", 0, 5, 4, "tokens" if enough_tokens and far_larger_x else "rows")
    return tb_tiling(key.n, key.m, key.in_features, tokens, "tokens" if enough_tokens else "rows")


def _in_order(key: Key) -> int:
    """The most tokens for which the weight is best read in the order of memory, in two places (RV with one vector of
    rows a tile), from wherever it comes; further ones are worth tiles, the sooner the less of a weight is left."""
    return 16 if key.m <= 16 * key.n else 4 if key.m <= 32 * key.n else 1


def _has_shorter(key: Key, rv_reach: int) -> bool:
    """Whether there is a form of fewer bytes; where there is not, few tokens take that of many, packed for both."""
    return key.dtype == "float32" and key.m <= min(8, rv_reach // 2)


def tb_tiling(n: int, m: int, in_features: int, tokens: int, split: Split) -> Tiling:
    """TB's default: a K-block of x fills most of L1 (28 KiB), wider in columns the fewer of them a row keeps."""
    sparse = m // n
    columns, width = (64, 112) if sparse <= 4 else (128, 64) if sparse <= 8 else (256, 48)
    if sparse > 32:
        columns, width = 1024, 32
    chunk = max(1, columns // m) * m
    return Tiling("tb", min(chunk, -(-in_features // m) * m) or m, min(width, tokens), 256, split)


def candidates(key: Key, rv_reach: int) -> list[Tiling]:
    """Tilings worth timing for one weight, the default first."""
    tokens = 1 << key.bucket
    found = [default_tiling(key, rv_reach)]
    if key.m <= rv_reach and tokens <= min(4, _in_order(key)):
        return found  # from memory, which counts there, nothing else is faster; tuning finds a weight in the caches
    if rv_reach and tokens > 1 and key.m <= max(rv_reach, 32 if tokens <= 16 else 0):
        if key.m <= rv_reach and tokens <= 64:
            found += [Tiling("rv", chunk, 8, 1) for chunk in ((0, key.m) if _has_shorter(key, rv_reach) else (0,))]
        splits: tuple[Split, ...] = ("rows", "tokens") if tokens >= 64 else ("rows",)
        found += [Tiling("rv", 0, each, rows, split) for rows, each in ((4, 5), (2, 8)) for split in splits]
    if tokens >= 8:
        whole = max(1, -(-key.in_features // key.m)) * key.m
        if whole <= 65536:
            found += [Tiling("tb", whole, 8, 8, split) for split in ("rows", "tokens")]
        for columns in (32, 64, 128, 256, 512, key.in_features):
            chunk = max(1, columns // key.m) * key.m
            for width in (16, 32, 48, 64, 80, 112, 128):
                kib = chunk * min(width, tokens) // 256
                if chunk > key.in_features + key.m or (kib > 36 and key.m < 64) or width > max(16, tokens):
                    continue
                found += [Tiling("tb", chunk, width, rows, split) for rows in (64, 256) for split in ("rows", "tokens")]
    return list(dict.fromkeys(found))
