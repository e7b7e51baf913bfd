"""Which kernel each compressed layer runs at the sizes it really sees: measured once, kept in a file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from nmflow.atomic import refuse_bad_place
from nmflow.ops import native, native_plan, native_tune
from nmflow.ops.gpu import choice as gpu_choice
from nmflow.ops.gpu import linear as gpu_linear
from nmflow.ops.gpu import measure as gpu_measure
from nmflow.ops.gpu import product as gpu_product
from nmflow.ops.gpu import two_four as gpu_two_four
from nmflow.runtime.example import Example, run
from nmflow.runtime.modules import NMConv2d, NMLinear, PackedRows, PackedWeight

Key: TypeAlias = native_plan.Key | gpu_choice.Key
Choice: TypeAlias = native_plan.Tiling | gpu_choice.Way


@dataclass(frozen=True)
class Tuned:
    """A choice for every weight of a shape, pattern and dtype, at a number of tokens (their power of two).

    `gain`: time of torch's dense product over that of the choice; None where it came from a file.
    """

    key: Key
    choice: Choice
    gain: float | None

    def line(self) -> str:
        """For people."""
        gain = "" if self.gain is None else f", {self.gain:.2f} times dense"
        return f"{self.key.line()}: {self.choice.line()}{gain}"


def tune(
    model: nn.Module,
    example: Example | Callable[[], object],
    seconds: float = 0.3,
    plan: str | os.PathLike[str] | None = None,
) -> tuple[Tuned, ...]:
    """Time the kernels of a compressed model's layers at the sizes that `example` brings, and use the fastest.

    `example` is the model's input (a tensor, its positional or keyword arguments), or a function that runs the model,
    such as a whole generation. The dense product is among the candidates, so no layer is slower than it was; the
    choices hold for this process, for torch's present number of threads, or for this GPU, where what is replayed in a
    CUDA graph has choices of its own. `seconds` is spent on each combination of shape, pattern and token count. With
    `plan`, a JSON file, choices that it holds are taken from it, and it is written with the rest.

    Raises `RuntimeError` where the kernels of the model's device are missing, `ValueError` where no layer is
    compressed, where layers lie on a CPU and on a GPU, or the file is no plan for this device; `OSError`, before
    anything is measured, where it cannot be written.
    """
    if plan is not None:
        refuse_bad_place(Path(plan))
    seen = _sizes(model, example)
    devices = {rows.values.device.type for rows, _ in seen}
    if len(devices) != 1:
        where = f"compressed layers lie on {' and '.join(sorted(devices))}"
        wrong = where if devices else "no compressed layer was called"
        raise ValueError(f"{wrong}; tune(nmflow.compress(model), example), on one device")
    on_gpu = devices == {"cuda"}
    missing = _missing_on_gpu() if on_gpu else native.why_not(device=next(iter(devices)))
    if missing is not None:
        raise RuntimeError(f"nothing to tune: {missing}")
    plans: Any = gpu_linear.plan if on_gpu else native.plan
    dense: Any = gpu_choice.DENSE if on_gpu else native_plan.DENSE
    known = type(plans).load(plan) if plan is not None and Path(plan).exists() else type(plans)()
    plans.adopt(known)
    found: dict[Key, Tuned] = {}
    for rows, tokens in seen:
        for key, measure, holds in (_on_gpu if on_gpu else _on_cpu)(rows, tokens):
            if key in found:
                continue
            if key in known.choices and holds(known.choices[key]):
                found[key] = Tuned(key, known.choices[key], None)
                continue
            times = measure(seconds)
            choice = plans.choices[key]
            found[key] = Tuned(key, choice, times[dense] / times[choice])
    if plan is not None:
        known.adopt(plans.part(found))
        known.save(plan)
    return tuple(found.values())


def _missing_on_gpu() -> str | None:
    reasons = gpu_product.why_not(), gpu_two_four.why_not()
    return None if None in reasons else "; ".join(map(str, reasons))


_Measure = Callable[[float], Mapping[Any, float]]
_Holds = Callable[[Any], bool]
"""Whether a choice from a file may be used as it is."""


def _on_cpu(rows: PackedRows, tokens: int) -> Iterator[tuple[Key, _Measure, _Holds]]:
    pattern = rows.pattern
    packed = native.prepare(rows.values, rows.offsets, *rows.shape, pattern.n, pattern.m, v=pattern.v)
    key = packed.forms.key(tokens, torch.get_num_threads())
    yield key, lambda seconds: native_tune.tune(packed, tokens, seconds), lambda choice: True


def _on_gpu(rows: PackedRows, tokens: int) -> Iterator[tuple[Key, _Measure, _Holds]]:
    """Eager, and in a CUDA graph."""
    pattern = rows.pattern
    weight = gpu_linear.Weight(rows.values, rows.offsets, rows.shape, pattern.n, pattern.m, pattern.v)
    for graph in (False, True):
        holds = partial(gpu_measure.still_right, weight=weight, tokens=tokens)
        yield weight.key(tokens, graph), partial(gpu_measure.tune, weight, tokens, graph=graph), holds


def _sizes(model: nn.Module, example: Any) -> list[tuple[PackedRows, int]]:
    """Compressed rows and the numbers of tokens that an example run multiplies them with."""
    seen: dict[tuple[int, int], tuple[PackedRows, int]] = {}

    def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        packed: PackedWeight = module.weight_nm  # type: ignore[assignment]  # what these two classes have
        x = inputs[0]
        if isinstance(module, NMConv2d):
            if x.dim() != 4 or not module.is_product(x):
                return
            x = module.windows(x)
        tokens = x.shape[:-1].numel()
        for rows in packed.multiplied():
            if isinstance(rows, PackedRows) and tokens:
                seen[id(rows), tokens] = rows, tokens

    layers = [each for each in model.modules() if isinstance(each, NMLinear | NMConv2d)]
    handles = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        with torch.no_grad():
            example() if callable(example) else run(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return list(seen.values())
