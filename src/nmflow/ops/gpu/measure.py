"""Which product is the fastest on this GPU: every way that is right, timed beside the dense one, over cold weights."""

from __future__ import annotations

import functools
import statistics
import time
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from nmflow.ops.gpu import linear, product, two_four
from nmflow.ops.gpu.choice import DENSE, Key, Way, candidates
from nmflow.ops.gpu.linear import Weight

KeyT = TypeVar("KeyT", bound=Hashable)

_TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}
"""Norm of the difference to float64 over its norm, for sums kept in float32 and rounded once."""
_TF32 = 2e-3
_CHECKS = 3
"""Calls whose results are compared: algorithms are known that are wrong now and then."""
_CALLS = 10
"""Rounds of one measurement: enough that waiting for the GPU costs little."""
_HOPELESS = 1.5
"""A way that took as many times as long as the fastest in its first measurement is not measured again."""
_FEWEST = 4
"""Times that a side which is not hopeless is timed."""
_COPIES = 64
_IN_GRAPH = 16
"""Calls of a graph whose kernels may be as short as its launch."""
_FEW = 256
"""Tokens up to which reading the weight is most of the work."""
_TWO_FOUR_FROM = 64
"""Tokens below which the 2:4 cores, which read more bytes than kept weights have, are not tried."""


def tune(weight: Weight, tokens: int, seconds: float = 0.3, graph: bool = False) -> dict[Way, float]:
    """Time the ways worth trying at `tokens` tokens and the dense product, and keep the fastest in `linear.plan`.

    Every way is compared with float64 first: one whose result is wrong, or that fails, is left out with a warning.
    Returns the median seconds of a call, `DENSE` among them: with its launches, or, `graph`, replayed in a CUDA graph.
    """
    key = weight.key(tokens, graph)
    x, weights = example(weight, tokens)
    exact = _exact(x, weight)
    timed: dict[Way, Callable[[], object]] = {}
    in_turn = weights * turns(tokens, len(weights), graph)
    for way in [DENSE, *ways(key, x, weight)]:
        calls = [functools.partial(linear.multiply, way, x, each) for each in in_turn]
        if way == DENSE:
            timed[way] = replayed(calls) if graph else functools.partial(run_all, calls)
        elif (error := _error(way, calls[0], exact)) is None:
            try:
                timed[way] = replayed(calls) if graph else functools.partial(run_all, calls)
            except RuntimeError as failure:
                error = f"goes into no CUDA graph ({failure})"
        if way not in timed:
            warnings.warn(f"{way.line()} {error} and is left out", stacklevel=2)
    del exact
    found = medians(timed, x.is_cuda, seconds, keep=DENSE)
    times = {way: taken / len(in_turn) for way, taken in found.items()}
    linear.plan.note(key, times)
    return times


def turns(tokens: int, copies: int, graph: bool) -> int:
    """How often the copies are gone through in a CUDA graph, so that its launch does not count."""
    return max(1, _IN_GRAPH // copies) if graph and tokens <= _FEW else 1


def example(weight: Weight, tokens: int) -> tuple[Tensor, list[Weight]]:
    """An input, and copies of the weight to go through in turn, so that it comes from memory, as one of many layers.

    At few tokens the compressed weights together overflow the L2 cache, at many the dense ones.
    """
    values, (rows, axis) = weight.values, weight.shape
    copies = 1
    if values.is_cuda:
        dense = rows * axis * values.itemsize
        size = values.nbytes + weight.offsets.nbytes if tokens <= _FEW else dense
        cache = torch.cuda.get_device_properties(values.device).L2_cache_size
        room = torch.cuda.mem_get_info(values.device)[0] // 8
        copies = max(1, min(_COPIES, 1 + int(1.5 * cache) // size, room // dense))
    return _input(weight, tokens), [weight, *(weight._replace(values=values.clone()) for _ in range(copies - 1))]


def still_right(way: Way, weight: Weight, tokens: int) -> bool:
    """Whether a way that was measured elsewhere or before gives what float64 gives, here; with a warning where not.

    The numbers of cuSPARSELt's algorithms mean others in another version, and compilers change.
    """
    x = _input(weight, tokens)
    error = None if way == DENSE else _error(way, functools.partial(linear.multiply, way, x, weight), _exact(x, weight))
    if error is not None:
        warnings.warn(f"{way.line()}, as a plan has it, {error} and is measured anew", stacklevel=2)
    return error is None


def _input(weight: Weight, tokens: int) -> Tensor:
    values = weight.values
    generator = torch.Generator().manual_seed(0)
    return torch.randn(tokens, weight.shape[1], generator=generator).to(values.device, values.dtype)


def _exact(x: Tensor, weight: Weight) -> Tensor:
    return x.double() @ weight.dense().double().t()


def ways(key: Key, x: Tensor, weight: Weight) -> list[Way]:
    """Sparse ways worth timing, the 2:4 cores among them where there are any and the weight fits."""
    facts = {"device": x.device.type, "dtype": x.dtype, "shape": weight.shape, "n": weight.n, "m": weight.m}
    found = candidates(key) if product.why_not(**facts) is None else []
    if len(x) >= _TWO_FOUR_FROM and two_four.why_not(**facts) is None:
        found += [Way("2:4", algorithm) for algorithm in two_four.algorithms(x, weight.two_four())]
    return found


def _error(way: Way, call: Callable[[], Tensor], exact: Tensor) -> str | None:
    """What is wrong with a way; None where nothing is."""
    try:
        found = [call() for _ in range(_CHECKS)]
        error = max(float((y.double() - exact).norm() / exact.norm().clamp_min(1e-30)) for y in found)
    except Exception as failure:  # whatever a compiler dies of, there are others to choose from
        return f"failed ({failure})"
    dtype = found[0].dtype
    tf32 = dtype == torch.float32 and way.kernel == "shared" and torch.backends.cuda.matmul.allow_tf32
    return None if error <= (_TF32 if tf32 else _TOLERANCE[dtype]) else f"is wrong by {error:.1e} of the result"


# ------------------------------------------------------------------------------------------------ the clock
def run_all(calls: Sequence[Callable[[], object]]) -> None:
    """Each once."""
    for call in calls:
        call()


def replayed(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """The calls as one CUDA graph; they run once before, so that kernels are compiled and forms derived.

    Raises `RuntimeError` where they cannot be captured.
    """
    run_all(calls)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run_all(calls)
    return graph.replay


def medians(
    sides: Mapping[KeyT, Callable[[], object]], on_gpu: bool, seconds: float, keep: KeyT | None = None
) -> dict[KeyT, float]:
    """Median seconds of one call of each side, over rounds that time them one after the other, for `seconds`.

    With `keep`, a side that is hopeless in the first round is not timed again, unless it is that one.
    """
    times = {side: [seconds_of(call, on_gpu)] for side, call in sides.items()}
    first = min(found[0] for found in times.values())
    hopeful = [side for side in sides if keep in (None, side) or times[side][0] <= _HOPELESS * first]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[hopeful[0]]) < _FEWEST:
        for side in hopeful:
            times[side].append(seconds_of(sides[side], on_gpu))
    return {side: statistics.median(found[1:] or found) for side, found in times.items()}


def seconds_of(call: Callable[[], object], on_gpu: bool) -> float:
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
