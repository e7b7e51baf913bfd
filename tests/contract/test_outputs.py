"""Behaviour: every reader sees W~, so a sparse model computes what a copy pruned by hand computes."""

from __future__ import annotations

import torch
from torch.profiler import ProfilerActivity, profile

from contract.hosts import HOST, Host, every_host
from contract.oracle import effective_of, prune_by_hand
from contract.runs import DECAY, STEPS, assert_same, effective_weights, one_step, optimizer_of, sparsify


def check_targets_reach_the_weights(host: Host) -> None:
    """The rules of the host resolve to the table written by hand."""
    model = host.build()
    found = {(slot.name, slot.rows, str(slot.pattern)) for slot in sparsify(host, model).slots}
    assert found == {
        (name, part.rows, part.text) for name, parts in host.weights.items() for part in parts
    }


def check_outputs_equal_a_pruned_copy(host: Host) -> None:
    """At every step of a run, with and without gradients, training and not, to the last bit."""
    model = host.build()
    sparsifier = sparsify(host, model)
    optimizer = optimizer_of(model)
    for step in range(STEPS + 1):
        batch = host.inputs(100 + step)
        for training in {host.training, False}:
            copy = host.pruned_copy(model.train(training), DECAY[step])
            with torch.set_grad_enabled(training):
                assert_same(host.forward(model, batch), host.forward(copy, batch), f"step {step}")
        model.train(host.training)
        if step < STEPS:
            one_step(host, model, sparsifier, optimizer)


def check_readers_see_the_effective_weight(host: Host) -> None:
    """`module.weight` itself, read by whoever reads it, is W ⊙ [Φ + D·(1 - Φ)]."""
    model = host.build()
    sparsifier = sparsify(host, model)
    optimizer = optimizer_of(model)
    for step in range(STEPS + 1):
        for name, dense, seen in effective_weights(host, model):
            assert_same(seen, effective_of(dense, host.weights[name], DECAY[step]), f"{name} at step {step}")
        if step < STEPS:
            one_step(host, model, sparsifier, optimizer)


@every_host
def test_targets_reach_the_weights(host: Host) -> None:
    check_targets_reach_the_weights(host)


@every_host
def test_outputs_equal_a_pruned_copy(host: Host) -> None:
    check_outputs_equal_a_pruned_copy(host)


@every_host
def test_readers_see_the_effective_weight(host: Host) -> None:
    check_readers_see_the_effective_weight(host)


@every_host
def test_the_output_shows_every_weight(host: Host) -> None:
    """What makes the comparison above sharp: pruning any single weight moves the output."""
    batch = host.inputs()
    with torch.no_grad():
        dense = host.forward(host.build(), batch)
        for name, parts in host.weights.items():
            pruned = host.forward(prune_by_hand(host.build(), {name: parts}, 0.0), batch)
            assert not torch.allclose(pruned, dense, atol=1e-5), name


def test_the_fast_path_of_the_encoder_layer_is_taken() -> None:
    """In eval without gradients torch computes the layer in one fused call that reads the weights itself."""
    host = HOST["encoder_layer_eval"]
    model = host.build()
    sparsify(host, model)
    for grad, taken in ((False, True), (True, False)):
        with torch.set_grad_enabled(grad), profile(activities=[ProfilerActivity.CPU]) as record:
            host.forward(model, host.inputs())
        calls = {event.key for event in record.key_averages()}
        assert ("aten::_transformer_encoder_layer_fwd" in calls) == taken
