"""Gradient noise, beside numpy in float64 and an AdamW written out by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

import nmflow
from nmflow.moments import Moments, joined, read, sums

Array = npt.NDArray[np.float64]
STEPS = 12


# -- variances ---------------------------------------------------------------------------------------------------


def measured(tensor: Tensor, magnitudes: bool = False) -> float:
    found = sums(tensor, magnitudes)
    variance = found.moments(iter(read(found.tensors))).variance
    assert variance is not None
    return variance


def expected(tensor: Tensor, magnitudes: bool = False) -> float:
    values = tensor.detach().double().numpy()
    return float(np.var(np.abs(values) if magnitudes else values))


@pytest.mark.parametrize("scale", [1e-38, 1e-22, 1e-10, 1e-3, 1.0, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_variance_of_numbers_of_any_size(scale: float, dtype: torch.dtype) -> None:
    """float32 loses the squares of 1e-22; so would a sum of them in float32."""
    draw = torch.Generator().manual_seed(1)
    values = (torch.randn(37, 64, generator=draw, dtype=torch.float64) ** 3 * scale).to(dtype)
    for magnitudes in (False, True):
        assert measured(values, magnitudes) == pytest.approx(expected(values, magnitudes), rel=1e-12, abs=0)


def test_numbers_that_hardly_differ_keep_their_variance() -> None:
    """From Σ x² - (Σ x)²/n nothing but rounding would be left."""
    values = 1e-10 * (1 + 1e-9 * torch.arange(1000, dtype=torch.float64))
    assert measured(values) == pytest.approx(expected(values), rel=1e-6, abs=0)
    assert measured(torch.full((1000,), 0.1)) < 1e-33


@pytest.mark.parametrize("size", [1, 2, 99, 100, 101, 250])
def test_pieces_are_joined(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Pieces of a hundred, of very different means."""
    monkeypatch.setitem(nmflow.moments._PIECE, "cpu", 100)
    values = torch.randn(size, generator=torch.Generator().manual_seed(size)) + torch.arange(size) // 100 * 50
    assert len(sums(values).sizes) == -(-size // 100)
    assert measured(values) == pytest.approx(expected(values), rel=1e-12, abs=1e-300)


def test_a_tensor_may_lie_in_memory_as_it_likes() -> None:
    grid = torch.randn(24, 36, generator=torch.Generator().manual_seed(2))
    for view in (grid.t(), grid[:, 3:17], grid.t()[4:9], grid.view(4, 6, 6, 6).permute(0, 2, 3, 1), grid[:0]):
        if view.numel():
            assert measured(view) == pytest.approx(expected(view), rel=1e-12)
        else:
            assert sums(view).moments(iter([])).variance is None


def test_summing_changes_nothing() -> None:
    values = -torch.rand(50, dtype=torch.float64)
    before = values.clone()
    measured(values, magnitudes=True)
    assert torch.equal(values, before)


def test_no_numbers_have_no_variance() -> None:
    assert joined([]).variance is None
    assert joined([Moments(0, 0.0, 0.0), Moments(1, 3.0, 0.0)]) == Moments(1, 3.0, 0.0)


# -- a run -------------------------------------------------------------------------------------------------------


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))


TARGETS = {"0.weight": "1:4", "2.weight": "2:8"}
BLOCKS = {"0.weight": (1, 4), "2.weight": (2, 8)}


def data(step: int) -> Tensor:
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(step))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x).square().mean()


def built(recipe: str = "ste", **options: Any) -> tuple[nn.Sequential, nmflow.Sparsifier, torch.optim.AdamW]:
    model = network()
    sparsifier = nmflow.Sparsifier(model, TARGETS, recipe, total_steps=STEPS)
    return model, sparsifier, torch.optim.AdamW(model.parameters(), lr=1e-2, **options)


def take(model: nn.Module, sparsifier: nmflow.Sparsifier, optimizer: Any, probe: Any, step: int) -> Any:
    """A step with clipping; what the probe gives."""
    loss_of(model, data(step)).backward()
    sparsifier.edit_gradients()
    probe.before_step()
    nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    optimizer.step()
    optimizer.zero_grad()
    sparsifier.step()
    return probe.after_step()


def mask_by_hand(weight: Array, n: int, m: int) -> npt.NDArray[np.bool_]:
    mask = np.zeros(weight.shape, dtype=bool)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], m):
            block = [(-abs(weight[row, start + k]), k) for k in range(m)]
            for _, k in sorted(block)[:n]:
                mask[row, start + k] = True
    return mask


def gradient(weight: Tensor) -> Array:
    assert weight.grad is not None
    found: Array = weight.grad.double().numpy().copy()
    return found


def by_hand(every: int) -> Iterator[dict[str, dict[str, Any]]]:
    """What a probe should see: per layer gradients before clipping, v by Adam's recursion, flips of masks by loops."""
    model, sparsifier, optimizer = built("sr-ste")
    second = {name: np.zeros(BLOCKS_SHAPE[name]) for name in TARGETS}
    for step in range(STEPS):
        loss_of(model, data(step)).backward()
        sparsifier.edit_gradients()
        weights = {name: sparsifier.dense_weight(name) for name in TARGETS}
        before = {name: mask_by_hand(w.detach().double().numpy(), *BLOCKS[name]) for name, w in weights.items()}
        raw = {name: gradient(w) for name, w in weights.items()}
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        for name, w in weights.items():
            second[name] = 0.999 * second[name] + 0.001 * gradient(w) ** 2
        optimizer.step()
        optimizer.zero_grad()
        sparsifier.step()
        after = {name: mask_by_hand(w.detach().double().numpy(), *BLOCKS[name]) for name, w in weights.items()}
        if (step + 1) % every == 0:
            yield {
                name: {"g": np.abs(raw[name]).ravel(), "v": second[name].ravel(),
                       "flips": (before[name] != after[name]).ravel()}
                for name in TARGETS
            }  # fmt: skip


BLOCKS_SHAPE = {"0.weight": (24, 16), "2.weight": (16, 24)}


def test_a_run_seen_by_hand() -> None:
    every, smoothing = 2, 0.5
    model, sparsifier, optimizer = built("sr-ste")
    probe = nmflow.GradientProbe(sparsifier, optimizer, every, smoothing)
    looks = [take(model, sparsifier, optimizer, probe, step) for step in range(STEPS)]
    assert [look is not None for look in looks] == [(step + 1) % every == 0 for step in range(STEPS)]
    averages: dict[tuple[str, str], float] = {}
    flipped = 0
    for number, (look, hand) in enumerate(zip(filter(None, looks), by_hand(every), strict=True)):
        assert look.step == every * (number + 1)
        assert list(look.layers) == list(TARGETS)
        hand["pooled"] = {key: np.concatenate([layer[key] for layer in hand.values()]) for key in ("g", "v", "flips")}
        for label, seen in {**look.layers, "pooled": look.pooled}.items():
            values = {
                "grad_abs_var": float(np.var(hand[label]["g"])),
                "second_moment_var": float(np.var(hand[label]["v"])),
                "flip_rate": float(np.mean(hand[label]["flips"])),
            }
            for name, value in values.items():
                assert getattr(seen, name) == pytest.approx(value, rel=1e-4, abs=0), (label, name)
                mean = value if number == 0 else smoothing * averages[label, name] + (1 - smoothing) * value
                averages[label, name] = mean
                assert getattr(seen, f"{name}_average") == pytest.approx(mean, rel=1e-4, abs=0), (label, name)
        flipped += int(hand["pooled"]["flips"].sum())
    assert flipped > 0  # or nothing was compared


def test_the_first_looks_are_a_plain_mean() -> None:
    model, sparsifier, optimizer = built()
    probe = nmflow.GradientProbe(sparsifier, optimizer, every=1, smoothing=0.75)
    looks = [take(model, sparsifier, optimizer, probe, step) for step in range(6)]
    seen = [look.pooled.grad_abs_var for look in looks]
    for number in range(4):
        mean = sum(seen[: number + 1]) / (number + 1)
        assert looks[number].pooled.grad_abs_var_average == pytest.approx(mean, rel=1e-12)
    later = 0.75 * (0.75 * sum(seen[:4]) / 4 + 0.25 * seen[4]) + 0.25 * seen[5]
    assert looks[5].pooled.grad_abs_var_average == pytest.approx(later, rel=1e-12)


def test_plain_data() -> None:
    model, sparsifier, optimizer = built()
    probe = nmflow.GradientProbe(sparsifier, optimizer, every=1)
    look = take(model, sparsifier, optimizer, probe, 0)
    assert look.line() == {"step": 1, **asdict(look.pooled)}
    found = json.loads(json.dumps(look.to_dict(), allow_nan=False))
    assert found.pop("layers") == {label: asdict(figures) for label, figures in look.layers.items()}
    assert found == look.line()


def test_slices_of_one_parameter() -> None:
    """A fused projection: Q and K are layers of their own, V is none."""
    torch.manual_seed(0)
    model = nn.MultiheadAttention(16, 2, batch_first=True)
    sparsifier = nmflow.Sparsifier(model, {"q": "1:4", "k": "2:4"}, "ste", total_steps=4)
    optimizer = torch.optim.Adam(model.parameters())
    probe = nmflow.GradientProbe(sparsifier, optimizer, every=1)
    x = torch.randn(2, 5, 16)
    model(x, x, x)[0].square().sum().backward()
    probe.before_step()
    gradient = sparsifier.dense_weight("in_proj_weight").grad.clone()
    optimizer.step()
    sparsifier.step()
    look = probe.after_step()
    for label, rows in (("in_proj_weight[0:16]", slice(0, 16)), ("in_proj_weight[16:32]", slice(16, 32))):
        assert look.layers[label].grad_abs_var == pytest.approx(expected(gradient[rows], True), rel=1e-12)
    assert look.pooled.grad_abs_var == pytest.approx(expected(gradient[:32], True), rel=1e-12)
    second = optimizer.state[sparsifier.dense_weight("in_proj_weight")]["exp_avg_sq"]
    assert look.pooled.second_moment_var == pytest.approx(expected(second[:32]), rel=1e-12)


def test_a_dense_network_on_the_same_layers() -> None:
    """By recipe and by name it is the same; masks there are none, or they do not move."""
    found = []
    for by_name in (False, True):
        model, sparsifier, optimizer = built("dense")
        weights = {name: sparsifier.dense_weight(name) for name in TARGETS} if by_name else sparsifier
        probe = nmflow.GradientProbe(weights, optimizer, every=4)
        looks = [take(model, sparsifier, optimizer, probe, step) for step in range(STEPS)]
        found.append([look for look in looks if look is not None])
    for one, two in zip(*found, strict=True):
        assert one.pooled.flip_rate == 0.0
        assert two.pooled.flip_rate is two.pooled.flip_rate_average is None
        for label in TARGETS:
            for name in ("grad_abs_var", "second_moment_var", "grad_abs_var_average", "second_moment_var_average"):
                assert getattr(one.layers[label], name) == getattr(two.layers[label], name)
                assert getattr(one.pooled, name) == getattr(two.pooled, name) is not None


def test_accelerate_wraps_the_optimizer() -> None:
    model, sparsifier, optimizer = built()
    other_model, other_sparsifier, other = built()
    wrapped = Accelerator(cpu=True).prepare(other)
    assert type(wrapped) is not type(other)
    one = nmflow.GradientProbe(sparsifier, optimizer, every=1)
    two = nmflow.GradientProbe(other_sparsifier, wrapped, every=1)
    seen = take(model, sparsifier, optimizer, one, 0)
    assert seen == take(other_model, other_sparsifier, wrapped, two, 0)
    assert seen.pooled.second_moment_var > 0


def test_gradients_in_bfloat16() -> None:
    model = network().to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters())
    probe = nmflow.GradientProbe({"first": model[0].weight}, optimizer, every=1)
    loss_of(model, data(0).bfloat16()).backward()
    probe.before_step()
    gradient = model[0].weight.grad.clone()
    optimizer.step()
    look = probe.after_step()
    assert gradient.dtype == torch.bfloat16
    assert look.pooled.grad_abs_var == pytest.approx(expected(gradient, True), rel=1e-12)


# -- what is not there -------------------------------------------------------------------------------------------


def test_a_layer_without_a_gradient_is_left_out() -> None:
    model, sparsifier, optimizer = built()
    probe = nmflow.GradientProbe(sparsifier, optimizer, every=1)
    loss_of(model, data(0)).backward()
    sparsifier.dense_weight("2.weight").grad = None
    gradient = sparsifier.dense_weight("0.weight").grad.clone()
    probe.before_step()
    optimizer.step()
    sparsifier.step()
    look = probe.after_step()
    silent = look.layers["2.weight"]
    assert silent.grad_abs_var is silent.second_moment_var is silent.grad_abs_var_average is None
    assert look.pooled.grad_abs_var == look.layers["0.weight"].grad_abs_var
    assert look.pooled.grad_abs_var == pytest.approx(expected(gradient, True), rel=1e-12)
    optimizer.zero_grad()
    probe.before_step()
    sparsifier.step()
    look = probe.after_step()
    assert look.pooled.grad_abs_var is None
    assert look.pooled.grad_abs_var_average is not None  # of the look before


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_gradient_that_is_no_number_spoils_no_average(value: float) -> None:
    """What fp16 finds where its loss scale was too large; the step is skipped."""
    model, sparsifier, optimizer = built()
    probe = nmflow.GradientProbe(sparsifier, optimizer, every=1)
    first = take(model, sparsifier, optimizer, probe, 0)
    loss_of(model, data(1)).backward()
    sparsifier.dense_weight("0.weight").grad[0, 0] = value
    probe.before_step()
    optimizer.zero_grad()
    look = probe.after_step()
    assert look.pooled.grad_abs_var is look.layers["0.weight"].grad_abs_var is None
    assert look.layers["2.weight"].grad_abs_var is not None
    assert look.pooled.grad_abs_var_average == first.pooled.grad_abs_var_average
    assert probe.state_dict()["pooled"]["grad_abs_var"][1] == 1


def test_a_probe_writes_nothing() -> None:
    """Not even an empty entry into the state of an optimizer that has taken no step."""
    model, sparsifier, optimizer = built()
    probe = nmflow.GradientProbe(sparsifier, optimizer, every=1)
    loss_of(model, data(0)).backward()
    before = {name: (each.clone(), each.grad.clone()) for name, each in model.named_parameters()}
    probe.before_step()
    look = probe.after_step()
    assert look.pooled.second_moment_var is None
    assert look.pooled.grad_abs_var > 0
    assert not optimizer.state
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert torch.equal(parameter.grad, before[name][1])


# -- going on ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stopped", [1, 4, 7])
def test_the_averages_go_on_to_the_same_bits(stopped: int) -> None:
    model, sparsifier, optimizer = built("mdgf-linear")
    probe = nmflow.GradientProbe(sparsifier, optimizer, every=3)
    looks, state = [], {}
    for step in range(STEPS):
        if step == stopped:
            state = json.loads(json.dumps(probe.state_dict()))
        looks.append(take(model, sparsifier, optimizer, probe, step))
    model, sparsifier, optimizer = built("mdgf-linear")
    unprobed = nmflow.GradientProbe(sparsifier, optimizer, every=STEPS + 1)
    for step in range(stopped):
        take(model, sparsifier, optimizer, unprobed, step)
    again = nmflow.GradientProbe(sparsifier, optimizer, every=3)
    again.load_state_dict(state)
    assert again.state_dict() == state
    assert [take(model, sparsifier, optimizer, again, step) for step in range(stopped, STEPS)] == looks[stopped:]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"every": 4}, "every: the state has 4, this probe 1"), ({"smoothing": 0.5}, "smoothing: the state has 0.5"),
        ({"format": 2}, "format"), ({"step": -1}, "step: -1"), ({"step": True}, "step: True"),
        ({"layers": {}}, "0.weight: the state has no averages of it"), ({"layers": 3}, "layers: no mapping"),
        ({"layers": {"0.weight": {}, "2.weight": {}, "9.weight": {}}}, "9.weight: no layer of this probe"),
        ({"pooled": {"grad_abs_var": [1.0]}}, "pooled: "), ({"pooled": {"grad_abs_var": [float("nan"), 1]}}, "pooled"),
        ({"pooled": {"noise": [1.0, 1]}}, "pooled: "), ({"pooled": None}, "pooled: None are no running averages"),
    ],
    ids=str,
)  # fmt: skip
def test_the_state_of_another_probe(change: dict[str, Any], words: str) -> None:
    model, sparsifier, optimizer = built()
    probe = nmflow.GradientProbe(sparsifier, optimizer, every=1)
    take(model, sparsifier, optimizer, probe, 0)
    before = probe.state_dict()
    with pytest.raises(ValueError, match="belongs to another probe") as caught:
        probe.load_state_dict({**before, **change})
    assert words in str(caught.value)
    assert probe.state_dict() == before


def test_what_is_no_state() -> None:
    _, sparsifier, optimizer = built()
    probe = nmflow.GradientProbe(sparsifier, optimizer)
    for state in ({}, [], 7, None):
        assert probe.problems(state) == [
            "not a probe's state: it lacks format, every, smoothing, step, pooled, layers"
        ]


# -- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SGD", "RMSprop", "Adagrad", "Adamax", "Adafactor"])
def test_optimizers_without_a_second_moment(name: str) -> None:
    model, sparsifier, _ = built()
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.1)
    own = type("Mine", (type(optimizer),), {})(model.parameters(), lr=0.1)
    for each, called in ((optimizer, name), (Accelerator(cpu=True).prepare(optimizer), name), (own, "Mine")):
        with pytest.raises(ValueError, match=f'{called} keeps no second moment \\("exp_avg_sq"\\)'):
            nmflow.GradientProbe(sparsifier, each)


class Foreign(torch.optim.Optimizer):
    """An optimizer that torch does not know, whose state shows only after a step what it keeps."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)


def test_an_optimizer_that_shows_late_what_it_lacks() -> None:
    model, sparsifier, _ = built()
    optimizer = Foreign(model.parameters())
    probe = nmflow.GradientProbe(sparsifier, optimizer, every=1)
    with pytest.raises(ValueError, match="Foreign keeps no second moment"):
        take(model, sparsifier, optimizer, probe, 0)
    with pytest.raises(ValueError, match="Foreign keeps no second moment"):
        nmflow.GradientProbe(sparsifier, optimizer)


def test_wrong_arguments() -> None:
    model, sparsifier, optimizer = built()
    weight = sparsifier.dense_weight("0.weight")
    tied = {"one": weight, "two": weight, "stranger": nn.Parameter(torch.ones(3))}
    for arguments, words in (
        ((model, optimizer), r"dict\(module.named_parameters\(\)\)"),
        (({}, optimizer), "no parameters to look at"),
        ((tied, optimizer), "two: the same parameter as one"),
        (({"stranger": tied["stranger"]}, optimizer), "stranger: not among the optimizer's parameters"),
        ((sparsifier, torch.optim.Adam(network().parameters())), "(?s)0.weight: not among.*2.weight: not among"),
        ((sparsifier, "adam"), "str is no optimizer"),
        ((sparsifier, optimizer, 0), "every is a number of optimizer steps"),
        ((sparsifier, optimizer, True), "every is a number"),
        ((sparsifier, optimizer, 1, 1.0), "0 <= β < 1"),
    ):
        with pytest.raises(ValueError, match=words):
            nmflow.GradientProbe(*arguments)


def test_all_problems_at_once() -> None:
    _, sparsifier, _ = built()
    weight = sparsifier.dense_weight("0.weight")
    with pytest.raises(ValueError, match=r"(?s)two: the same parameter as one.*SGD keeps no second moment"):
        nmflow.GradientProbe({"one": weight, "two": weight}, torch.optim.SGD([weight], lr=1.0))


def test_a_state_that_is_taken_inside_a_step_leaves_the_look_out() -> None:
    """As where a run is interrupted while its optimizer steps."""
    model, sparsifier, optimizer = built()
    probe = nmflow.GradientProbe(sparsifier, optimizer, every=2)
    for step in (2, 4):
        before = probe.state_dict()
        model(torch.randn(3, 16)).square().sum().backward()
        probe.before_step(step)
        assert probe.state_dict() == before
        optimizer.step()
        sparsifier.step(n=step)
        probe.after_step()
        assert probe.state_dict()["step"] == step
        assert probe.state_dict() != before


def test_calls_out_of_order() -> None:
    _, sparsifier, optimizer = built()
    probe = nmflow.GradientProbe(sparsifier, optimizer, every=2)
    with pytest.raises(RuntimeError, match="without before_step"):
        probe.after_step()
    probe.before_step(5)
    with pytest.raises(RuntimeError, match="called twice"):
        probe.before_step()
    assert probe.after_step() is None
    with pytest.raises(ValueError, match="step 4 lies before step 5"):
        probe.before_step(4)
    with pytest.raises(TypeError, match="number of optimizer steps"):
        probe.before_step(5.5)  # type: ignore[arg-type]  # wrong on purpose
    assert probe.step == 5
    sparsifier.finalize()
    with pytest.raises(RuntimeError, match="a probe ends where finalize begins"):
        probe.before_step()
