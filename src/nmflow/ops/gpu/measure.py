"""Which product is the fastest on this GPU: every way that is right, timed beside the dense one, over cold weights."""

from __future__ import annotations

import functools
import statistics
import time
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nmflow.ops.gpu import linear, product, two_four
from nmflow.ops.gpu.choice import DENSE, Key, Way, candidates
from nmflow.ops.gpu.linear import Weight

_TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}
"""Norm of the difference to float64 over its norm, for sums kept in float32 and rounded once."""
_TF32 = 2e-3
_CHECKS = 3
"""Calls whose results are compared: algorithms are known that are wrong now and then."""
_CALLS = 10
"""Rounds of one measurement: enough that waiting for the GPU costs little."""
_HOPELESS = 1.5
"""A way that took as many times as long as the fastest in its first measurement is not measured again."""
_TWO_FOUR_FROM = 64
"""Tokens below which the 2:4 cores, which read more bytes than kept weights have, are not tried."""


def tune(weight: Weight, tokens: int, seconds: float = 0.3, graph: bool = False) -> dict[Way, float]:
    """Time the ways worth trying at `tokens` tokens and the dense product, and keep the fastest in `linear.plan`.

    Every way is compared with float64 first: one whose result is wrong, or that fails, is left out with a warning.
    Returns the median seconds of a call, `DENSE` among them: with its launches, or, `graph`, replayed in a CUDA graph.
    """
    key = weight.key(tokens, graph)
    values = weight.values
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, weight.shape[1], generator=generator).to(values.device, values.dtype)
    exact = x.double() @ weight.dense().double().t()
    weights = [weight._replace(values=values.clone()) for _ in range(_copies(weight))]
    timed: dict[Way, Callable[[], object]] = {}
    for way in [DENSE, *ways(key, x, weight)]:
        calls = [functools.partial(linear.multiply, way, x, each) for each in weights]
        if way == DENSE or _is_right(way, calls[0], exact):
            run = _replayed(way, calls) if graph else functools.partial(_all, calls)
            if run is not None:
                timed[way] = run
    del exact
    times = {way: [_seconds(call, x.is_cuda) / len(weights)] for way, call in timed.items()}
    first = min(found[0] for found in times.values())
    hopeful = [way for way, found in times.items() if way == DENSE or found[0] <= _HOPELESS * first]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[DENSE]) < 4:
        for way in hopeful:  # one after the other, so that what slows the machine slows them all
            times[way].append(_seconds(timed[way], x.is_cuda) / len(weights))
    medians = {way: statistics.median(found[1:] or found) for way, found in times.items()}
    linear.plan.note(key, medians)
    return medians


def ways(key: Key, x: Tensor, weight: Weight) -> list[Way]:
    """Sparse ways worth timing, the 2:4 cores among them where there are any and the weight fits."""
    facts = {"device": x.device.type, "dtype": x.dtype, "shape": weight.shape, "n": weight.n, "m": weight.m}
    found = candidates(key) if product.why_not(**facts) is None else []
    if len(x) >= _TWO_FOUR_FROM and two_four.why_not(**facts) is None:
        found += [Way("2:4", algorithm) for algorithm in two_four.algorithms(x, weight.two_four())]
    return found


def _copies(weight: Weight) -> int:
    """Weights to go through in turn, so that the dense one comes from memory, as one layer of many does."""
    values, (rows, axis) = weight.values, weight.shape
    if not values.is_cuda:
        return 1
    cache = torch.cuda.get_device_properties(values.device).L2_cache_size
    return min(16, 1 + int(1.5 * cache) // (rows * axis * values.itemsize))


def _is_right(way: Way, call: Callable[[], Tensor], exact: Tensor) -> bool:
    try:
        found = [call() for _ in range(_CHECKS)]
        error = max(float((y.double() - exact).norm() / exact.norm().clamp_min(1e-30)) for y in found)
    except Exception as failure:  # whatever a compiler dies of, there are others to choose from
        warnings.warn(f"{way.line()} failed and is left out: {failure}", stacklevel=3)
        return False
    dtype = found[0].dtype
    tf32 = dtype == torch.float32 and way.kernel == "shared" and torch.backends.cuda.matmul.allow_tf32
    if error <= (_TF32 if tf32 else _TOLERANCE[dtype]):
        return True
    warnings.warn(f"{way.line()} is wrong by {error:.1e} of the result and is left out", stacklevel=3)
    return False


def _all(calls: Sequence[Callable[[], Tensor]]) -> None:
    for call in calls:
        call()


def _replayed(way: Way, calls: Sequence[Callable[[], Tensor]]) -> Callable[[], object] | None:
    """The calls as one CUDA graph; they run once before, so that kernels are compiled and forms derived.

    None, with a warning, where they cannot be captured; of the dense product that is an error.
    """
    _all(calls)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            _all(calls)
    except RuntimeError as failure:
        if way == DENSE:
            raise
        warnings.warn(f"{way.line()} goes into no CUDA graph and is left out there: {failure}", stacklevel=3)
        return None
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
