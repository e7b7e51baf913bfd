"""AdamW's groups and arithmetic against hand-written ones; the learning rate against tables and closed forms."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nmflow.train.config_sections import OptimConfig
from nmflow.train.optim import build_optimizer, constant, cosine, inverse_sqrt, learning_rate

# -- the learning rate -------------------------------------------------------------------------------------------


def test_constant_by_hand():
    assert [constant(s, 5, warmup_steps=4) for s in range(5)] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert [constant(s, 3) for s in range(3)] == [1.0, 1.0, 1.0]
    assert [constant(s, 2, warmup_steps=2) for s in range(2)] == pytest.approx([1 / 3, 2 / 3])


def test_cosine_by_hand():
    half = math.sqrt(0.5)
    expected = [1 / 3, 2 / 3, 1.0, (1 + half) / 2, 0.5, (1 - half) / 2]
    assert [cosine(s, 6, warmup_steps=2) for s in range(6)] == pytest.approx(expected)
    assert cosine(0, 1) == 1.0


@given(total=st.integers(1, 400), part=st.floats(0, 1))
def test_shape_of_all(total, part):
    warmup = int(part * total)
    for schedule in (constant, cosine, inverse_sqrt):
        rates = [schedule(s, total, warmup) for s in range(total)]
        assert all(0 < rate <= 1 for rate in rates)
        assert all(b > a for a, b in pairwise(rates[: warmup + 1]))
        if warmup < total:
            assert rates[warmup] == 1.0
            assert all(b <= a for a, b in pairwise(rates[warmup:]))


def test_inverse_sqrt_by_hand():
    expected = [1 / 3, 2 / 3, 1.0, (3 / 4) ** 0.5, (3 / 5) ** 0.5, (3 / 6) ** 0.5]
    assert [inverse_sqrt(s, 6, warmup_steps=2) for s in range(6)] == pytest.approx(expected)
    assert inverse_sqrt(11, 50, warmup_steps=2) == 0.5                # four times the steps, half the rate
    assert inverse_sqrt(11, 12, warmup_steps=2) == 0.5                # whatever the length of the run
    assert [inverse_sqrt(s, 9) for s in (0, 3, 8)] == pytest.approx([1, 1 / 2, 1 / 3])


def test_cosine_is_half_of_a_wave_around_one_half():
    rates = [cosine(s, 101, warmup_steps=1) for s in range(101)]
    falling = rates[1:]
    mirrored = [1 - rate for rate in reversed(falling[1:])]
    assert falling[1:] == pytest.approx(mirrored)


@pytest.mark.parametrize(("step", "total", "warmup"), [(-1, 5, 0), (5, 5, 0), (0, 0, 0), (0, 5, 6), (0, 5, -1)])
@pytest.mark.parametrize("schedule", [constant, cosine, inverse_sqrt])
def test_steps_outside_of_the_run(schedule, step, total, warmup):
    with pytest.raises(ValueError, match=r"step"):
        schedule(step, total, warmup)


def test_learning_rate_rounds_the_warmup_to_whole_steps():
    config = OptimConfig(lr=0.5, schedule="constant", warmup=0.3)
    # 0.3 * 5 = 1.5 rounds up to 2 warm-up steps
    assert [learning_rate(config, s, 5) for s in range(5)] == pytest.approx([0.5 / 3, 1 / 3, 0.5, 0.5, 0.5])


# -- the optimizer -----------------------------------------------------------------------------------------------


class EveryKind(nn.Module):
    """One parameter of every kind that is told apart."""

    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, 4, 8))
        self.embedding = nn.Embedding(5, 8)
        self.stem = nn.Conv2d(1, 8, 2)
        self.attention = nn.MultiheadAttention(8, 2)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)
        self.frozen = nn.Linear(8, 3)
        self.frozen.requires_grad_(False)


def test_only_matrices_decay():
    model = EveryKind()
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.25))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decay = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay == {
        "stem.weight": 0.25,
        "attention.in_proj_weight": 0.25,
        "attention.out_proj.weight": 0.25,
        "head.weight": 0.25,
        "position": 0.0,
        "embedding.weight": 0.0,
        "stem.bias": 0.0,
        "attention.in_proj_bias": 0.0,
        "attention.out_proj.bias": 0.0,
        "norm.weight": 0.0,
        "norm.bias": 0.0,
        "head.bias": 0.0,
    }


def test_a_tied_embedding_is_one_parameter_without_decay():
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8, bias=False))
    model[1].weight = model[0].weight
    [group] = build_optimizer(model, OptimConfig()).param_groups
    assert (len(group["params"]), group["weight_decay"]) == (1, 0.0)


def test_update_is_adamw_with_decoupled_decay():
    """Three steps against the formulas, in plain Python numbers."""
    config = OptimConfig(lr=0.1, weight_decay=0.3, betas=(0.8, 0.9), eps=1e-3)
    model = nn.Linear(1, 1).double()
    model.weight.data.fill_(2.0)
    model.bias.data.fill_(-1.0)
    expected = {"weight": 2.0, "bias": -1.0}
    moments = {"weight": (0.0, 0.0), "bias": (0.0, 0.0)}
    optimizer = build_optimizer(model, config)
    for step, gradient in enumerate((0.5, -2.0, 1.0), start=1):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.full_like(parameter, gradient)
            m, v = moments[name]
            m, v = 0.8 * m + 0.2 * gradient, 0.9 * v + 0.1 * gradient**2
            moments[name] = (m, v)
            decay = 0.3 if name == "weight" else 0.0
            update = (m / (1 - 0.8**step)) / (math.sqrt(v / (1 - 0.9**step)) + 1e-3)
            expected[name] -= 0.1 * (update + decay * expected[name])
        optimizer.step()
    found = {name: parameter.item() for name, parameter in model.named_parameters()}
    assert found == pytest.approx(expected, abs=1e-12)
