"""What is measured on a GPU, in the order of what it tells, and the goals. Goals stand for one H100 or H200."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nmflow.bench.settings import GpuSettings, Shape

LLM: Shape = (14336, 4096)
"""The first FF product of an 8-billion-weight language model."""
FF1: Shape = (4096, 1024)
"""ViT-Large's."""
FF2: Shape = (1024, 4096)
VIT_LARGE, VIT_BASE = "timm:vit_large_patch16_224", "timm:vit_base_patch16_224"
IMAGES = 32
"""Of one forward of ViT-Large."""
BATCH = 256
"""Of a training step of ViT-Base."""
PAPER = ("2:4", "1:4", "1:8", "1:16", "1:32", "1:128")
"""The patterns of the paper's tables of speed, 8 and 19."""


@dataclass(frozen=True)
class Goal:
    """What a figure is to reach. `figure` names it among those of a measurement."""

    figure: str
    value: float
    at_most: bool = False

    def reached(self, found: float) -> bool:
        """Whether `found` is good enough."""
        return found <= self.value if self.at_most else found >= self.value


@dataclass(frozen=True)
class Place:
    """One measurement: a product, a mask step, a training step or a whole network."""

    part: str
    what: str
    """Shape, or the network's name."""
    pattern: str
    tokens: int
    """Tokens; images of a network or a training step; 0 for a mask."""
    dtype: str
    goals: tuple[Goal, ...] = ()

    @property
    def shape(self) -> Shape:
        """Of a product or mask."""
        rows, _, axis = self.what.partition("x")
        return int(rows), int(axis)

    @property
    def name(self) -> str:
        """For people."""
        count = {"train": f", {self.tokens} images", "network": f", {self.tokens} images", "masks": ""}
        tokens = count.get(self.part, f", {self.tokens} token{'s' * (self.tokens > 1)}")
        return f"{self.part} {self.what} {self.pattern} {self.dtype}{tokens}"


OVER_DENSE, OF_COPY, OVER_ARGSORT, SHARE = "times dense", "part of copy speed", "times argsort", "part of the step"
"""The figures that goals speak of."""


def places(settings: GpuSettings) -> Iterator[Place]:
    """Every measurement of the parts that `settings` name."""
    for place in (*_decode(), *_masks(), *_many(), *_shared(), *_float32(), *_train(), *_network()):
        if place.part in settings.parts:
            yield place


_NOT_SLOWER = 0.98
"""Times dense, where there is nothing to win: the plan falls back to the dense product, and clocks have noise."""


def _product(part: str, shape: Shape, pattern: str, tokens: int, dtype: str, goal: float = _NOT_SLOWER) -> Place:
    return Place(part, f"{shape[0]}x{shape[1]}", pattern, tokens, dtype, (Goal(OVER_DENSE, goal),))


def _decode() -> Iterator[Place]:
    goals = {"1:4": 1.8, "1:8": 3.2, "1:16": 4.5, "1:32": 4.5, "1:128": 4.5}
    for pattern in PAPER:
        yield _product("decode", LLM, pattern, 1, "bfloat16", goals.get(pattern, _NOT_SLOWER))
    yield from (_product("decode", LLM, pattern, 16, "bfloat16") for pattern in ("1:4", "1:8", "1:16", "1:128"))


def _masks() -> Iterator[Place]:
    wanted = {"1:4": 0.7, "1:16": 0.7, "1:128": 0.7, "2:4": 0.7, "7:8": 0.7, "16:128": 0.25}
    for pattern, of_copy in wanted.items():
        goals = Goal(OF_COPY, of_copy), Goal(OVER_ARGSORT, 10.0)
        yield Place("masks", f"{LLM[0]}x{LLM[1]}", pattern, 0, "float32", goals)


def _many() -> Iterator[Place]:
    for pattern in ("2:4", "1:8", "1:32", "1:128"):
        yield _product("many", FF1, pattern, 8192, "bfloat16", 2.5 if pattern == "1:128" else 1.2)
    for pattern in ("2:4", "1:128"):
        yield _product("many", LLM, pattern, 8192, "bfloat16", 2.5 if pattern == "1:128" else 1.2)
    yield _product("many", LLM, "2:4", 1568, "bfloat16")


def _shared() -> Iterator[Place]:
    yield _product("shared", LLM, "1:4v64", 8192, "bfloat16", 2.4)
    yield _product("shared", LLM, "1:8v64", 8192, "bfloat16", 4.0)
    yield _product("shared", FF1, "1:8v64", 8192, "bfloat16", 2.5)


def _float32() -> Iterator[Place]:
    goals = {"1:16": 2.3, "1:32": 4.5}
    for pattern in PAPER:
        goal = goals.get(pattern, _NOT_SLOWER)
        yield from (_product("float32", shape, pattern, 1568, "float32", goal) for shape in (FF1, FF2))


def _train() -> Iterator[Place]:
    for pattern in ("2:4", "1:8"):
        yield Place("train", VIT_BASE, pattern, BATCH, "bfloat16", (Goal(SHARE, 0.02, at_most=True),))


def _network() -> Iterator[Place]:
    for pattern in PAPER:
        yield Place("network", VIT_LARGE, pattern, IMAGES, "bfloat16", (Goal(OVER_DENSE, _NOT_SLOWER),))
