"""Behaviour: state dicts, deep copies, pickles and averages of a model in the middle of its run."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from contract.hosts import HOST, Host, every_host
from contract.oracle import effective_of, mask_of, overfull_blocks
from contract.runs import (
    DECAY,
    HALF_WAY,
    STEPS,
    assert_same,
    effective_weights,
    one_step,
    optimizer_of,
    parameters,
    sparsify,
    train,
)

EMA_DECAY = 0.6


def assert_computes_as_pruned(host: Host, model: nn.Module, decay: float) -> None:
    """The model's output is that of a copy pruned by hand."""
    batch = host.inputs(50)
    with torch.no_grad():
        assert_same(host.forward(model, batch), host.forward(host.pruned_copy(model, decay), batch))


# ------------------------------------------------------------------------------------------ state dicts
def check_names(host: Host) -> None:
    """Keys, their order, shapes and the parameter objects are those of the dense model."""
    dense, model = host.build(), host.build()
    objects = dict(model.named_parameters())
    buffers = dict(model.named_buffers())
    sparsifier = sparsify(host, model)
    for _ in range(2):
        state = model.state_dict()
        assert list(state) == list(dense.state_dict())
        assert [value.shape for value in state.values()] == [v.shape for v in dense.state_dict().values()]
        assert list(parameters(model)) == list(objects)
        assert all(value is objects[name] for name, value in parameters(model).items())
        assert [name for name, _ in model.named_buffers()] == list(buffers)
        assert [name for name, _ in model.named_modules()] == [name for name, _ in dense.named_modules()]
        one_step(host, model, sparsifier, optimizer_of(model))


def check_state_is_dense(host: Host) -> None:
    """The state dict holds W, not W~: pruned entries keep their values."""
    model, _ = train(host, STEPS)
    state, weights = model.state_dict(), parameters(model)
    for name, parts in host.weights.items():
        weight = state[name]
        assert_same(weight, weights[name].detach(), name)
        assert overfull_blocks(weight, parts), name


def check_loading_is_noticed(host: Host, assign: bool) -> None:
    """A dense state dict loads strictly, and W~ follows from the weights it brought."""
    model, sparsifier = train(host, HALF_WAY)
    state = host.build(seed=7).state_dict()
    model.load_state_dict(state, strict=True, assign=assign)
    for name, dense, seen in effective_weights(host, model):
        assert_same(dense, state[name], name)
        assert_same(seen, effective_of(state[name], host.weights[name], DECAY[HALF_WAY]), name)
    assert_computes_as_pruned(host, model, DECAY[HALF_WAY])
    one_step(host, model, sparsifier, optimizer_of(model))
    assert_computes_as_pruned(host, model, DECAY[HALF_WAY + 1])


def check_its_state_loads_into_a_dense_model(host: Host) -> None:
    model, _ = train(host, HALF_WAY)
    dense = host.build(seed=7)
    assert tuple(dense.load_state_dict(model.state_dict(), strict=False)) == ([], [])
    state = model.state_dict()
    for name, value in dense.state_dict().items():
        assert_same(value, state[name], name)


# ------------------------------------------------------------------------------------ copies and pickles
def check_copy(host: Host, duplicate: Callable[[nn.Module], nn.Module]) -> None:
    """A copy has weights of its own, is sparse, and stays as it is while the original is trained."""
    model, sparsifier = train(host, HALF_WAY)
    other = duplicate(model)
    assert type(other) is type(model)
    assert list(other.state_dict()) == list(model.state_dict())
    assert_computes_as_pruned(host, other, DECAY[HALF_WAY])

    before = {name: value.clone() for name, value in other.state_dict().items()}
    output = host.forward(other, host.inputs(50)).detach() if not host.has_batch_statistics else None
    optimizer = optimizer_of(model)
    host.loss(model, host.inputs(60)).backward()
    optimizer.step()
    for name, value in other.state_dict().items():
        assert_same(value, before[name], name)
    if output is not None:
        assert_same(host.forward(other, host.inputs(50)).detach(), output, "the copy's output")
    one_step(host, model, sparsifier, optimizer)
    assert_computes_as_pruned(host, model, DECAY[HALF_WAY + 1])

    weights_of_model = {name: value.clone() for name, value in model.state_dict().items()}
    host.loss(other, host.inputs(70)).backward()
    optimizer_of(other).step()
    for name, parameter in model.named_parameters():
        assert_same(parameter.detach(), weights_of_model[name], name)
    assert_computes_as_pruned(host, model, DECAY[HALF_WAY + 1])


def check_deepcopy_follows_the_run(host: Host) -> None:
    """The copy's decay is the run's: an average that is never stepped itself ends up sparse."""
    model, sparsifier = train(host, HALF_WAY)
    other = copy.deepcopy(model)
    optimizer = optimizer_of(model)
    for step in range(HALF_WAY, STEPS):
        assert_computes_as_pruned(host, other, DECAY[step])
        one_step(host, model, sparsifier, optimizer)
    assert_computes_as_pruned(host, other, 0.0)


# -------------------------------------------------------------------------------------------- averages
def torch_average(use_buffers: bool) -> Callable[[nn.Module], nn.Module]:
    return lambda model: AveragedModel(
        model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY), use_buffers=use_buffers
    )


def timm_average(model: nn.Module) -> nn.Module:
    utils = pytest.importorskip("timm.utils", reason="timm's ModelEmaV3 needs the optional package timm")
    average: nn.Module = utils.ModelEmaV3(model, decay=EMA_DECAY)
    return average


def check_average(host: Host, make: Callable[[nn.Module], nn.Module]) -> None:
    """The average of W is a dense model's; its W~ follows from it at every step, and is N:M at the end."""
    model, twin = host.build(), host.build()
    sparsifier = sparsify(host, model)
    averages = [make(model), make(twin)]
    optimizer = optimizer_of(model)
    for step in range(STEPS + 1):
        of_twin = averages[1].state_dict()
        for name, dense, seen in effective_weights(host, averages[0], "module."):
            assert_same(dense, of_twin[f"module.{name}"], f"{name} at step {step}")
            assert_same(seen, effective_of(dense, host.weights[name], DECAY[step]), f"{name} at step {step}")
        if step < STEPS:
            one_step(host, model, sparsifier, optimizer)
            twin.load_state_dict(model.state_dict())
            for average, source in zip(averages, (model, twin), strict=True):
                update = average.update_parameters if isinstance(average, AveragedModel) else average.update
                update(source)
    weights_of_model = parameters(model)
    for name, dense, seen in effective_weights(host, averages[0], "module."):
        assert not torch.equal(dense, weights_of_model[name]), f"{name}: nothing was averaged"
        assert not overfull_blocks(seen, host.weights[name]), name
        assert torch.equal(seen != 0, mask_of(dense, host.weights[name]) & (dense != 0)), name
    assert_computes_as_pruned(host, averages[0].module.train(host.training), 0.0)


@every_host
def test_names(host: Host) -> None:
    check_names(host)


@every_host
def test_state_is_dense(host: Host) -> None:
    check_state_is_dense(host)


@every_host
@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_loading_is_noticed(host: Host, assign: bool) -> None:
    check_loading_is_noticed(host, assign)


@every_host
def test_its_state_loads_into_a_dense_model(host: Host) -> None:
    check_its_state_loads_into_a_dense_model(host)


@every_host
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copy(host: Host, duplicate: Callable[[nn.Module], nn.Module]) -> None:
    check_copy(host, duplicate)


@every_host
def test_deepcopy_follows_the_run(host: Host) -> None:
    check_deepcopy_follows_the_run(host)


@every_host
@pytest.mark.parametrize("use_buffers", [False, True], ids=["parameters", "buffers-too"])
def test_torch_average(host: Host, use_buffers: bool) -> None:
    check_average(host, torch_average(use_buffers))


@every_host
def test_timm_average(host: Host) -> None:
    check_average(host, timm_average)


def test_a_copied_run_is_refused_and_the_copied_model_follows() -> None:
    """As one object a model and its sparsifier are copied for an average; stepping both would be two runs in one."""
    host = HOST["mha"]
    model, sparsifier = train(host, HALF_WAY)
    other, copied = copy.deepcopy((model, sparsifier))
    assert copied.model is other
    for goes_on in (copied.step, copied.edit_gradients, lambda: copied.load_state_dict(sparsifier.state_dict())):
        with pytest.raises(RuntimeError, match=r"deep copy.*load both state dicts"):
            goes_on()
    one_step(host, model, sparsifier, optimizer_of(model))
    assert_computes_as_pruned(host, model, DECAY[HALF_WAY + 1])
    assert_computes_as_pruned(host, other, DECAY[HALF_WAY + 1])


def test_a_second_run_goes_its_own_way() -> None:
    """The way out that the refusal names."""
    host = HOST["mha"]
    model, sparsifier = train(host, HALF_WAY)
    other = host.build(seed=7)
    second = sparsify(host, other)
    other.load_state_dict(model.state_dict())
    second.load_state_dict(sparsifier.state_dict())
    one_step(host, model, sparsifier, optimizer_of(model))
    assert_computes_as_pruned(host, other, DECAY[HALF_WAY])


@pytest.mark.parametrize("wrapped", [False, True], ids=["as it is", "in a module"])
def test_a_compiled_average_computes_with_its_weights(wrapped: bool) -> None:
    """An average is changed by its owner, whom no step of the run derives: it looks before it computes."""
    host = HOST["linear"]
    model, sparsifier = train(host, HALF_WAY)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY)) if wrapped else copy.deepcopy(model)
    source = average.module if wrapped else average
    torch._dynamo.reset()
    compiled = torch.compile(average, backend="aot_eager")
    optimizer = optimizer_of(model)
    with torch.no_grad():
        for step in range(HALF_WAY, STEPS + 1):
            expected = host.pruned_copy(source, DECAY[step])(host.inputs(50))
            assert_same(compiled(host.inputs(50)), expected, f"step {step}")
            if step < STEPS:
                with torch.enable_grad():
                    one_step(host, model, sparsifier, optimizer)
                for mine, trained in zip(source.parameters(), model.parameters(), strict=True):
                    mine.lerp_(trained, 1 - EMA_DECAY)
    torch._dynamo.reset()
