"""Which kernel each compressed layer runs at the sizes it really sees: measured once, kept in a file."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nmflow.ops import native
from nmflow.ops.native_plan import DENSE, Key, NativePlan, Tiling
from nmflow.runtime.example import Example, run
from nmflow.runtime.modules import NMConv2d, NMLinear, PackedRows, PackedWeight


@dataclass(frozen=True)
class Tuned:
    """A choice for every weight of a shape, pattern and dtype, at a number of tokens (their power of two).

    `gain`: time of torch's dense product over that of the choice; None where it came from a file.
    """

    key: Key
    choice: Tiling
    gain: float | None

    def line(self) -> str:
        """For people."""
        tokens, gain = 1 << self.key.bucket, "" if self.gain is None else f", {self.gain:.2f} times dense"
        one = self.choice
        how = "dense" if one == DENSE else f"{one.algorithm} {one.chunk} {one.tile_tokens}x{one.tile_rows} {one.split}"
        weight = f"{self.key.out_features}x{self.key.in_features} {self.key.n}:{self.key.m} {self.key.dtype}"
        return f"{weight}, up to {tokens} tokens on {self.key.threads} threads: {how}{gain}"


def tune(
    model: nn.Module,
    example: Example | Callable[[], object],
    seconds: float = 0.3,
    plan: str | os.PathLike[str] | None = None,
) -> tuple[Tuned, ...]:
    """Time the kernels of a compressed model's layers at the sizes that `example` brings, and use the fastest.

    `example` is the model's input (a tensor, its positional or keyword arguments), or a function that runs the model,
    such as a whole generation. The dense product is among the candidates, so no layer is slower than it was; the
    choices hold for this process, for torch's present number of threads. `seconds` is spent on each combination of
    shape, pattern and token count. With `plan`, a JSON file, choices that it holds are taken from it, and it is
    written with the rest.

    Raises `RuntimeError` where the native library is missing, `ValueError` where no layer is compressed or the file is
    no plan.
    """
    missing = native.why_not()
    if missing is not None:
        raise RuntimeError(f"nothing to tune: {missing}")
    known = NativePlan.load(plan) if plan is not None and Path(plan).exists() else NativePlan()
    seen = _sizes(model, example)
    if not seen:
        raise ValueError("no compressed layer was called on the CPU; tune(nmflow.compress(model), example)")
    native.plan.adopt(known)
    found: dict[Key, Tuned] = {}
    for rows, tokens in seen:
        values, offsets, pattern = rows.values, rows.offsets, rows.pattern
        packed = native.prepare(values, offsets, *rows.shape, pattern.n, pattern.m, v=pattern.v)
        key = packed.forms.key(tokens, torch.get_num_threads())
        if key in found:
            continue
        if key in known.choices:
            found[key] = Tuned(key, known.choices[key], None)
            continue
        times = native.tune(packed, tokens, seconds)
        choice = native.plan.choices[key]
        found[key] = Tuned(key, choice, times[DENSE] / times[choice])
    if plan is not None:
        NativePlan({**known.choices, **{key: tuned.choice for key, tuned in found.items()}}).save(plan)
    return tuple(found.values())


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
            if isinstance(rows, PackedRows) and x.is_cpu and tokens:
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
