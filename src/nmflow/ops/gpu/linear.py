"""The compressed product on a GPU: asked of the plan, run by the kernel that it names, measured by `tune`.

Shape suffixes: R rows (outputs), S slots of a row, G groups of V rows that share their offsets.
"""

from __future__ import annotations

import functools
import statistics
import time
import warnings
from collections.abc import Callable, MutableMapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from nmflow.groups import spread
from nmflow.ops.dense import Activation, activate, unpacked, versions
from nmflow.ops.gpu import product
from nmflow.ops.gpu.choice import DENSE, Key, Plan, Way, candidates
from nmflow.ops.gpu.product import SharedTiling, SlotMajor, Tiling
from nmflow.ops.native_plan import bucket

plan = Plan()
"""What was measured in this process, or read from a file."""

_SLOT_MAJOR: MutableMapping[Tensor, tuple[tuple[int, ...], SlotMajor]] = WeakTensorKeyDictionary()
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}
"""Norm of the difference to float64 over its norm, for sums kept in float32 and rounded once."""
_TF32 = 2e-3
_CALLS = 10
"""Rounds of one measurement: enough that waiting for the GPU costs little."""


def key_of(
    device: torch.device | str, dtype: torch.dtype, shape: tuple[int, int], n: int, m: int, v: int, tokens: int
) -> Key:
    """What the plan is asked for, now."""
    on_gpu = torch.device(device).type == "cuda"
    graph = on_gpu and torch.cuda.is_current_stream_capturing()
    name = _name(torch.cuda.current_device()) if on_gpu else "interpreter"
    return Key(name, *shape, n, m, v, str(dtype).removeprefix("torch."), bucket(max(tokens, 1)), graph)


@functools.cache
def _name(index: int) -> str:
    return torch.cuda.get_device_name(index)


def why_not(**facts: object) -> str | None:
    """Why Triton does not multiply; None where it does. Facts as in `nmflow.ops.registry.Kernel`."""
    reason = product.why_not(**facts)
    told = [facts.get(name) for name in ("device", "dtype", "shape", "n", "m", "v", "tokens")]
    if reason is None and None not in told and not torch.compiler.is_compiling():  # the operator asks then
        return plan.why_dense(key_of(*told))  # type: ignore[arg-type]  # facts have no types, the registry's word for it
    return reason


def operator(
    x: Tensor,
    values: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    out_features: int,
    in_features: int,
    n: int,
    m: int,
    activation: Activation | None,
    v: int = 1,
) -> Tensor:
    """`torch.ops.nmflow.linear` on CUDA: y = act(x W^T + b) as the plan says, dense where it says nothing."""
    shape = out_features, in_features
    way = plan.choices.get(key_of(x.device, x.dtype, shape, n, m, v, x.shape[:-1].numel()), DENSE)
    return _run(way, x, values, offsets, shape, n, m, bias, activation, v)


def _run(
    way: Way,
    x: Tensor,
    values_RS: Tensor,
    offsets_GS: Tensor,
    shape: tuple[int, int],
    n: int,
    m: int,
    bias: Tensor | None,
    activation: Activation | None,
    v: int,
) -> Tensor:
    if way.kernel == "gather":
        weight = _slot_major(values_RS, offsets_GS, v)
        return product.gather_linear(x, weight, n, m, bias, activation, cast(Tiling, way.cut))
    if way.kernel == "shared":
        cut = cast(SharedTiling, way.cut)
        return product.shared_linear(x, values_RS, offsets_GS, n, m, v, bias, activation, cut)
    return activate(F.linear(x, unpacked(values_RS, offsets_GS, shape[1], n, m, v), bias), activation)


def _slot_major(values_RS: Tensor, offsets_GS: Tensor, v: int) -> SlotMajor:
    """The form that gathering reads, derived once and kept while the values live."""
    now = versions(values_RS, offsets_GS)
    found = _SLOT_MAJOR.get(values_RS)
    if found is None or found[0] != now:
        with torch.inference_mode(False), torch.no_grad():
            offsets_RS = spread(offsets_GS, v, values_RS.shape[0])
            found = _SLOT_MAJOR[values_RS] = now, product.slot_major(values_RS, offsets_RS)
    return found[1]


# ------------------------------------------------------------------------------------------------ measuring
def tune(
    values_RS: Tensor,
    offsets_GS: Tensor,
    shape: tuple[int, int],
    n: int,
    m: int,
    v: int,
    tokens: int,
    seconds: float = 0.3,
    graph: bool = False,
) -> dict[Way, float]:
    """Time the ways worth trying at `tokens` tokens and the dense product, and keep the fastest in `plan`.

    Every way is compared with float64 first: one whose result is wrong, or that fails, is left out with a warning.
    Returns the median seconds of a call, `DENSE` among them: with its launches, or, `graph`, replayed in a CUDA graph.
    """
    key = key_of(values_RS.device, values_RS.dtype, shape, n, m, v, tokens)._replace(graph=graph)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, shape[1], generator=generator).to(values_RS.device, values_RS.dtype)
    exact = x.double() @ unpacked(values_RS, offsets_GS, shape[1], n, m, v).double().t()
    weights = [(values_RS.clone(), offsets_GS) for _ in range(_copies(shape, values_RS))]
    timed: dict[Way, Callable[[], object]] = {}
    for way in [DENSE, *candidates(key)]:
        calls = [functools.partial(_run, way, x, *weight, shape, n, m, None, None, v) for weight in weights]
        if way == DENSE or _is_right(way, calls[0], exact, x.dtype):
            timed[way] = _replayed(calls) if graph else functools.partial(_all, calls)
    times: dict[Way, list[float]] = {way: [] for way in timed}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[DENSE]) < 4:
        for way, call in timed.items():  # one after the other, so that what slows the machine slows them all
            times[way].append(_seconds(call, x.is_cuda) / len(weights))
    medians = {way: statistics.median(found[1:]) for way, found in times.items()}
    plan.choices[key] = min(medians, key=lambda way: medians[way])
    return medians


def _copies(shape: tuple[int, int], values_RS: Tensor) -> int:
    """Weights to go through in turn, so that the dense one comes from memory, as one layer of many does."""
    if not values_RS.is_cuda:
        return 1
    cache = torch.cuda.get_device_properties(values_RS.device).L2_cache_size
    return min(16, 1 + int(1.5 * cache) // (shape[0] * shape[1] * values_RS.itemsize))


def _is_right(way: Way, call: Callable[[], Tensor], exact: Tensor, dtype: torch.dtype) -> bool:
    tf32 = dtype == torch.float32 and way.kernel == "shared" and torch.backends.cuda.matmul.allow_tf32
    try:
        error = float((call().double() - exact).norm() / exact.norm().clamp_min(1e-30))
    except Exception as failure:  # whatever a compiler dies of, there are others to choose from
        warnings.warn(f"{way} failed and is left out: {failure}", stacklevel=3)
        return False
    if error <= (_TF32 if tf32 else _TOLERANCE[dtype]):
        return True
    warnings.warn(f"{way} is wrong by {error:.1e} of the result and is left out", stacklevel=3)
    return False


def _all(calls: Sequence[Callable[[], Tensor]]) -> None:
    for call in calls:
        call()


def _replayed(calls: Sequence[Callable[[], Tensor]]) -> Callable[[], object]:
    """The calls as one CUDA graph; they run once before, so that kernels are compiled and forms derived."""
    _all(calls)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _all(calls)
    return graph.replay


def _seconds(call: Callable[[], object], on_gpu: bool) -> float:
    """Seconds of `call`, in the middle of others like it."""
    if not on_gpu:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(_CALLS):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / _CALLS
