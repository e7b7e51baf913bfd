"""How the suite trains its hosts: one short run whose decay factors are exact in every float format."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

import nmflow
from contract.hosts import Host
from nmflow import Sparsifier

STEPS = 8
DECAY = (1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0, 0.0)
"""D at steps 0 ... 8 of `mdgf`: dense at 0, D = 1 - j/4 from step 1, 0 from step 5."""
HALF_WAY, ARRIVED = 3, 5


def mdgf(pruned_gradient: str = "straight-through") -> object:
    return nmflow.recipe("mdgf-linear", dense=1 / 8, decay_end=5 / 8, pruned_gradient=pruned_gradient)


def sparsify(
    host: Host, model: nn.Module, recipe: object = None, total_steps: int = STEPS, **options: object
) -> Sparsifier:
    recipe = mdgf() if recipe is None else recipe
    return Sparsifier(model, host.targets, recipe, total_steps, remainder=host.remainder, **options)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Large steps, so that masks change."""
    return torch.optim.AdamW(model.parameters(), lr=0.03, weight_decay=0.1)


def one_step(
    host: Host, model: nn.Module, sparsifier: Sparsifier, optimizer: torch.optim.Optimizer
) -> None:
    """One optimizer step, on the batch that belongs to the step."""
    host.loss(model, host.inputs(sparsifier.current_step)).backward()
    sparsifier.edit_gradients()
    optimizer.step()
    optimizer.zero_grad()
    sparsifier.step()


def train(host: Host, until: int, recipe: object = None, **options: object) -> tuple[nn.Module, Sparsifier]:
    """A host trained up to a step of its run."""
    model = host.build()
    sparsifier = sparsify(host, model, recipe, **options)
    optimizer = optimizer_of(model)
    for _ in range(until):
        one_step(host, model, sparsifier, optimizer)
    return model, sparsifier


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The dense weights by name. (`get_parameter` reads `module.weight`, which is W~ here.)"""
    return dict(model.named_parameters())


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {
        name: None if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }


def effective_weights(host: Host, model: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, dense W, what a reader of it sees) of every sparse weight."""
    state = model.state_dict()
    for name in host.weights:
        path, _, local = f"{prefix}{name}".rpartition(".")
        yield name, state[f"{prefix}{name}"], getattr(model.get_submodule(path), local).detach()


def assert_same(found: Tensor, expected: Tensor, what: str = "") -> None:
    """Equal to the last bit."""
    assert found.shape == expected.shape, f"{what}: {tuple(found.shape)} is not {tuple(expected.shape)}"
    assert found.dtype == expected.dtype, f"{what}: {found.dtype} is not {expected.dtype}"
    difference = (found.double() - expected.double()).abs()
    assert torch.equal(found, expected), f"{what}: differ by up to {difference.max().item():.3g}"


def assert_close(found: Tensor, expected: Tensor, what: str = "") -> None:
    """Equal but for the order of float32 sums."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6, msg=lambda text: f"{what}: {text}")
