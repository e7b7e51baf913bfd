"""Products and mask steps on a GPU, each beside what torch has, in rounds, over weights that come from memory."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from nmflow.bench.cells import DENSE, OURS
from nmflow.bench.gpu.cells import ARGSORT, BF16, COMPILED, COPY, CSR, TF32, TORCH_24, GpuCell
from nmflow.bench.gpu.places import Place
from nmflow.bench.masks import argsort_and_scatter
from nmflow.masks import rows_mask
from nmflow.ops.gpu import linear, measure, project, two_four
from nmflow.ops.gpu.choice import Way
from nmflow.ops.gpu.linear import Weight
from nmflow.pattern import Pattern
from nmflow.runtime.format import CompressedNM

SECONDS = 0.2
"""Spent on tuning, and again on the comparison."""
_FEW = 64
"""Tokens from which on torch's 2:4 tensors are tried."""

Calls = list[Callable[[], object]]


def measure_product(place: Place, device: str = "cuda", seconds: float = SECONDS) -> GpuCell:
    """Tune one product, then time what was chosen beside torch's: as CUDA graphs on a GPU, once more and in turns."""
    notes: list[str] = []
    dtype = getattr(torch, place.dtype)
    weight = random_weight(place.shape, Pattern.parse(place.pattern), dtype, device)
    on_gpu = device != "cpu"
    with told(notes):
        measure.tune(weight, place.tokens, seconds, graph=on_gpu)
    way = linear.plan.choices[weight.key(place.tokens, on_gpu)]
    x, weights = measure.example(weight, place.tokens)
    weights = weights * measure.turns(place.tokens, len(weights), on_gpu)
    sides: dict[str, Callable[[], object]] = {}
    for name, (calls, tf32) in _contenders(place, x, weights, way).items():
        try:
            with allowing_tf32(tf32):
                sides[name] = measure.replayed(calls()) if on_gpu else functools.partial(measure.run_all, calls())
        except Exception as failure:  # a torch without it, a size that it does not take: the others are timed
            notes.append(f"{name}: {first_line(failure)}")
    found = measure.medians(sides, on_gpu, seconds)
    us = {name: taken / len(weights) * 1e6 for name, taken in found.items()}
    return GpuCell(place, us, way.line(), tuple(notes))


def random_weight(shape: tuple[int, int], pattern: Pattern, dtype: torch.dtype, device: str) -> Weight:
    """A compressed weight [R, K] of normal numbers, N of every M of largest magnitude."""
    w = torch.randn(shape, generator=torch.Generator(device).manual_seed(0), device=device).to(dtype)
    w *= shape[1] ** -0.5 * rows_mask(w.abs(), pattern, "partial")
    packed = CompressedNM.pack(w, pattern)
    return Weight(packed.values, packed.offsets, shape, pattern.n, pattern.m, pattern.v)


def _contenders(
    place: Place, x: Tensor, weights: Sequence[Weight], way: Way
) -> dict[str, tuple[Callable[[], Calls], bool]]:
    """By name: what makes its calls, one for each weight, and whether it may use TF32."""

    def dense(function: Callable[..., Tensor], dtype: torch.dtype = x.dtype) -> Callable[[], Calls]:
        return lambda: [functools.partial(function, x.to(dtype), each.dense().to(dtype)) for each in weights]

    def ours() -> Calls:
        return [functools.partial(linear.multiply, way, x, each) for each in weights]

    found = {OURS: (ours, False), DENSE: (dense(F.linear), False)}
    if place.dtype == "float32":
        found[TF32] = dense(F.linear), True
        found[BF16] = dense(F.linear, torch.bfloat16), False
        found[CSR] = lambda: _csr_calls(x, weights), False
    else:
        found[COMPILED] = dense(torch.compile(F.linear, dynamic=False)), False
    if place.tokens >= _FEW and two_four.why_no_weight(x.dtype, place.shape, weights[0].n, weights[0].m) is None:
        found[TORCH_24] = lambda: _two_four_calls(x, weights), False
    return found


def _csr_calls(x: Tensor, weights: Sequence[Weight]) -> Calls:
    """cuSPARSE's product alone: x is transposed before the clock starts, y stays transposed."""
    x_KT = x.t().contiguous()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "beta state"
        return [functools.partial(torch.mm, each.dense().to_sparse_csr(), x_KT) for each in weights]


def _two_four_calls(x: Tensor, weights: Sequence[Weight]) -> Calls:
    """torch's own 2:4 tensors, with the algorithm they take by default."""
    from torch.sparse import to_sparse_semi_structured

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "prototype"
        return [functools.partial(F.linear, x, to_sparse_semi_structured(each.dense())) for each in weights]


def measure_masks(place: Place, device: str = "cuda", seconds: float = SECONDS) -> GpuCell:
    """Time the step W -> (mask, W~) beside a copy of W, and beside argsort and scatter."""
    pattern = Pattern.parse(place.pattern)
    w = torch.randn(place.shape, generator=torch.Generator(device).manual_seed(0), device=device)
    mask, effective, copy = torch.zeros_like(w, dtype=torch.bool), torch.empty_like(w), torch.empty_like(w)
    notes: list[str] = []
    with told(notes):
        right = project.agreement(pattern, w.dtype, w.device, False)
    if not right:
        return GpuCell(place, notes=tuple(notes))
    sides: dict[str, Callable[[], object]] = {
        OURS: lambda: project.project_triton(w, pattern, 0.5, "partial", mask, effective),
        COPY: lambda: copy.copy_(w),
        ARGSORT: lambda: argsort_and_scatter(w, pattern),
    }
    found = measure.medians(sides, device != "cpu", seconds)
    return GpuCell(place, {name: taken * 1e6 for name, taken in found.items()}, notes=tuple(notes))


@contextmanager
def told(notes: list[str]) -> Iterator[None]:
    """Warnings go into the notes, what is said of several tilings once."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    notes += dict.fromkeys(first_line(each.message) for each in caught)


@contextmanager
def allowing_tf32(allowed: bool) -> Iterator[None]:
    """Whether torch's float32 products may use TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def first_line(failure: object) -> str:
    """What it says, in short."""
    return (str(failure).strip().splitlines() or [type(failure).__name__])[0][:200]
