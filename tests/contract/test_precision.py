"""Behaviour: autocast, other float types, and another memory format."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from contract.hosts import HOST, Host, every_host
from contract.oracle import effective_of
from contract.runs import (
    ARRIVED,
    DECAY,
    HALF_WAY,
    assert_same,
    effective_weights,
    one_step,
    optimizer_of,
    sparsify,
    train,
)


def _batch(host: Host, dtype: torch.dtype) -> Tensor:
    batch = host.inputs(50)
    return batch.to(dtype) if batch.is_floating_point() else batch


def check_autocast(host: Host) -> None:
    """Under bfloat16 autocast the output is the pruned copy's, also after a step inside one autocast region."""
    model = host.build()
    sparsifier = sparsify(host, model)
    optimizer = optimizer_of(model)
    batch = host.inputs(50)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for step in range(ARRIVED + 1):
            # A copy whose casts are cached under the ids of freed weights would be a faulty oracle.
            torch.clear_autocast_cache()
            expected = host.forward(host.pruned_copy(model, DECAY[step]), batch)
            torch.clear_autocast_cache()
            assert_same(host.forward(model, batch), expected, f"step {step}")
            one_step(host, model, sparsifier, optimizer)


def check_autocast_inside_one_region(host: Host) -> None:
    """Autocast caches casts of weights; W~ of an earlier step must not be among them."""
    model, sparsifier = train(host, HALF_WAY)
    if host.has_batch_statistics:
        model.eval()
    batch = host.inputs(50)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        before = host.forward(model, batch)
        sparsifier.step()
        after = host.forward(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert_same(after, host.forward(host.pruned_copy(model, DECAY[HALF_WAY + 1]), batch))
    assert not torch.equal(before, after)


def check_another_dtype(host: Host, dtype: torch.dtype) -> None:
    """`model.to(dtype)` in the middle of a run takes W~ with it, and the run goes on."""
    model, sparsifier = train(host, HALF_WAY)
    model.to(dtype)
    for step in (HALF_WAY, HALF_WAY + 1):
        for name, dense, seen in effective_weights(host, model):
            assert dense.dtype == dtype
            assert_same(seen, effective_of(dense, host.weights[name], DECAY[step]), f"{name} at step {step}")
        batch = _batch(host, dtype)
        copy = host.pruned_copy(model, DECAY[step])
        assert_same(host.forward(model, batch), host.forward(copy, batch), f"step {step}")
        with torch.no_grad():  # in place of an optimizer: torch's bfloat16 convolutions at times give NaN gradients
            for parameter in model.parameters():
                parameter.add_(torch.cos(torch.arange(parameter.numel())).reshape(parameter.shape), alpha=0.1)
        sparsifier.step()


@every_host
def test_autocast(host: Host) -> None:
    check_autocast(host)


@every_host
def test_autocast_inside_one_region(host: Host) -> None:
    check_autocast_inside_one_region(host)


@every_host
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_another_dtype(host: Host, dtype: torch.dtype) -> None:
    check_another_dtype(host, dtype)


@pytest.mark.parametrize("name", ["conv2d", "timm_resnet"])
def test_channels_last(name: str) -> None:
    """Masks follow the axis, not the memory: a channels-last weight is pruned alike."""
    host = HOST[name]
    model, sparsifier = train(host, HALF_WAY)
    model.to(memory_format=torch.channels_last)
    for step in (HALF_WAY, HALF_WAY + 1):
        for weight, dense, seen in effective_weights(host, model):
            assert dense.is_contiguous(memory_format=torch.channels_last)
            assert_same(seen, effective_of(dense, host.weights[weight], DECAY[step]), weight)
        one_step(host, model, sparsifier, optimizer_of(model))


def test_a_weight_with_gaps_in_memory() -> None:
    """A parameter that is a transposed view is read and pruned along its rows all the same."""
    host = HOST["linear"]
    model = host.build()
    model.weight = nn.Parameter(model.weight.detach().t().contiguous().t())
    sparsifier = sparsify(host, model)
    sparsifier.step(ARRIVED)
    ((name, dense, seen),) = effective_weights(host, model)
    assert_same(seen, effective_of(dense, host.weights[name], 0.0))
