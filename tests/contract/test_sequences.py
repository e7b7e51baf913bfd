"""Behaviour: recipes that follow each other. Nothing that the one before let go comes back with the next one's D."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import nmflow
from contract.hosts import Host, every_host
from contract.oracle import Part, effective_of, mask_of, overfull_blocks
from contract.runs import (
    STEPS,
    assert_same,
    effective_weights,
    gradients,
    one_step,
    optimizer_of,
    parameters,
    sparsify,
)

DECAY = (0.0, 0.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0)
"""D at steps 0 ... 8: 2:4 at once, from step 2 the difference between it and the target decays, 1 - j/4."""


def structure_then_mask(pruned_gradient: str) -> object:
    mask = nmflow.recipe("mdgf-linear", dense=0.0, decay_end=4 / 6, pruned_gradient=pruned_gradient)
    first = nmflow.recipe("ste", pruned_gradient=pruned_gradient)
    return nmflow.sequence(
        {"recipe": first, "until": 0.25, "pattern": "2:4"}, {"recipe": mask, "until": 1.0}
    )


def outer_parts(parts: tuple[Part, ...]) -> tuple[Part, ...]:
    return tuple(replace(part, n=2, m=4) for part in parts)


def parts_at(step: int, parts: tuple[Part, ...]) -> tuple[Part, ...]:
    """What Φ keeps: 2:4 during the first recipe, the target from then on."""
    return outer_parts(parts) if step < 2 else parts


def check_sequence(host: Host) -> None:
    """W~ and the gradients at every step of a run of two recipes."""
    model = host.build()
    sparsifier = sparsify(host, model, structure_then_mask("decay"))
    optimizer = optimizer_of(model)
    for step in range(STEPS + 1):
        for name, dense, seen in effective_weights(host, model):
            parts = host.weights[name]
            outer = outer_parts(parts) if step >= 2 else ()
            expected = effective_of(dense, parts_at(step, parts), DECAY[step], outer)
            assert_same(seen, expected, f"{name} at step {step}")
        if DECAY[step]:
            _check_gradients(host, model, step)
        if step < STEPS:
            one_step(host, model, sparsifier, optimizer)


def _check_gradients(host: Host, model: nn.Module, step: int) -> None:
    """g where kept, D·g in what 2:4 keeps besides, 0 elsewhere."""
    copy = host.build()
    copy.load_state_dict(model.state_dict())
    with torch.no_grad():
        weights_of_copy = parameters(copy)
        for name, _, seen in effective_weights(host, model):
            weights_of_copy[name].copy_(seen)
    batch = host.inputs(50)
    for each in (copy, model):
        host.loss(each, batch).backward()
    found, expected, weights = gradients(model), gradients(copy), parameters(model)
    for name, parts in host.weights.items():
        gradient, weight = expected[name], weights[name]
        assert gradient is not None
        assert found[name] is not None
        pruned = torch.where(mask_of(weight, outer_parts(parts)), gradient * DECAY[step], 0.0)
        kept = mask_of(weight, parts_at(step, parts))
        # Not to the last bit: of a tied weight D·g is summed over its readers.
        torch.testing.assert_close(found[name], torch.where(kept, gradient, pruned), rtol=1e-6, atol=1e-8)
    model.zero_grad()


@every_host
def test_sequence(host: Host) -> None:
    check_sequence(host)


@pytest.mark.parametrize("second", ["mdgf-linear", "mdgf-exponential"])
def test_masks_of_two_steps_are_not_blended(second: str) -> None:
    """With Φ of an older step, W~ would leave Φ_outer: three non-zeros in a block of which 2:4 is left."""
    recipe = nmflow.sequence(("sdgf-stepwise", 0.5, "2:4"), (second, 1.0))
    model = nn.Linear(4, 1, bias=False)
    with pytest.raises(ValueError, match=r"mask_every=10: .*use mask_every=1"):
        nmflow.Sparsifier(model, {"weight": "1:4"}, recipe, 100, mask_every=10)
    assert type(model) is nn.Linear
    sparsifier = nmflow.Sparsifier(model, {"weight": "1:4"}, recipe, 100)
    for step, weights in ((70, [4.0, 3.0, 2.0, 1.0]), (71, [1.0, 2.0, 3.0, 4.0])):
        with torch.no_grad():
            sparsifier.dense_weight("weight").copy_(torch.tensor([weights]))
        sparsifier.step(n=step)
        assert not overfull_blocks(model.weight, [Part(2, 4)])


def test_a_sequence_that_does_not_blend_keeps_its_masks_for_a_while() -> None:
    recipe = nmflow.sequence(("mdgf-linear", 0.5, "3:4"), (nmflow.recipe("ste"), 1.0))
    model = nn.Linear(4, 1, bias=False)
    nmflow.Sparsifier(model, {"weight": "1:4"}, recipe, 100, mask_every=10)
