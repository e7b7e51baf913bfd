"""Which tiling is fastest for a weight and a number of tokens, measured; kept in the plan that every product consults.

Shape suffixes: R rows (outputs), K entries of the reduction axis.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nmflow.ops import native
from nmflow.ops.dense import Activation, activate
from nmflow.ops.native_library import checked, loaded
from nmflow.ops.native_plan import DENSE, Tiling, bucket, candidates
from nmflow.ops.reference import expand


def clock() -> Callable[[], float]:
    """The clock to time a product with: of one thread its own, which other work on the machine cannot move."""
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


_EVICTING = 4 << 20
"""Bytes that leave nothing else in a core's own caches."""


def tune(
    packed: native.PackedWeight, tokens: int, seconds: float = 0.3, activation: Activation | None = None
) -> dict[Tiling, float]:
    """Time the tilings worth trying at `tokens` tokens on torch's present threads, and the dense product against the
    best of them; keep what is fastest in `native.plan`.

    Each call finds the caches as in a network: other layers have been there since this weight was read, and x was just
    written, by torch's threads. What lies where decides between tilings. Returns the fastest time of each in seconds,
    `DENSE` among them. Candidates far behind the best are dropped after one round. Packed forms that only lost
    candidates used are freed.
    """
    forms = packed.forms
    key = forms.key(tokens, torch.get_num_threads())
    source = torch.randn(tokens, packed.in_features).to(packed.values.dtype)
    x = source.clone()
    out = x.new_empty(tokens, packed.out_features)
    other_layers = torch.zeros(torch.get_num_threads() * _EVICTING, dtype=torch.uint8)
    keep = set(forms.packed)
    best: dict[Tiling, float] = {}
    library, now = loaded(), clock()

    def timed(tiling: Tiling, repeats: int) -> float:
        call = forms.call_of(tiling, activation)
        given = (call.address, x.data_ptr(), x.stride(0), None, out.data_ptr(), out.stride(0), tokens)
        times = []
        for _ in range(repeats + 1):
            other_layers.add_(1)
            x.copy_(source)
            start = now()
            checked(library.handle.nmflow_linear(*given, library.parallel_for), f"tuning {tiling}")
            times.append(now() - start)
        return min(times[1:])

    tilings = candidates(key, forms.rv_reach())
    for tiling in tilings:
        best[tiling] = timed(tiling, 2)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        leader = min(best.values())
        for tiling in [each for each in tilings if best[each] < 1.15 * leader]:
            best[tiling] = min(best[tiling], timed(tiling, 3))
    winner = min(best, key=lambda tiling: best[tiling])
    native.plan.choose(key, winner)
    own, dense = _against_dense(packed, source, activation, forms.call_of(winner, activation), max(seconds / 4, 0.02))
    best[DENSE] = best[winner] * dense / own
    if dense < own:
        native.plan.choose(key, DENSE)
    keep.add((winner.algorithm, winner.chunk))
    for form in set(forms.packed) - keep:
        del forms.packed[form]
    forms.calls.clear()
    return best


def _against_dense(
    packed: native.PackedWeight, source: Tensor, activation: Activation | None, call: native.Call, seconds: float
) -> tuple[float, float]:
    """Medians of a call of the native product and of torch's, one after the other."""
    forms, now, x = packed.forms, clock(), source.clone()
    forms.calls[bucket(x.shape[0]), torch.get_num_threads(), activation] = call
    weight_RK = expand(packed.values, packed.offsets, packed.in_features, packed.n, packed.m, packed.v)
    sides: tuple[Callable[[], object], ...] = (
        lambda: native.run(x, forms, None, activation, None),
        lambda: activate(F.linear(x, weight_RK), activation),
    )
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + seconds
    with torch.no_grad():
        while len(times[0]) < 5 or time.perf_counter() < end:
            for side, found in zip(sides, times, strict=True):
                x.copy_(source)
                start = now()
                side()
                found.append(now() - start)
    own, dense = (statistics.median(found[1:]) for found in times)
    return own, dense
