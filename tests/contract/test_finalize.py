"""Behaviour: at the end the model is an ordinary one again, and its weights are N:M."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import nmflow
from contract.hosts import HOST, Host, every_host
from contract.oracle import mask_of, overfull_blocks
from contract.runs import (
    HALF_WAY,
    STEPS,
    assert_close,
    assert_same,
    one_step,
    optimizer_of,
    parameters,
    sparsify,
    train,
)


def check_finalize(host: Host, until: int) -> None:
    """Classes, names and objects as before attaching; kept weights keep their bits, pruned ones are zero."""
    ordinary = host.build()
    model, sparsifier = train(host, until)
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    objects = parameters(model)
    model.eval()
    with torch.no_grad():
        before = host.forward(model, host.inputs(50))
    report = sparsifier.finalize()

    assert [type(module) for module in model.modules()] == [type(module) for module in ordinary.modules()]
    assert list(model.state_dict()) == list(ordinary.state_dict())
    assert all(value is objects[name] for name, value in parameters(model).items())
    first_names = _first_names(model)
    for name, value in model.state_dict().items():
        parts = host.weights.get(first_names.get(name, name), ())
        expected = dense[name]
        if parts:
            expected = torch.where(mask_of(dense[name], parts), dense[name], 0.0)
            assert not overfull_blocks(value, parts), name
        assert_same(value, expected, name)
    for module in model.modules():
        assert not [key for key in vars(module) if "effective" in key], "something of the run is left behind"

    assert report.finalized
    assert report.early == (until < STEPS)
    assert {slot.label.split("[")[0] for slot in report.slots} == set(host.weights)
    with torch.no_grad():
        after = host.forward(model, host.inputs(50))
    if until == STEPS:
        assert_same(after, before, "the output")
    model.train(host.training)
    host.loss(model, host.inputs(60)).backward()                  # an ordinary model trains on
    assert all(objects[name].grad is not None for name in host.weights)


def _first_names(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter -> its first one; they differ where it is tied."""
    first: dict[int, str] = {}
    every = model.named_parameters(remove_duplicate=False)
    return {name: first.setdefault(id(parameter), name) for name, parameter in every}


def check_verified(host: Host) -> None:
    model, sparsifier = train(host, STEPS)
    sparsifier.finalize()
    assert nmflow.verify(model).ok
    name, parts = next(iter(host.weights.items()))
    weight = parameters(model)[name]
    place = int((weight.detach().flatten() == 0).nonzero()[0])
    with torch.no_grad():
        weight.view(-1)[place] = 1e-30
    assert overfull_blocks(weight, parts)
    assert not nmflow.verify(model).ok


def check_compressed(host: Host) -> None:
    """The runtime computes what the finalized model computes, and decompresses to its bits."""
    model, sparsifier = train(host, STEPS)
    sparsifier.finalize()
    model.eval()
    batch = host.inputs(50)
    compressed = nmflow.compress(model)
    restored = nmflow.decompress(compressed)
    with torch.no_grad():
        expected = host.forward(model, batch)
        assert_close(host.forward(compressed, batch), expected, "compressed")
        assert_same(host.forward(restored, batch), expected, "decompressed")
    assert [type(module) for module in restored.modules()] == [type(module) for module in model.modules()]
    assert list(restored.state_dict()) == list(model.state_dict())
    state = model.state_dict()
    for name, value in restored.state_dict().items():
        assert_same(value, state[name], name)


def check_an_average_is_finalized_in_its_place(host: Host) -> None:
    """A deep copy can be finalized while the run goes on."""
    model, sparsifier = train(host, STEPS - 1)
    average = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in average.parameters():
            parameter.mul_(-0.5)
    one_step(host, model, sparsifier, optimizer_of(model))
    dense = {name: value.clone() for name, value in average.state_dict().items()}
    sparsifier.finalize(average)
    weights = parameters(average)
    for name, parts in host.weights.items():
        expected = torch.where(mask_of(dense[name], parts), dense[name], 0.0)
        assert_same(weights[name].detach(), expected, name)
        assert not overfull_blocks(weights[name], parts)
    assert nmflow.verify(average).ok
    sparsifier.finalize()
    assert nmflow.verify(model).ok


@every_host
@pytest.mark.parametrize("until", [STEPS, HALF_WAY, 0], ids=["at-the-end", "half-way", "at-once"])
def test_finalize(host: Host, until: int) -> None:
    check_finalize(host, until)


@every_host
def test_verified(host: Host) -> None:
    check_verified(host)


@every_host
def test_compressed(host: Host) -> None:
    check_compressed(host)


@every_host
def test_an_average_is_finalized_in_its_place(host: Host) -> None:
    check_an_average_is_finalized_in_its_place(host)


@every_host
def test_a_model_can_be_sparsified_again(host: Host) -> None:
    model, sparsifier = train(host, STEPS)
    sparsifier.finalize()
    again = sparsify(host, model)
    one_step(host, model, again, optimizer_of(model))
    again.finalize()
    for name, parts in host.weights.items():
        assert not overfull_blocks(parameters(model)[name], parts)


def test_a_mask_that_does_not_fit_is_found_before_anything_is_cut() -> None:
    host = HOST["encoder_layer_train"]
    model, sparsifier = train(host, STEPS, nmflow.recipe("ste", freeze=True))
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    last = max(sparsifier._progress.fixed)
    sparsifier._progress.fixed[last].fill_(True)                  # as a defect would leave it
    with pytest.raises(RuntimeError, match="the final mask is not"):
        sparsifier.finalize()
    for name, value in model.state_dict().items():
        assert_same(value, dense[name], name)
