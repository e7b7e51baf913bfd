"""Behaviour: masks that do not follow from the weights of the moment, each against its definition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nmflow
from contract.hosts import HOST, Host, every_host
from contract.oracle import Part, mask_of, overfull_blocks
from contract.runs import (
    ARRIVED,
    DECAY,
    STEPS,
    assert_same,
    effective_weights,
    one_step,
    optimizer_of,
    parameters,
    sparsify,
)

Masks = dict[str, Tensor]
NextMask = Callable[[int, Tensor, Tensor, Sequence[Part]], Tensor]
"""(step, dense W, mask of the step before, parts) -> mask of the step."""


def check_masks(host: Host, recipe: object, next_mask: NextMask, decay: Sequence[float], **options: object) -> None:
    """W~ = W ⊙ [Φ + D·(1 - Φ)] with the Φ that the rule says, at every step, and its changes in the report."""
    model = host.build()
    sparsifier = sparsify(host, model, recipe, **options)
    optimizer = optimizer_of(model)
    weights = parameters(model)
    masks = {name: torch.ones_like(weights[name], dtype=torch.bool) for name in host.weights}
    changed: dict[str, int] = {}
    differed = False
    for step in range(STEPS + 1):
        for name, dense, seen in effective_weights(host, model):
            before = masks[name]
            masks[name] = next_mask(step, dense, masks[name], host.weights[name])
            changed[name] = int((masks[name] != before).sum()) if step else 0
            coefficient = masks[name] + decay[step] * (1 - masks[name].to(dense.dtype))
            assert_same(seen, dense * coefficient, f"{name} at step {step}")
            differed |= not torch.equal(masks[name], mask_of(dense, host.weights[name]))
        assert sparsifier.report().flips == sum(changed.values()), f"step {step}"
        if step < STEPS:
            one_step(host, model, sparsifier, optimizer)
    assert differed, "fresh masks would have passed as well"
    sparsifier.finalize()
    for name, mask in masks.items():
        assert not weights[name][~mask].count_nonzero(), name


def frozen_mask(step: int, weight: Tensor, mask: Tensor, parts: Sequence[Part]) -> Tensor:
    """Fresh up to the first step of fine-tune, then kept."""
    return mask if step == 0 or step > ARRIVED else mask_of(weight, parts)


def mask_of_every_third(step: int, weight: Tensor, mask: Tensor, parts: Sequence[Part]) -> Tensor:
    """Taken where the pattern changes (step 1) and at every third step."""
    return mask_of(weight, parts) if step in (1, 3, 6) else mask


INHERITED = {"dense": 1 / 8, "decay_end": 6 / 8}                  # patterns at steps 1 ... 6, at most five


def inherited_mask(
    step: int, weight: Tensor, mask: Tensor, parts: Sequence[Part], recipe: nmflow.Recipe | None = None
) -> Tensor:
    """In a new stage the top N among the survivors of the one before; fixed within a stage."""
    recipe = recipe or nmflow.recipe("idp", **INHERITED)
    for part in parts:
        now, before = (
            recipe.at(max(s, 0), STEPS, nmflow.Pattern(part.n, part.m)).pattern for s in (step, step - 1)
        )
        if not now.is_dense and (now != before or step == 0):
            stage = replace(part, n=now.n, m=now.m)
            # Weights of other parts keep their mask: this one says nothing of them.
            mask = mask & mask_of(weight, [stage], scores=torch.where(mask, weight, 0.0))
    return mask


def check_inherited(host: Host) -> None:
    check_masks(host, nmflow.recipe("idp", **INHERITED), inherited_mask, [0.0] * (STEPS + 1))


def check_frozen(host: Host) -> None:
    recipe = nmflow.recipe("mdgf-linear", dense=1 / 8, decay_end=5 / 8, freeze=True)
    check_masks(host, recipe, frozen_mask, DECAY)


def check_every_third(host: Host) -> None:
    check_masks(host, None, mask_of_every_third, DECAY, mask_every=3)


def check_calibrated(host: Host) -> None:
    """SNIP: abs(g ⊙ W), g summed over the batches on the dense model, decides once and for all."""
    dense, model = host.build(), host.build()
    batches = [host.inputs(80), host.inputs(81)]
    for batch in batches:
        host.loss(dense, batch).backward()
    weights = parameters(dense)
    masks = {
        name: mask_of(weights[name], parts, scores=weights[name].grad * weights[name])
        for name, parts in host.weights.items()
    }
    sparsifier = sparsify(host, model, "snip")

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return host.loss(model, batch)

    sparsifier.calibrate(loss, batches)
    assert all(parameter.grad is None for parameter in model.parameters())
    optimizer = optimizer_of(model)
    for step in range(3):
        for name, weight, seen in effective_weights(host, model):
            assert_same(seen, torch.where(masks[name], weight, 0.0), f"{name} at step {step}")
        assert sparsifier.report().flips == 0
        one_step(host, model, sparsifier, optimizer)


@every_host
def test_inherited(host: Host) -> None:
    check_inherited(host)


@every_host
def test_frozen(host: Host) -> None:
    check_frozen(host)


@every_host
def test_every_third(host: Host) -> None:
    check_every_third(host)


@every_host
def test_calibrated(host: Host) -> None:
    check_calibrated(host)


@pytest.mark.parametrize(
    "options", [{"schedule": {0.125: "3:4", 0.625: "1:4"}}, INHERITED], ids=["schedule", "stages"]
)
def test_inherited_and_frozen(options: dict[str, Any]) -> None:
    """The target and the rule "frozen" may come in one step; the last choice is still made among the survivors."""
    recipe = nmflow.recipe("idp", freeze=True, **options)
    check_masks(HOST["linear"], recipe, partial(inherited_mask, recipe=recipe), [0.0] * (STEPS + 1))


@pytest.mark.parametrize("stops", [(2, 9), (1, 3, 10), (10,)])
def test_inherited_and_frozen_by_leaps(stops: tuple[int, ...]) -> None:
    """A loop that passes its own count may leap over stages; Φ is N:M all the same, and no survivor is new."""
    part = Part(1, 8)
    model = nn.Linear(16, 8)
    sparsifier = nmflow.Sparsifier(model, {"weight": part.text}, nmflow.recipe("idp", freeze=True), 10)
    alive = torch.ones(8, 16, dtype=torch.bool)
    for stop in stops:
        nn.init.normal_(sparsifier.dense_weight("weight"))
        sparsifier.step(n=stop)
        seen = model.weight != 0
        assert not (seen & ~alive).any(), f"step {stop}"
        alive = seen
    assert not overfull_blocks(model.weight, [part])
    sparsifier.finalize()
    assert torch.equal(model.weight != 0, alive)
