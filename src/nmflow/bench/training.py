"""What sparsity costs a training step: dense against sparse in turns, and the masks' part of the step."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nmflow.bench import goals
from nmflow.bench.kernels import Tell
from nmflow.bench.machine import Setup, examine, require_native
from nmflow.bench.networks import Subject, build
from nmflow.bench.settings import ModelSettings
from nmflow.bench.timing import computing, in_turns
from nmflow.ops.native_tune import clock
from nmflow.sparsifier import Sparsifier

_DENSE, _SPARSE = "dense", "sparse"
_STEPS = 1_000_000
"""Of the recipe; no benchmark takes as many."""


@dataclass(frozen=True)
class TrainingResult:
    """What `nmflow bench train` answers: medians of forward, backward and AdamW, in float32."""

    setup: Setup
    name: str
    targets: dict[str, str]
    batch: int
    dense_ms: float
    sparse_ms: float
    over_dense: float
    """Time of a sparse step over that of a dense one."""
    masks_ms: float
    """`Sparsifier.step` alone: new masks and W~ of every targeted weight."""
    masks_share: float
    """Its part of the sparse step."""
    goal: float | None
    disturbed: int

    @property
    def verdict(self) -> goals.Verdict:
        """The masks' part beside its goal."""
        name = f"{self.name}, batch {self.batch}, masks' part of a training step"
        return goals.Verdict(name, self.masks_share, self.goal, at_most=True)

    def summary(self) -> list[str]:
        """For people."""
        return [
            f"a step: dense {self.dense_ms:.1f} ms, sparse {self.sparse_ms:.1f} ms, x{self.over_dense:.3f}",
            f"masks and W~: {self.masks_ms:.2f} ms, {self.masks_share:.2%} of the sparse step",
            *goals.disturbed(self.disturbed),
            *goals.short([self.verdict]),
        ]

    def markdown(self) -> str:
        """The same as a page."""
        rules = ", ".join(f"{rule} {pattern}" for rule, pattern in self.targets.items())
        head = [f"# Training {self.name}: {rules}, batch {self.batch}, float32", ""]
        return "\n".join([*head, *(f"- {line.strip()}" for line in [*self.setup.lines(), *self.summary()]), ""])

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        facts = {"format": "nmflow-bench-train", "version": 1, **asdict(self)}
        return {**facts, "reached": self.verdict.reached}


def bench_train(name: str, settings: ModelSettings, tell: Tell) -> TrainingResult:
    """Time training steps of a network without and with a sparsifier that takes new masks at every step.

    Raises `ValueError` where the native library is missing, or the network, or its targets do not fit.
    """
    require_native()
    with computing(settings.threads):
        subject = build(name, settings.batch, settings.prompt)
        sparse = copy.deepcopy(subject.model)
        sparsifier = Sparsifier(sparse, settings.targets, "ste", _STEPS)
        setup = examine()
        for line in setup.lines():
            tell(line)
        masks: list[float] = []
        sides = {
            _DENSE: _steps(subject, subject.model, None, masks),
            _SPARSE: _steps(subject, sparse, sparsifier, masks),
        }
        timed = in_turns(sides, settings.rounds, seconds=0.1, tries=2)
    # The first steps wake threads and fill caches; of the rest a median is not moved by a few.
    masks_seconds, sparse_seconds = statistics.median(masks[1:]), timed.median(_SPARSE)
    return TrainingResult(
        setup=setup,
        name=name,
        targets=dict(settings.targets),
        batch=settings.batch,
        dense_ms=timed.median(_DENSE) * 1e3,
        sparse_ms=sparse_seconds * 1e3,
        over_dense=timed.ratio(_DENSE, _SPARSE),
        masks_ms=masks_seconds * 1e3,
        masks_share=masks_seconds / sparse_seconds,
        goal=goals.of_mask_share(name, settings.batch, settings.threads),
        disturbed=timed.disturbed,
    )


def _steps(
    subject: Subject, model: nn.Module, sparsifier: Sparsifier | None, masks: list[float]
) -> Callable[[], object]:
    """One optimizer step on the same batch; the seconds of every `Sparsifier.step` are added to `masks`."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    targets = subject.inputs if subject.decodes else torch.randint(subject.classes, (len(subject.inputs),))

    now = clock()

    def step() -> None:
        loss = F.cross_entropy(subject.logits(model).flatten(0, -2), targets.flatten())
        descend(loss, optimizer, sparsifier)
        if sparsifier is not None:
            start = now()
            sparsifier.step()
            masks.append(now() - start)

    return step


def descend(loss: Tensor, optimizer: torch.optim.Optimizer, sparsifier: Sparsifier | None) -> None:
    """A training step from the loss on, but for the new masks."""
    loss.backward()  # type: ignore[no-untyped-call]  # not annotated
    if sparsifier is not None:
        sparsifier.edit_gradients()
    optimizer.step()
    optimizer.zero_grad()
