"""Which products and mask steps `nmflow bench kernels` times, and how: cells by part, shape, pattern and tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from nmflow.bench import contenders, goals
from nmflow.bench.cells import CSR, DENSE, OURS, PACKED, READING, Cell, ConvCell, MaskCell
from nmflow.bench.convolutions import CONV_LAYERS, CONV_PATTERNS, measure_conv
from nmflow.bench.machine import Setup, examine, require_native
from nmflow.bench.masks import MASK_PATTERNS, MASK_SHAPES, measure_masks
from nmflow.bench.results import KernelResult
from nmflow.bench.settings import PATTERNS, SHAPES, TOKENS, KernelSettings
from nmflow.bench.timing import Rounds, computing, in_turns
from nmflow.ops import native_measure
from nmflow.pattern import Pattern
from nmflow.runtime.modules import PackedRows

COLD_LAYERS = 24
_COLD_TOKENS = (1, 4)
_READ_MIB = 256
_COLD_PATTERNS = ("2:4", "1:8", "1:32")
_BF16_PATTERNS = ("2:4", "1:8", "1:16", "1:32", "1:128")
_SLOW = 0.5
"""Seconds; a contender that takes as long for one call is left out."""

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Place:
    """One cell to measure."""

    part: str
    shape: tuple[int, int]
    pattern: str
    tokens: int
    dtype: str
    layers: int = 1


def bench_kernels(settings: KernelSettings, tell: Tell) -> KernelResult:
    """Measure every cell that `settings` asks for; `tell` hears each line as soon as it is known.

    Raises `ValueError` where the native library is missing.
    """
    require_native()
    with computing(settings.threads), torch.inference_mode():
        setup = examine()
        for line in setup.lines():
            tell(line)
        cells: list[Cell] = []
        convolutions: list[ConvCell] = []
        masks: list[MaskCell] = []
        for place in places(settings):
            cells.append(measure(place, settings.rounds, setup))
            tell(cells[-1].line())
        if "conv" in settings.parts:
            for layer in CONV_LAYERS:
                for pattern in settings.patterns or CONV_PATTERNS:
                    convolutions.append(measure_conv(layer, pattern, settings.dtype, settings.rounds))
                    tell(convolutions[-1].line())
        if "masks" in settings.parts:
            for shape in settings.shapes or MASK_SHAPES:
                for pattern in settings.patterns or MASK_PATTERNS:
                    masks.append(measure_masks(shape, pattern, settings.dtype, settings.rounds))
                    tell(masks[-1].line())
    return KernelResult(setup, settings.rounds, tuple(cells), tuple(convolutions), tuple(masks))


def places(settings: KernelSettings) -> Iterator[Place]:
    """The products to measure, in order. Where `settings` leave it open, patterns are those that have goals."""
    shapes = settings.shapes or SHAPES
    if "linear" in settings.parts:
        for pattern in settings.patterns or PATTERNS:
            for tokens in settings.tokens or TOKENS:
                yield from (Place("linear", shape, pattern, tokens, settings.dtype) for shape in shapes)
    if "cold" in settings.parts:
        for pattern in settings.patterns or _COLD_PATTERNS:
            for tokens in settings.tokens or _COLD_TOKENS:
                yield from (Place("cold", shape, pattern, tokens, settings.dtype, COLD_LAYERS) for shape in shapes)
    if "bf16" in settings.parts:
        for pattern in settings.patterns or _BF16_PATTERNS:
            for tokens in settings.tokens or (196,):
                yield from (Place("bf16", shape, pattern, tokens, "bfloat16") for shape in shapes)


def measure(place: Place, rounds: int, setup: Setup) -> Cell:
    """Tune, check and time one cell."""
    pattern, dtype = Pattern.parse(place.pattern), getattr(torch, place.dtype)
    dense = [contenders.sparse_linear(place.shape, pattern, dtype) for _ in range(place.layers)]
    compressed = [contenders.ours(layer, pattern) for layer in dense]
    x = torch.randn(place.tokens, place.shape[1]).to(dtype)
    contenders.tune(compressed[0], place.tokens)
    contenders.check(dense[0], compressed[0], x)
    sides: dict[str, Callable[[], object]] = {DENSE: called(dense, x), OURS: called(compressed, x)}
    packed = [contenders.packed_dense(layer, place.tokens) for layer in dense]
    if all(each is not None for each in packed):
        sides[PACKED] = called([each for each in packed if each is not None], x)
    if place.layers > 1:  # how fast memory is changes from minute to minute where others use it too
        sides[READING] = native_measure.reader(_READ_MIB)
    timed = in_turns(sides, rounds)
    us, over = compared(timed, place.layers)
    read_gbs = (_READ_MIB << 20) / timed.median(READING) / 1e9 if READING in sides else None
    if place.layers == 1 and (csr := contenders.csr_linear(dense[0])) is not None:
        slow = timed_if_fast({OURS: sides[OURS], CSR: called([csr], x)}, CSR)
        if slow is not None:
            us[CSR], over[CSR] = slow.median(CSR) * 1e6, slow.ratio(OURS, CSR)
    rows = cast(PackedRows, compressed[0].weight_nm.rows[0])
    tiling, nbytes = contenders.chosen(rows, place.tokens)
    flops = 2 * place.tokens * place.shape[0] * pattern.kept(place.shape[1])
    read = (read_gbs or setup.ceilings.read_gbs) * 1e3  # bytes a microsecond
    return Cell(
        part=place.part,
        shape=place.shape,
        pattern=place.pattern,
        tokens=place.tokens,
        dtype=place.dtype,
        layers=place.layers,
        us=us,
        over=over,
        of_peak=flops / us[OURS] / 1e3 / setup.ceilings.gflops(dtype),
        of_bandwidth=nbytes / us[OURS] / read if place.tokens == 1 or place.layers > 1 else None,
        goal=goals.of_product(
            place.part, place.shape, place.dtype, place.pattern, place.tokens, setup.machine.threads
        ),
        tiling=contenders.tiling_text(tiling),
        disturbed=timed.disturbed,
        read_gbs=read_gbs,
    )


def called(layers: Sequence[nn.Module], x: Tensor) -> Callable[[], object]:
    """All layers called once, one after the other."""
    if len(layers) == 1:
        only = layers[0]
        return lambda: only(x)

    def run() -> None:
        for layer in layers:
            layer(x)

    return run


def compared(timed: Rounds, layers: int = 1) -> tuple[dict[str, float], dict[str, float]]:
    """(microseconds of one layer, ratio over ours) by contender."""
    names = [name for name in timed.seconds if name != READING]
    us = {name: timed.median(name) / layers * 1e6 for name in names}
    return us, {name: timed.ratio(OURS, name) for name in names if name != OURS}


def timed_if_fast(sides: Mapping[str, Callable[[], object]], doubtful: str) -> Rounds | None:
    """A few rounds apart from the others, whose caches it would empty; None where one call takes too long."""
    first = in_turns({doubtful: sides[doubtful]}, 1, seconds=0.0, tries=1)
    return None if first.median(doubtful) > _SLOW else in_turns(sides, 3, tries=3)
