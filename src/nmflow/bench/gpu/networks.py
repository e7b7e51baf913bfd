"""Whole networks on a GPU: a forward of ViT-Large dense and compressed, and the masks' part of a training step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import nmflow
from nmflow.bench.cells import DENSE, OURS
from nmflow.bench.gpu.cells import EAGER, MASKS, NETWORK, GpuCell
from nmflow.bench.gpu.places import Place
from nmflow.bench.gpu.products import SECONDS, told
from nmflow.bench.networks import Subject, build, make_sparse
from nmflow.bench.training import descend
from nmflow.ops.gpu import measure
from nmflow.ops.gpu.choice import Key
from nmflow.sparsifier import Sparsifier

_TOLERANCE = 0.05
"""Of the largest output, for bfloat16 through a whole network."""
_STEPS = 1_000_000
"""Of the recipe; no benchmark takes as many."""


def measure_network(place: Place, device: str = "cuda", seconds: float = SECONDS) -> GpuCell:
    """One forward in bfloat16: dense as torch calls it, dense compiled, and compressed, tuned and compiled.

    The compiled ones are replayed as CUDA graphs on a GPU. Blocks are compiled, not the whole: they share their code.
    Raises `ArithmeticError` where the compressed network does not give what the dense one gives.
    """
    notes: list[str] = []
    on_gpu = device != "cpu"
    subject = _on(build(place.what, place.tokens, 0), device, getattr(torch, place.dtype))
    make_sparse(subject.model, {"ff": place.pattern})
    compressed = nmflow.for_inference(nmflow.compress(subject.model))
    compiled = _compiled(copy.deepcopy(subject.model))
    with torch.inference_mode(), told(notes):
        tuned = nmflow.tune(compressed, subject.inputs, seconds) if on_gpu else ()
        in_graphs = [each for each in tuned if isinstance(each.key, Key) and each.key.graph]
        chosen = ", ".join(dict.fromkeys(each.choice.line() for each in in_graphs))
        _compiled(compressed)
        wanted, found = subject.logits(subject.model), subject.logits(compressed)
        error = float((found - wanted).abs().max() / wanted.abs().max())
        if not error <= _TOLERANCE:
            raise ArithmeticError(f"compressed, its outputs differ by {error:.2g} of the largest one")
        models = {EAGER: subject.model, NETWORK: compiled, OURS: compressed}
        sides: dict[str, Callable[[], object]] = {}
        for name, model in models.items():
            run = _forward(subject, model)
            sides[name] = measure.replayed([run]) if on_gpu and name != EAGER else run
            run()
        times = measure.medians(sides, on_gpu, seconds)
    return GpuCell(place, {name: taken * 1e6 for name, taken in times.items()}, chosen, tuple(notes))


def measure_training(place: Place, device: str = "cuda", seconds: float = SECONDS) -> GpuCell:
    """One step under bfloat16 autocast, dense and with new masks at every step; and the masks alone."""
    notes: list[str] = []
    subject = _on(build(place.what, place.tokens, 0), device)
    sparse = copy.deepcopy(subject.model)
    sparsifier = Sparsifier(sparse, {"ff": place.pattern}, "ste", _STEPS)
    sides = {
        DENSE: _step(subject, subject.model, None, place.dtype),
        OURS: _step(subject, sparse, sparsifier, place.dtype),
        MASKS: sparsifier.step,
    }
    with told(notes):
        times = measure.medians(sides, device != "cpu", seconds)
    return GpuCell(place, {name: taken * 1e6 for name, taken in times.items()}, notes=tuple(notes))


def _on(subject: Subject, device: str, dtype: torch.dtype = torch.float32) -> Subject:
    model, inputs = subject.model.to(device, dtype), subject.inputs.to(device, dtype)
    return Subject(subject.name, model, inputs, subject.classes, subject.decodes)


def _forward(subject: Subject, model: nn.Module) -> Callable[[], object]:
    return lambda: subject.logits(model)


def _compiled(model: nn.Module) -> nn.Module:
    """The model, its blocks compiled in place."""
    blocks: Any = getattr(model, "blocks", None)
    for block in [model] if blocks is None else blocks:
        block.compile(dynamic=False)
    return model


def _step(subject: Subject, model: nn.Module, sparsifier: Sparsifier | None, dtype: str) -> Callable[[], object]:
    model.train()
    device = subject.inputs.device
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    labels = torch.randint(subject.classes, (len(subject.inputs),), device=device)

    def step() -> None:
        with torch.autocast(device.type, getattr(torch, dtype)):
            loss = F.cross_entropy(subject.logits(model), labels)
        descend(loss, optimizer, sparsifier)
        if sparsifier is not None:
            sparsifier.step()

    return step
