"""Behaviour: freezing, ties, and writes to weights from outside, the noticed and the refused ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import nmflow
from contract.hosts import HOST, Host, every_host
from contract.oracle import Part, effective_of, mask_of
from contract.runs import (
    DECAY,
    HALF_WAY,
    assert_same,
    effective_weights,
    gradients,
    mdgf,
    one_step,
    optimizer_of,
    parameters,
    train,
)
from contract.test_copies import assert_computes_as_pruned


def check_freezing(host: Host) -> None:
    """A frozen weight is still sparse and gets no gradient; thawed, it gets the pruned copy's again."""
    model, sparsifier = train(host, HALF_WAY)
    copy = host.pruned_copy(model, DECAY[HALF_WAY])
    host.loss(copy, host.inputs(50)).backward()
    expected = gradients(copy)
    names = list(host.weights)
    for frozen in ([names[0]], names, []):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in frozen)
        assert_computes_as_pruned(host, model, DECAY[HALF_WAY])
        loss = host.loss(model, host.inputs(50))
        if loss.requires_grad:                                    # a bare layer's bias always asks for one
            loss.backward()
        for name, parameter in model.named_parameters():
            if name in frozen:
                assert parameter.grad is None, name
            elif expected[name] is not None:
                assert parameter.grad is not None, name
                assert_same(parameter.grad, expected[name], name)
        model.zero_grad()
    model.requires_grad_(False)
    sparsifier.step()
    assert_computes_as_pruned(host, model, DECAY[HALF_WAY + 1])


def negate_in_place(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.neg_().add_(torch.sin(torch.arange(weight.numel(), dtype=weight.dtype)).reshape(weight.shape))


def replace_data(weight: nn.Parameter) -> None:
    """As `vector_to_parameters` does; the version count stays what it was."""
    weight.data = torch.sin(torch.arange(weight.numel(), dtype=weight.dtype)).reshape(weight.shape)


def negate_foreach(weight: nn.Parameter) -> None:
    with torch.no_grad():
        torch._foreach_mul_([weight], -1.0)
        torch._foreach_add_([weight], [torch.sin(torch.arange(weight.numel())).reshape(weight.shape)])


def initialize_again(weight: nn.Parameter) -> None:
    nn.init.normal_(weight)


def check_a_change_is_noticed(host: Host, change: Callable[[nn.Parameter], None]) -> None:
    """A write into W from outside shows in the very next read, mask and all."""
    model, _ = train(host, HALF_WAY)
    weights = parameters(model)
    before = {name: weights[name].detach().clone() for name in host.weights}
    for name in host.weights:
        change(weights[name])
    for name, dense, seen in effective_weights(host, model):
        assert not torch.equal(dense, before[name]), name
        assert_same(seen, effective_of(dense, host.weights[name], DECAY[HALF_WAY]), name)
    assert_computes_as_pruned(host, model, DECAY[HALF_WAY])


def check_refresh(host: Host) -> None:
    """What leaves no trace (`.data`) is taken in by `refresh`."""
    model, _ = train(host, HALF_WAY)
    weights = parameters(model)
    for name in host.weights:
        weight = weights[name].data
        weight.copy_(weight.flip(0) * -1.5)
    nmflow.refresh(model)
    for name, dense, seen in effective_weights(host, model):
        assert_same(seen, effective_of(dense, host.weights[name], DECAY[HALF_WAY]), name)
    assert_computes_as_pruned(host, model, DECAY[HALF_WAY])


def check_a_write_into_the_effective_weight_is_refused(host: Host, grad: bool) -> None:
    """`nn.init` on `module.weight` would be lost at the next step, so it raises, there or at the next read."""
    model, sparsifier = train(host, HALF_WAY)
    weights = list(effective_weights(host, model))
    for name, dense, _ in weights[:: len(weights) // 8 or 1]:     # eight of a large host tell enough
        before = dense.clone()
        with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match=r"in.?place"):
            _write_and_read(host, model, name)
        assert_same(dense, before, name)
        with torch.no_grad():
            sparsifier.dense_weight(name).mul_(0.5)               # the way out that the message names
        nmflow.refresh(model)
        (seen,) = (seen for other, _, seen in effective_weights(host, model) if other == name)
        assert_same(seen, effective_of(before * 0.5, host.weights[name], DECAY[HALF_WAY]), name)
    assert_computes_as_pruned(host, model, DECAY[HALF_WAY])


def _write_and_read(host: Host, model: nn.Module, name: str) -> None:
    path, _, local = name.rpartition(".")
    nn.init.zeros_(getattr(model.get_submodule(path), local))
    host.forward(model, host.inputs())


def check_inference_mode(host: Host) -> None:
    """A change first seen in inference mode leaves nothing behind that training could stumble over."""
    model, _ = train(host, HALF_WAY)
    weights = parameters(model)
    for name in host.weights:
        negate_in_place(weights[name])
    copy = host.pruned_copy(model.eval(), DECAY[HALF_WAY])
    with torch.inference_mode():
        assert_same(host.forward(model, host.inputs(50)), host.forward(copy, host.inputs(50)))
    host.loss(model, host.inputs(50)).backward()
    host.loss(copy, host.inputs(50)).backward()
    weights_of_copy = parameters(copy)
    for name in host.weights:
        gradient, expected = weights[name].grad, weights_of_copy[name].grad
        assert gradient is not None
        assert expected is not None
        assert_same(gradient, expected, name)


def check_functional_call(host: Host) -> None:
    """Weights lent for one call are pruned in that call, and the model's own come back."""
    model, _ = train(host, HALF_WAY)
    model.eval()
    lent = host.build(seed=7).eval()
    with torch.no_grad():
        before = host.forward(model, host.inputs(50))
        found = torch.func.functional_call(_Forward(model, host), _prefixed(lent), (host.inputs(50),))
        assert_same(found, host.forward(host.pruned_copy(lent, DECAY[HALF_WAY]), host.inputs(50)))
        assert_same(host.forward(model, host.inputs(50)), before)


class _Forward(nn.Module):
    """A host and the way to call it, as one module."""

    def __init__(self, model: nn.Module, host: Host) -> None:
        super().__init__()
        self.model = model
        self.host = host

    def forward(self, batch: Tensor) -> Tensor:
        return self.host.forward(self.model, batch)


def _prefixed(model: nn.Module) -> dict[str, Tensor]:
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {f"model.{name}": value.detach() for name, value in tensors.items()}


@every_host
def test_freezing(host: Host) -> None:
    check_freezing(host)


@every_host
@pytest.mark.parametrize("change", [negate_in_place, negate_foreach, initialize_again, replace_data])
def test_a_change_is_noticed(host: Host, change: Callable[[nn.Parameter], None]) -> None:
    check_a_change_is_noticed(host, change)


@every_host
def test_refresh(host: Host) -> None:
    check_refresh(host)


@every_host
@pytest.mark.parametrize("grad", [True, False], ids=["with-gradients", "without"])
def test_a_write_into_the_effective_weight_is_refused(host: Host, grad: bool) -> None:
    check_a_write_into_the_effective_weight_is_refused(host, grad)


@every_host
def test_inference_mode(host: Host) -> None:
    check_inference_mode(host)


@every_host
def test_functional_call(host: Host) -> None:
    check_functional_call(host)


def test_refresh_leaves_an_ordinary_model_alone() -> None:
    model = HOST["linear"].build()
    before = model.weight.detach().clone()
    nmflow.refresh(model)
    assert type(model) is nn.Linear
    assert_same(model.weight.detach(), before)


# ------------------------------------------------------------------------------------------------ ties
def test_tied_head_and_embedding_are_one_slot() -> None:
    """GPT-2's lm_head reads the embedding's weight: one slot, one W~, one gradient."""
    host = HOST["gpt2"]
    model, sparsifier = train(host, HALF_WAY, mdgf("decay"))
    assert [slot.name for slot in sparsifier.slots if "wte" in slot.name or "lm_head" in slot.name] == [
        "transformer.wte.weight"
    ]
    dense = parameters(model)["transformer.wte.weight"]
    expected = effective_of(dense, (Part(2, 8),), DECAY[HALF_WAY])
    assert_same(model.transformer.wte.weight.detach(), expected)  # type: ignore[union-attr]  # modules by name
    assert_same(model.lm_head.weight.detach(), expected)  # type: ignore[union-attr]  # modules by name
    assert model.lm_head._parameters["weight"] is dense  # type: ignore[union-attr]  # modules by name
    sparsifier.finalize()
    assert model.lm_head.weight is model.transformer.wte.weight  # type: ignore[union-attr]  # modules by name


class Twice(nn.Module):
    """Two layers of different classes that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Bilinear(1, 8, 8)
        self.second.weight = nn.Parameter(self.first.weight.detach().reshape(8, 1, 8))
        self.third = nn.Linear(8, 8, bias=False)
        self.third.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.third(self.first(x).relu())
        return output


def test_both_readers_of_a_tied_weight_feed_its_gradient() -> None:
    torch.manual_seed(0)
    model, copy = Twice(), Twice()
    copy.load_state_dict(model.state_dict())
    weight = model.first.weight
    sparsifier = nmflow.Sparsifier(model, {"first": "1:4"}, mdgf("masked"), 8)
    sparsifier.step(5)
    parts = (Part(1, 4),)
    with torch.no_grad():
        copy.first.weight.copy_(effective_of(weight, parts, 0.0))
    batch = torch.randn(3, 8)
    model(batch).square().sum().backward()
    copy(batch).square().sum().backward()
    assert weight.grad is not None
    assert copy.first.weight.grad is not None
    torch.testing.assert_close(weight.grad, copy.first.weight.grad * mask_of(weight, parts))
    sparsifier.finalize()
    assert model.third.weight is model.first.weight


def test_untying_during_a_run_is_taken_as_it_is() -> None:
    """A new parameter under the old name is noticed and pruned like the one before it."""
    host = HOST["linear"]
    model, sparsifier = train(host, HALF_WAY)
    model.weight = nn.Parameter(torch.randn(6, 16))
    assert_computes_as_pruned(host, model, DECAY[HALF_WAY])
    one_step(host, model, sparsifier, optimizer_of(model))
    assert_computes_as_pruned(host, model, DECAY[HALF_WAY + 1])


def test_parameters_from_a_vector_are_noticed() -> None:
    host = HOST["linear"]
    model, _ = train(host, HALF_WAY)
    vector = torch.randn(sum(parameter.numel() for parameter in model.parameters()))
    nn.utils.vector_to_parameters(vector, model.parameters())
    assert_computes_as_pruned(host, model, DECAY[HALF_WAY])


def test_weights_loaded_between_masks_take_masks_of_their_own() -> None:
    """Pretrained weights under `mask_every`: old masks say nothing of them. A state without the weight leaves them."""
    model = nn.Linear(16, 8)
    sparsifier = nmflow.Sparsifier(model, {"weight": "1:4"}, "ste", 1000, mask_every=100)
    sparsifier.step()
    pretrained = nn.Linear(16, 8).state_dict()
    model.load_state_dict(pretrained)
    expected = effective_of(pretrained["weight"], (Part(1, 4),), 0.0)
    assert_same(model.weight.detach(), expected)
    with torch.no_grad():
        sparsifier.dense_weight("weight").copy_(nn.Linear(16, 8).weight)
    sparsifier.step()
    model.load_state_dict({"bias": pretrained["bias"]}, strict=False)
    assert torch.equal(model.weight != 0, expected != 0)


def test_weights_loaded_after_a_resume_and_a_step_take_masks_of_their_own() -> None:
    model = nn.Linear(16, 8)
    sparsifier = nmflow.Sparsifier(model, {"weight": "1:4"}, "ste", 1000, mask_every=100)
    sparsifier.load_state_dict(sparsifier.state_dict())
    sparsifier.step()
    pretrained = nn.Linear(16, 8).state_dict()
    model.load_state_dict(pretrained)
    assert_same(model.weight.detach(), effective_of(pretrained["weight"], (Part(1, 4),), 0.0))
