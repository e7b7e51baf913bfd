"""Behaviour: what the dense weights receive, against the gradient of a copy pruned by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import nmflow
from contract.hosts import BATCH, Host, every_host
from contract.oracle import mask_of
from contract.runs import (
    ARRIVED,
    DECAY,
    HALF_WAY,
    assert_close,
    assert_same,
    gradients,
    mdgf,
    parameters,
    sparsify,
    train,
)

LAMBDA = 2e-4


def expected_gradients(
    host: Host, model: nn.Module, decay: float, pruned_gradient: str, batch: Tensor
) -> dict[str, Tensor | None]:
    """g of the pruned copy where kept; g, D·g or 0 where pruned."""
    copy = host.pruned_copy(model, decay)
    host.loss(copy, batch).backward()
    found = gradients(copy)
    share = {"straight-through": 1.0, "decay": decay, "masked": 0.0}[pruned_gradient]
    weights = parameters(model)
    for name, parts in host.weights.items():
        gradient = found[name]
        assert gradient is not None
        found[name] = torch.where(mask_of(weights[name], parts), gradient, gradient * share)
    return found


def assert_same_gradients(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    assert list(found) == list(expected)
    for name, gradient in expected.items():
        other = found[name]
        assert (gradient is None) == (other is None), name
        if gradient is not None and other is not None:
            assert_same(other, gradient, name)


def check_gradients(host: Host, pruned_gradient: str) -> None:
    """dL/dW has the closed form, with D strictly between and with D = 0."""
    for step in (HALF_WAY, ARRIVED):
        model, _ = train(host, step, mdgf(pruned_gradient))
        batch = host.inputs(50)
        expected = expected_gradients(host, model, DECAY[step], pruned_gradient, batch)
        host.loss(model, batch).backward()
        assert_same_gradients(gradients(model), expected)


def check_sr_ste_term(host: Host) -> None:
    """`edit_gradients` adds λ(1 - Φ)W and nothing else."""
    model, sparsifier = train(host, 2, nmflow.recipe("sr-ste"))
    batch = host.inputs(50)
    expected = expected_gradients(host, model, 0.0, "straight-through", batch)
    host.loss(model, batch).backward()
    assert_same_gradients(gradients(model), expected)
    sparsifier.edit_gradients()
    weights = parameters(model)
    for name, gradient in expected.items():
        found = weights[name].grad
        assert (found is None) == (gradient is None), name
        if gradient is None:
            continue
        if name in host.weights:
            weight = weights[name].detach()
            pruned = ~mask_of(weight, host.weights[name])
            gradient = torch.where(pruned, gradient + LAMBDA * weight, gradient)
        torch.testing.assert_close(found, gradient, rtol=1e-6, atol=1e-8)


def check_only_sr_ste_edits(host: Host) -> None:
    """Other recipes leave the gradients as they are."""
    model, sparsifier = train(host, HALF_WAY)
    host.loss(model, host.inputs(50)).backward()
    before = gradients(model)
    sparsifier.edit_gradients()
    assert_same_gradients(gradients(model), before)


def check_micro_batches(host: Host) -> None:
    """The gradients of four micro-batches add up to the batch's."""
    model, _ = train(host, HALF_WAY)
    if host.has_batch_statistics:
        model.eval()
    batch = host.inputs(50)
    host.loss(model, batch).backward()
    whole = gradients(model)
    model.zero_grad()
    for part in batch.split(BATCH // 4):
        (host.loss(model, part) / 4).backward()
    for name, gradient in gradients(model).items():
        if gradient is not None:
            assert_close(gradient, whole[name], name)


def check_sr_ste_strength(host: Host, scale: float, micro_batches: int) -> None:
    """λ as measured on the gradients that clipping and the optimizer get is 2e-4, whatever was scaled or split."""
    measured = []
    for recipe in ("ste", "sr-ste"):
        model = host.build()
        if host.has_batch_statistics:
            model.eval()
        sparsifier = sparsify(host, model, recipe)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1.0)
        for part in host.inputs(50).split(BATCH // micro_batches):
            scaler.scale(host.loss(model, part) / micro_batches).backward()
        scaler.unscale_(optimizer)
        sparsifier.edit_gradients()
        measured.append(gradients(model))
    without, with_term = measured
    weights = parameters(host.build())
    for name, parts in host.weights.items():
        weight = weights[name].detach()
        kept = mask_of(weight, parts)
        pruned = ~kept & (weight.abs() > 0.05)
        difference = (with_term[name] - without[name])[pruned] / weight[pruned]  # type: ignore[operator]  # not None
        torch.testing.assert_close(difference.median(), torch.tensor(LAMBDA), rtol=1e-2, atol=0)
        assert torch.equal(with_term[name][kept], without[name][kept])  # type: ignore[index]  # not None


def check_checkpointing(host: Host, use_reentrant: bool) -> None:
    """Activation checkpointing changes neither output nor gradients."""
    results = []
    for checkpointed in (False, True):
        model, _ = train(host, HALF_WAY, mdgf("decay"))
        batch = host.inputs(50)
        # The reentrant kind wants an input with a gradient; token ids have none.
        handle = torch.zeros((), requires_grad=True)

        def forward(handle: Tensor, model: nn.Module = model, batch: Tensor = batch) -> Tensor:
            return host.loss(model, batch) + handle

        loss = checkpoint(forward, handle, use_reentrant=use_reentrant) if checkpointed else forward(handle)
        loss.backward()
        results.append((loss.detach(), gradients(model)))
    (plain, plain_gradients), (recomputed, recomputed_gradients) = results
    # The reentrant kind runs the forward without gradients, where a layer in eval may take its fused path.
    (assert_same if host.training else assert_close)(recomputed, plain, "loss")
    assert_same_gradients(recomputed_gradients, plain_gradients)


@every_host
@pytest.mark.parametrize("pruned_gradient", ["straight-through", "decay", "masked"])
def test_gradients(host: Host, pruned_gradient: str) -> None:
    check_gradients(host, pruned_gradient)


@every_host
def test_sr_ste_term(host: Host) -> None:
    check_sr_ste_term(host)


@every_host
def test_only_sr_ste_edits(host: Host) -> None:
    check_only_sr_ste_edits(host)


@every_host
def test_micro_batches(host: Host) -> None:
    check_micro_batches(host)


@every_host
@pytest.mark.parametrize(
    ("scale", "micro_batches"), [(1.0, 1), (65536.0, 1), (1.0, 4), (65536.0, 4)],
    ids=["plain", "scaled", "micro-batches", "scaled-micro-batches"],
)
def test_sr_ste_strength(host: Host, scale: float, micro_batches: int) -> None:
    check_sr_ste_strength(host, scale, micro_batches)


@every_host
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved-tensor-hooks", "reentrant"])
def test_checkpointing(host: Host, use_reentrant: bool) -> None:
    check_checkpointing(host, use_reentrant)
