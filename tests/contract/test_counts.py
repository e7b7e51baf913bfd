"""Behaviour: masks are computed once an optimizer step, whatever happens in between."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from contract.hosts import Host, every_host
from contract.runs import HALF_WAY, optimizer_of, sparsify, train
from nmflow.ops import Kernel, registry


class Counter:
    """Counts the runs of every kernel that takes W to W~."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        watched = [self._watched(kernel) if kernel.task == "project" else kernel for kernel in registry._KERNELS]
        monkeypatch.setattr(registry, "_KERNELS", watched)

    def _watched(self, kernel: Kernel) -> Kernel:
        def run(*args: object, **kwargs: object) -> object:
            self.calls += 1
            return kernel.run(*args, **kwargs)

        return replace(kernel, run=run)

    def since(self) -> int:
        calls, self.calls = self.calls, 0
        return calls


def check_one_projection_a_step(host: Host, counter: Counter) -> None:
    """One mask per slot in `step()`; none in forwards, evals, micro-batches, recomputation or reads."""
    model, sparsifier = train(host, HALF_WAY)
    optimizer = optimizer_of(model)
    handle = torch.zeros((), requires_grad=True)
    counter.since()
    for _ in range(3):
        for part in host.inputs(50).split(2):
            host.loss(model, part).backward()
        checkpoint(lambda handle: host.loss(model, host.inputs(51)) + handle, handle, use_reentrant=False).backward()
        with torch.no_grad():
            host.forward(model.eval(), host.inputs(52))
        model.train(host.training)
        model.state_dict()
        sparsifier.edit_gradients()
        assert counter.since() == 0, "before the optimizer's step"
        optimizer.step()
        sparsifier.step()
        assert counter.since() == len(sparsifier.slots), "in the step"
        host.forward(model, host.inputs(53))
        sparsifier.report()
        assert counter.since() == 0, "after the step"


def check_mask_every(host: Host, counter: Counter) -> None:
    """With `mask_every=3` masks are taken at every third step only."""
    model = host.build()
    sparsifier = sparsify(host, model, "ste", total_steps=9, mask_every=3)
    optimizer = optimizer_of(model)
    taken = []
    for _ in range(9):
        counter.since()
        host.loss(model, host.inputs(50)).backward()
        optimizer.step()
        sparsifier.step()
        host.forward(model, host.inputs(51))
        taken.append(counter.since() // len(sparsifier.slots))
    assert taken == [0, 0, 1, 0, 0, 1, 0, 0, 1]


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Counter:
    return Counter(monkeypatch)


@every_host
def test_one_projection_a_step(host: Host, counter: Counter) -> None:
    check_one_projection_a_step(host, counter)


@every_host
def test_mask_every(host: Host, counter: Counter) -> None:
    check_mask_every(host, counter)
