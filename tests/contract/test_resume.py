"""Behaviour: a run that is stopped at any step and loaded elsewhere ends with the bits of one never stopped."""

from __future__ import annotations

import io
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import nmflow
from contract.hosts import HOST, Host, every_host
from contract.runs import assert_same, effective_weights, one_step, optimizer_of, sparsify
from nmflow import Sparsifier

LENGTH = 10
ROOMY = {
    "sdgf-stepwise": {"dense": 0.1, "decay_end": 0.7},
    "sdgf-geometric": {"dense": 0.1, "decay_end": 0.7},
    "idp": {"dense": 0.1, "decay_end": 0.7},
    "ste frozen": {"dense": 0.3, "freeze": True},
    "mdgf-linear frozen": {"dense": 0.1, "decay_end": 0.5, "freeze": True},
}
"""Options with which every recipe has room for its stages in a run of `LENGTH` steps; the frozen ones besides."""

Run = tuple[nn.Module, Sparsifier, torch.optim.Optimizer]


def start(host: Host, recipe: str, mask_every: int) -> Run:
    model = host.build()
    chosen = nmflow.recipe(recipe.removesuffix(" frozen"), **ROOMY.get(recipe, {}))
    sparsifier = sparsify(host, model, chosen, LENGTH, mask_every=mask_every)
    return model, sparsifier, optimizer_of(model)


def calibrate(host: Host, sparsifier: Sparsifier) -> None:
    if sparsifier.recipe.needs_gradients:
        sparsifier.calibrate(lambda model, batch: host.loss(model, batch), [host.inputs(80), host.inputs(81)])


def go_on(host: Host, run: Run, until: int) -> None:
    model, sparsifier, optimizer = run
    while sparsifier.current_step < until:
        one_step(host, model, sparsifier, optimizer)


def saved(run: Run) -> bytes:
    """A checkpoint through a file and safe loading, as a training loop would keep it."""
    model, sparsifier, optimizer = run
    file = io.BytesIO()
    torch.save([model.state_dict(), sparsifier.state_dict(), optimizer.state_dict()], file)
    return file.getvalue()


def load(run: Run, checkpoint: bytes, sparsifier_first: bool) -> None:
    model, sparsifier, optimizer = run
    weights, state, moments = torch.load(io.BytesIO(checkpoint), weights_only=True)
    if sparsifier_first:
        sparsifier.load_state_dict(state)
    model.load_state_dict(weights)
    if not sparsifier_first:
        sparsifier.load_state_dict(state)
    optimizer.load_state_dict(moments)


def snapshot(host: Host, run: Run) -> dict[str, Tensor]:
    model = run[0]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    return {**state, **{f"{name} (seen)": seen.clone() for name, _, seen in effective_weights(host, model)}}


def check_resume(host: Host, recipe: str, mask_every: int = 1, stops: Sequence[int] = (1, 4, 7)) -> None:
    """Weights, what is read of them, and the reports agree to the last bit."""
    whole = start(host, recipe, mask_every)
    calibrate(host, whole[1])
    checkpoints, seen = {}, {}
    for step in range(LENGTH + 1):
        go_on(host, whole, step)
        seen[step] = snapshot(host, whole)
        if step in stops:
            checkpoints[step] = saved(whole)
    for number, (stop, checkpoint) in enumerate(checkpoints.items()):
        resumed = start(host, recipe, mask_every)
        go_on_before = resumed[1].current_step
        load(resumed, checkpoint, sparsifier_first=number % 2 == 1)
        assert (go_on_before, resumed[1].current_step) == (0, stop)
        for step in range(stop, LENGTH + 1):
            go_on(host, resumed, step)
            for name, value in snapshot(host, resumed).items():
                assert_same(value, seen[step][name], f"{name} at step {step}, stopped at {stop}")
        assert resumed[1].state_dict().keys() == whole[1].state_dict().keys()
    for run in (whole, resumed):
        run[1].finalize()
    expected = whole[0].state_dict()
    for name, value in resumed[0].state_dict().items():
        assert_same(value, expected[name], f"{name}, finalized")


@every_host
def test_resume(host: Host) -> None:
    check_resume(host, "mdgf-exponential", stops=(4,))


@every_host
@pytest.mark.parametrize("recipe", ["idp", "snip"])
def test_resume_where_masks_outlive_a_step(host: Host, recipe: str) -> None:
    check_resume(host, recipe, stops=(3, 8) if host.name == "linear" else (4,))


@every_host
def test_resume_between_masks(host: Host) -> None:
    check_resume(host, "mdgf-exponential", mask_every=3, stops=(4,))


@pytest.mark.parametrize("recipe", [*nmflow.recipes(), "ste frozen", "mdgf-linear frozen"])
@pytest.mark.parametrize("mask_every", [1, 3])
def test_resume_of_every_recipe_at_every_step(recipe: str, mask_every: int) -> None:
    check_resume(HOST["linear"], recipe, mask_every, stops=range(LENGTH + 1))


@pytest.mark.parametrize("recipe", ["sdgf-stepwise", "sdgf-geometric", "mdgf-linear frozen"])
def test_resume_between_patterns_of_shared_columns(recipe: str) -> None:
    check_resume(HOST["mha"], recipe, stops=(3, 5))


def test_rewinding_a_run() -> None:
    """Loading an earlier state into the same run takes it back."""
    host = HOST["mha"]
    run = start(host, "mdgf-exponential", 1)
    go_on(host, run, 3)
    checkpoint = saved(run)
    go_on(host, run, 6)
    first = snapshot(host, run)
    load(run, checkpoint, sparsifier_first=False)
    assert run[1].current_step == 3
    go_on(host, run, 6)
    for name, value in snapshot(host, run).items():
        assert_same(value, first[name], name)
