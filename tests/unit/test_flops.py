"""FLOPs: against sums worked out by hand, torch's own counter, loops over a run's steps, and the paper's tables."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch import library as operators
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

import nmflow
from nmflow import Pattern, count_flops
from nmflow.cli import cli
from nmflow.models.example import example_input
from nmflow.models.skeleton import skeleton
from nmflow.report.columns import short
from nmflow.report.coverage import Forward, report_coverage
from nmflow.schedules import Recipe, recipe, sequence
from nmflow.targets import Coverage, candidates


# ------------------------------------------------------------------------------------------- layers, by hand
def mlp(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


def test_a_linear_layer() -> None:
    report = count_flops(nn.Linear(64, 32), torch.zeros(3, 5, 64), {"weight": "2:16"})
    assert report.dense.total == 2 * 15 * 64 * 32
    assert report.total == report.dense.total // 8
    assert (report.blocks, report.by_kind, report.training) == (0, {"other": report.total}, None)
    assert count_flops(nn.Linear(6, 4), torch.zeros(6)).by_layer == {"": 2 * 6 * 4}


def test_a_last_short_block_is_counted_as_it_is_kept() -> None:
    report = count_flops(nn.Linear(10, 4), torch.zeros(7, 10), {"weight": "2:8"}, remainder="partial")
    assert report.total == 2 * 7 * 4 * (2 + 2)  # two of the first eight, two of the two that are left
    assert count_flops(nn.Linear(10, 4), torch.zeros(7, 10), {"weight": "2:8"}, remainder="skip").total == 2 * 7 * 40


def test_an_mlp() -> None:
    report = count_flops(mlp(16, 40), torch.zeros(9, 16), {"0.weight": "1:4", "2.weight": "1:8"})
    assert report.by_layer == {"0": 2 * 9 * 16 * 40 // 4, "2": 2 * 9 * 40 * 16 // 8}
    assert report.total == sum(report.by_layer.values())


@pytest.mark.parametrize(
    ("layer", "shape", "flops"),
    [
        (nn.Conv2d(6, 8, 3, stride=2, padding=1), (2, 6, 9, 9), 2 * 2 * 5 * 5 * 8 * 6 * 9),
        (nn.Conv2d(6, 8, 3, groups=2, dilation=2), (2, 6, 9, 9), 2 * 2 * 5 * 5 * 8 * 3 * 9),
        (nn.Conv1d(6, 8, 3), (6, 9), 2 * 7 * 8 * 6 * 3),
        (nn.ConvTranspose2d(6, 4, 3, stride=2, groups=2), (2, 6, 5, 5), 2 * 2 * 25 * 6 * 2 * 9),
    ],
)
def test_convolutions(layer: nn.Module, shape: tuple[int, ...], flops: int) -> None:
    assert count_flops(layer, torch.zeros(shape)).total == flops


def test_a_sparse_convolution_has_the_role_of_one() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3, padding=1))
    report = count_flops(model.to(memory_format=torch.channels_last), torch.zeros(1, 3, 8, 8), {"conv": "1:8"})
    assert report.by_kind == {"conv": 2 * 36 * 12 * 9, "other": 2 * 36 * 8 * 27}  # the stem stays dense


@pytest.mark.parametrize("looks", [True, False], ids=["products", "one operator"])
def test_attention(looks: bool) -> None:
    """5 queries of 16 features, 7 keys and values of another width, in 4 heads; a batch of 3."""
    layer = nn.MultiheadAttention(16, 4, kdim=8, vdim=12, batch_first=True)
    q, k, v = torch.zeros(3, 5, 16), torch.zeros(3, 7, 8), torch.zeros(3, 7, 12)
    report = count_flops(layer, {"query": q, "key": k, "value": v, "need_weights": looks}, {"k": "1:4", "o": "2:16"})
    assert report.by_kind == {
        "Q": 2 * 15 * 16 * 16,
        "K": 2 * 21 * 8 * 16 // 4,
        "V": 2 * 21 * 12 * 16,
        "O": 2 * 15 * 16 * 16 // 8,
        "Logit": 2 * 3 * 5 * 7 * 16,
        "Attend": 2 * 3 * 5 * 7 * 16,
    }


def test_the_rows_of_a_fused_projection_have_patterns_of_their_own() -> None:
    """Cross attention reads queries from one slice, keys and values from the rest: fewer tokens for those."""
    layer = nn.MultiheadAttention(16, 4, batch_first=True)
    q, memory = torch.zeros(3, 5, 16), torch.zeros(3, 7, 16)
    report = count_flops(layer, (q, memory, memory), {"qk": "1:4", "v": "1:8"})
    kinds = report.by_kind
    assert (kinds["Q"], kinds["K"], kinds["V"]) == (2 * 15 * 256 // 4, 2 * 21 * 256 // 4, 2 * 21 * 256 // 8)
    assert [part.rows for part in report.layers[:3]] == [(0, 16), (16, 32), (32, 48)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_gpt2_block(attention: str) -> None:
    """One projection for Q, K and V, weights that lie [in, out]."""
    transformers = pytest.importorskip("transformers", reason="an extra")
    sizes = {"n_embd": 48, "n_layer": 1, "n_head": 4, "n_inner": 96, "vocab_size": 50}
    config = transformers.AutoConfig.for_model("gpt2", bos_token_id=0, eos_token_id=0, **sizes)
    model = transformers.AutoModel.from_config(config, attn_implementation=attention)
    tokens = 2 * 7
    report = count_flops(model, {"input_ids": torch.zeros(2, 7, dtype=torch.long)}, {"ff": "1:16", "v": "1:4"})
    assert report.by_layer == {
        "h.0.attn.c_attn": 2 * tokens * 48 * (48 + 48 + 12),
        "h.0.attn": 2 * (2 * 2 * 7 * 7 * 48),
        "h.0.attn.c_proj": 2 * tokens * 48 * 48,
        "h.0.mlp.c_fc": 2 * tokens * 48 * 96 // 16,
        "h.0.mlp.c_proj": 2 * tokens * 96 * 48 // 16,
    }
    assert report.by_kind["V"] == 2 * tokens * 48 * 48 // 4
    assert report.blocks == report.total


def test_shared_keys_are_read_by_every_head() -> None:
    transformers = pytest.importorskip("transformers", reason="an extra")
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "head_dim": 12, "intermediate_size": 80, "vocab_size": 50, "pad_token_id": 0}  # fmt: skip
    model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model("llama", **sizes))
    kinds = count_flops(model, {"input_ids": torch.zeros(1, 9, dtype=torch.long)}).by_kind
    assert kinds["K"] == kinds["V"] == 2 * (2 * 9 * 48 * 24)
    assert kinds["Logit"] == kinds["Attend"] == 2 * (2 * 9 * 9 * 48)
    assert kinds["FF"] == 2 * 3 * (2 * 9 * 48 * 80)


def test_recurrent_layers() -> None:
    """Two layers of 16 on 8 features, four gates; the second reads the first."""
    layer, x = nn.LSTM(8, 16, num_layers=2), torch.randn(5, 3, 8)
    weights = 4 * 16 * (8 + 16) + 4 * 16 * (16 + 16)
    assert count_flops(layer, x).total == 2 * 15 * weights
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 2, 1]))  # goes by its lengths: it is run as it is
    assert count_flops(layer, (packed,)).total == 2 * 8 * weights


def test_a_weight_in_another_dtype_is_still_that_weight() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    alone = count_flops(layer, torch.zeros(2, 5, 16), {"q": "1:4", "ff": "1:8"})
    with torch.autocast("cpu", torch.bfloat16):
        assert count_flops(layer, torch.zeros(2, 5, 16), {"q": "1:4", "ff": "1:8"}) == alone


class Cast(nn.MultiheadAttention):
    """Its projections in bfloat16, by a weight that is cast before it is split, for the last one after it."""

    def forward(self, few: Tensor, many: Tensor) -> Tensor:  # type: ignore[override]  # what it is for a test
        weight = self.in_proj_weight
        q, k = (F.linear(x, rows) for x, rows in zip((few, many), weight.to(few.dtype)[:32].chunk(2), strict=True))
        return q.sum() + k.sum() + F.linear(many, weight[32:].to(few.dtype)).sum()


def test_rows_are_told_apart_in_a_copy() -> None:
    few, many = (torch.zeros(tokens, 16, dtype=torch.bfloat16) for tokens in (3, 50))
    report = count_flops(Cast(16, 4), (few, many), {"q": "1:16", "v": "1:8"})
    assert report.by_kind == {"Q": 2 * 3 * 256 // 16, "K": 2 * 50 * 256, "V": 2 * 50 * 256 // 8}


def test_a_tied_weight_is_counted_where_it_runs() -> None:
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 50, bias=False))
    model[1].weight = model[0].weight
    assert count_flops(model, torch.zeros(3, 4, dtype=torch.long)).by_layer == {"1": 2 * 12 * 8 * 50}


class Odd(nn.Module):
    """Products by other ways than layers, two softmaxes of which one is no attention's."""

    def __init__(self) -> None:
        super().__init__()
        self.bank = nn.Parameter(torch.zeros(4, 6, 8))
        self.gate = nn.Linear(8, 4)
        self.register_buffer("turn", torch.eye(8))

    def forward(self, x_TC: Tensor) -> Tensor:
        share_TE = self.gate(x_TC).softmax(-1)
        y_TEO = torch.einsum("tc,eoc->teo", x_TC, self.bank)
        scores_TT = (x_TC @ self.turn) @ x_TC.mT
        return (y_TEO * share_TE[..., None]).sum(1), scores_TT.masked_fill(scores_TT > 0, 0).softmax(-1) @ x_TC


def test_products_without_a_layer() -> None:
    report = count_flops(Odd(), torch.zeros(5, 8), {"bank": "1:8"})
    assert report.dense.by_kind == {
        "Logit": 2 * 5 * 8 * 5,
        "Attend": 2 * 5 * 5 * 8,
        "other": 2 * 5 * 8 * 4 + 2 * 5 * 8 * 24 + 2 * 5 * 8 * 8,
    }
    assert report.dense.total - report.total == 2 * 5 * 8 * 24 * 7 // 8


class Pooled(nn.Module):
    """An attention whose only query is a weight: products of a matrix and a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Parameter(torch.zeros(8))

    def forward(self, x_TC: Tensor) -> Tensor:
        return (x_TC @ self.score).softmax(0) @ x_TC


def test_a_vector_is_a_weight_of_one_row() -> None:
    report = count_flops(Pooled(), torch.zeros(5, 8), {"score": "2:8"})
    assert report.dense.by_kind == {"Attend": 2 * 5 * 8, "other": 2 * 5 * 8}
    assert report.by_layer == {"": 2 * 5 * 2 + 2 * 5 * 8}


# ----------------------------------------------------------------------------- networks, by torch's own counter
def counted_by_torch(model: nn.Module, example: Any, backward: bool) -> int:
    """Attention in plain products: the fused ones of a CPU are not counted by every version of torch."""
    model, example = copy.deepcopy((model, example))
    floats = [each for each in ([example] if isinstance(example, Tensor) else ()) if each.is_floating_point()]
    for tensor in floats:
        tensor.requires_grad_()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = model.eval()(**example) if isinstance(example, dict) else model.eval()(example)
        if backward:
            outputs = [out] if isinstance(out, Tensor) else [each for each in out.values() if isinstance(each, Tensor)]
            sum(each.sum() for each in outputs).backward()
    return counter.get_total_flops()


def transformer(kind: str, **sizes: Any) -> Callable[[], tuple[nn.Module, Any]]:
    def build() -> tuple[nn.Module, Any]:
        transformers = pytest.importorskip("transformers", reason="an extra")
        ids = torch.ones(2, 7, dtype=torch.long)
        config = transformers.AutoConfig.for_model(
            kind, vocab_size=60, pad_token_id=0, bos_token_id=1, eos_token_id=1, **sizes
        )
        both = {"decoder_input_ids": ids[:, :5]} if config.is_encoder_decoder else {}
        return transformers.AutoModel.from_config(config), {"input_ids": ids, **both}

    return build


def image_model(name: str, side: int, **sizes: Any) -> Callable[[], tuple[nn.Module, Any]]:
    def build() -> tuple[nn.Module, Any]:
        timm = pytest.importorskip("timm", reason="an extra")
        return timm.create_model(name, **sizes), torch.randn(1, 3, side, side)

    return build


BERT = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 80}
SEQ2SEQ = {"d_model": 48, "encoder_layers": 2, "decoder_layers": 1, "encoder_ffn_dim": 80, "decoder_ffn_dim": 112,
           "encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_start_token_id": 0}  # fmt: skip
NETWORKS: Mapping[str, Callable[[], tuple[nn.Module, Any]]] = {
    "torch encoder": lambda: (nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), torch.randn(2, 5, 16)),
    "bert": transformer("bert", **BERT),
    "gpt2": transformer("gpt2", n_embd=48, n_layer=2, n_head=4),
    "llama": transformer("llama", **BERT, num_key_value_heads=2),
    "t5": transformer("t5", d_model=48, d_kv=8, num_heads=4, d_ff=80, num_layers=2, decoder_start_token_id=0),
    "marian": transformer("marian", **SEQ2SEQ),
    "vit": image_model("vit_tiny_patch16_224", 32, img_size=32, depth=2),
    "swinv2": image_model("swinv2_tiny_window8_256", 64, img_size=64, depths=(1, 1, 1, 1)),
    "resnet": image_model("resnet18", 32),
    "convnext": image_model("convnext_atto", 32),
}
MISCOUNTED = {"convnext"}
"""Torch's counter takes the gradient of a depthwise convolution's weight for that of a dense one."""


@pytest.mark.parametrize("name", NETWORKS)
def test_dense_totals_are_those_of_torchs_counter(name: str) -> None:
    """Forward, and a training step: of a float example the gradient too, for a first layer has three products here."""
    model, example = NETWORKS[name]()
    report = count_flops(model, example, recipe="dense", total_steps=1)
    assert report.total == counted_by_torch(model, example, backward=False)
    of_a_step = 3 * report.total if name in MISCOUNTED else counted_by_torch(model, example, backward=True)
    assert report.training == of_a_step
    assert report.unknown == ()


def test_weights_that_do_not_learn_have_no_gradient() -> None:
    model = mlp(16, 40)
    model[0].requires_grad_(False)
    x = torch.zeros(9, 16)
    assert count_flops(model, x, recipe="dense", total_steps=1).training == counted_by_torch(model, x, backward=True)


# --------------------------------------------------------------------------------------- runs, step by step
def run_step_by_step(made: Recipe, steps: int, rules: Mapping[str, str], sizes: Mapping[str, tuple[int, int]]) -> int:
    """Linear layers [out, in] on one token, every step by itself."""
    total = 0
    for step in range(steps):
        for name, (height, axis) in sizes.items():
            density = 1.0
            if name in rules:
                stage = made.at(step, steps, rules[name], axis)
                density = (stage.pattern if stage.decay == 0 else stage.outer).density
            dense = 2 * height * axis
            total += round(2 * dense * density) + dense
    return total


RECIPES: dict[str, Recipe] = {
    **{name: recipe(name) for name in nmflow.recipes()},
    "d is 0 long before the end of the decay phase": recipe("mdgf-linear", beta=0.05),
    "a schedule": recipe("mdgf-exponential", schedule=[(0.1, "4:16"), (0.5, "1:16")]),
    "frozen": recipe("sr-ste", freeze=True, dense=0.25),
    "a sequence": sequence(("sdgf-stepwise", 0.5, "4:16"), ("mdgf-linear", 1.0)),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_costs_what_its_steps_cost(name: str) -> None:
    made, rules = RECIPES[name], {"0": "1:16", "2": "1:16"}
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 8))
    sizes = {"0": (32, 64), "2": (48, 32), "4": (8, 48)}
    report = count_flops(model, torch.zeros(1, 64), rules, made, 103)
    assert report.training == run_step_by_step(made, 103, rules, sizes)
    assert report.dense.training == 103 * 3 * report.dense.total
    assert report.schedule is not None
    assert [each.start for each in report.schedule] == [0, *(each.end for each in report.schedule[:-1])]
    for stretch in report.schedule:
        assert made.at(stretch.start, 103, "1:16", 64).phase == stretch.phase
        assert made.at(stretch.end - 1, 103, "1:16", 64).phase == stretch.phase


def test_mask_decay_costs_dense_flops_until_it_has_ended() -> None:
    report = count_flops(nn.Linear(64, 32), torch.zeros(10, 64), {"weight": "1:16"}, "mdgf-exponential", 1000)
    f = 2 * 10 * 64 * 32
    assert report.training == 700 * 3 * f + 300 * (f // 16 + f // 16 + f)
    stepwise = count_flops(nn.Linear(64, 32), torch.zeros(10, 64), {"weight": "1:16"}, "sdgf-stepwise", 1000)
    assert [each.forward for each in stepwise.schedule or ()] == [f, *(f * n // 16 for n in (15, 8, 4, 2, 1)), f // 16]


def test_the_dense_recipe_leaves_everything_dense() -> None:
    report = count_flops(nn.Linear(64, 32), torch.zeros(10, 64), {"weight": "1:16"}, "dense", 10)
    assert (report.total, report.training) == (report.dense.total, 30 * report.total)


# -------------------------------------------------------------------------------------------------- properties
PATTERNS = st.integers(1, 5).flatmap(lambda m: st.tuples(st.integers(1, 2**m - 1), st.just(2**m)))


@settings(max_examples=25)
@given(
    widths=st.lists(st.sampled_from([32, 64, 96]), min_size=2, max_size=4), pattern=PATTERNS, tokens=st.integers(1, 9)
)
def test_linear_in_density_additive_over_layers(widths: list[int], pattern: tuple[int, int], tokens: int) -> None:
    with torch.device("meta"):
        layers = [nn.Linear(one, two) for one, two in pairwise(widths)]
        example = torch.zeros(tokens, widths[0])
    n, m = pattern
    model, rules = nn.Sequential(*layers), {f"{place}": f"{n}:{m}" for place in range(len(layers))}
    report = count_flops(model, example, rules, "sdgf-stepwise", 200)
    assert report.total * m == report.dense.total * n
    assert report.total <= report.dense.total
    assert (report.training or 0) <= (report.dense.training or 0)
    alone = [count_flops(layer, torch.zeros(tokens, layer.in_features), {"weight": f"{n}:{m}"}) for layer in layers]
    assert report.total == sum(each.total for each in alone) == sum(report.by_layer.values())
    assert list(report.by_layer.values()) == [each.total for each in alone]
    twice = count_flops(model, torch.zeros(2 * tokens, widths[0]), rules, "sdgf-stepwise", 200)
    assert (twice.total, twice.training) == (2 * report.total, 2 * (report.training or 0))


# ------------------------------------------------------------------------------- one network in its several states
def test_the_patterns_of_a_run_are_known_by_its_model() -> None:
    rules, x = {"ff": "1:8", "qk": "1:4"}, torch.randn(2, 5, 16)
    model = nn.Sequential(*(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True) for _ in range(2)))
    wanted = count_flops(model, x, rules)
    assert wanted.total < count_flops(model, x).total
    sparsifier = nmflow.Sparsifier(model, rules, "mdgf-linear", 10)
    assert count_flops(model, x) == wanted
    for _ in range(10):
        sparsifier.step()
    assert count_flops(model, x) == wanted
    sparsifier.finalize()
    assert count_flops(model, x) == wanted
    assert count_flops(torch.compile(model), x) == wanted
    compressed = nmflow.compress(model)
    assert count_flops(compressed, x) == wanted
    assert count_flops(nmflow.for_inference(compressed), x) == wanted


def test_counting_changes_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 8)).train()
    nmflow.Sparsifier(model, {"3.weight": "1:16"}, "sr-ste", 10)
    before, x = copy.deepcopy(model.state_dict()), torch.randn(2, 3, 8, 8)
    count_flops(model, x)
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not x.is_meta
    assert model(x).isfinite().all()


class Looks(nn.Module):
    """Goes by the numbers it finds, which there are none of on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.BatchNorm1d(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(self.norm(x))
        return self.layer(y) if bool((x > 1).any()) else y


def test_a_network_that_goes_by_numbers_runs_with_its_own() -> None:
    model = Looks()
    assert count_flops(model, torch.full((3, 8), 2.0)).by_layer == {"layer": 2 * 2 * 3 * 64}
    assert count_flops(model, torch.zeros(3, 8)).by_layer == {"layer": 2 * 3 * 64}
    assert model.training
    assert torch.equal(model.norm.running_mean, torch.zeros(8))
    with pytest.raises(ValueError, match="does not run without numbers"):
        count_flops(Looks().to("meta"), torch.zeros(3, 8))


@operators.custom_op("nmflow_test::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return x * 2


@twice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Foreign(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return twice(x)


def test_biases_alone_have_gradients_sent_through_frozen_layers() -> None:
    """Of a chain behind a frozen embedding every layer but the first one passes gradients on to biases before it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 16), *(nn.Linear(16, 16) for _ in range(3)))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    tokens = torch.tensor([1])
    with FlopCounterMode(display=False) as counter:
        model(tokens).sum().backward()
    report = count_flops(model, tokens, None, "dense", total_steps=1)
    assert report.training == counter.get_total_flops() == 5 * 2 * 16 * 16


def test_a_product_of_three_is_not_taken_for_none() -> None:
    report = count_flops(nn.Bilinear(4, 5, 6), (torch.zeros(2, 4), torch.zeros(2, 5)))
    assert list(report.unknown) == ["aten._trilinear"]


def test_operators_that_nobody_knows_are_named() -> None:
    report = count_flops(Foreign(), torch.zeros(3, 8))
    assert (report.total, report.unknown) == (0, ("nmflow_test.twice",))


def test_operators_that_torchs_counter_knows_are_counted() -> None:
    @operators.custom_op("nmflow_test::product", mutates_args=())
    def product(x: Tensor, y: Tensor) -> Tensor:
        return x @ y

    @product.register_fake
    def _(x: Tensor, y: Tensor) -> Tensor:
        return x.new_empty(x.shape[0], y.shape[1])

    @register_flop_formula(torch.ops.nmflow_test.product)
    def _(x_shape: Any, y_shape: Any, **others: Any) -> int:
        return 1234

    class Calls(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return product(x, self.weight)

    report = count_flops(Calls(8, 8), torch.zeros(3, 8), {"weight": "1:8"})
    assert (report.dense.total, report.total, report.unknown) == (1234, 1234 // 8, ())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"targets": {"ff": "1:4"}}, "matches nothing"),
        ({"targets": {"weight": "1:5"}}, "5 does not divide it"),
        ({"recipe": "ste"}, "need both"),
        ({"total_steps": 10}, "need both"),
        ({"recipe": "ste", "total_steps": 10}, "without a sparse weight"),
        ({"targets": {"weight": "1:8"}, "recipe": "sdgf-stepwise", "total_steps": 2}, "too short"),
        ({"targets": {"weight": "1:8"}, "recipe": "sdgf-stepwize", "total_steps": 20}, "did you mean"),
        ({"recipe": "dense", "total_steps": 0}, "total_steps"),
        (
            {"targets": {"weight": "1:8"}, "recipe": recipe("ste", schedule=[(0.1, "8:32"), (0.5, "1:8")]),
             "total_steps": 20},
            "32 does not divide it",
        ),
    ],
)  # fmt: skip
def test_what_a_sparsifier_refuses_is_refused(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        count_flops(nn.Linear(16, 4), torch.zeros(2, 16), **arguments)


def test_an_input_that_does_not_fit_is_told_as_torch_tells_it() -> None:
    with pytest.raises(RuntimeError, match="3x9 and 16x4"):
        count_flops(nn.Linear(16, 4), torch.zeros(3, 9))


# -------------------------------------------------------------------------------- the paper's tables 1, 17 and 18
def as_printed(found: float, printed: str) -> bool:
    """Within half a percent, or one unit of the last digit that is printed."""
    unit = 10.0 ** -len(printed.partition(".")[2])
    return abs(found - float(printed)) <= max(0.005 * float(printed), unit * 1.0001)


@pytest.fixture(scope="module")
def vit_base() -> nn.Module:
    """The paper counts 196 tokens: the patches of an image of 224 pixels, without a class token."""
    timm = pytest.importorskip("timm", reason="an extra")
    with torch.device("meta"):
        model: nn.Module = timm.create_model("vit_base_patch16_224", class_token=False, global_pool="avg")
    return model


def image() -> Tensor:
    return torch.empty(1, 3, 224, 224, device="meta")


def test_table_17_the_parts_of_vit_base(vit_base: nn.Module) -> None:
    report = count_flops(vit_base, image())
    giga = {kind: flops / 1e9 for kind, flops in report.by_kind.items()}
    for kind in ("Q", "K", "V", "O", "Logit", "Attend"):
        assert as_printed(giga[kind], "2.77" if len(kind) == 1 else "0.71"), kind
    for layer in ("fc1", "fc2"):
        flops = sum(flops for name, flops in report.by_layer.items() if name.endswith(f"mlp.{layer}"))
        assert as_printed(flops / 1e9, "11.1"), layer
    assert as_printed(sum(flops for kind, flops in giga.items() if kind not in ("FF", "other")), "12.51")
    assert as_printed(giga["FF"], "22.19")


@pytest.mark.parametrize(
    ("pattern", "printed"),
    [("dense", "34.71"), ("2:4", "23.61"), ("1:4", "18.06"), ("1:8", "15.29"), ("1:16", "13.90"), ("1:32", "13.20"),
     ("1:128", "12.69")],
)  # fmt: skip
def test_table_18_vit_base_with_a_sparse_ff(vit_base: nn.Module, pattern: str, printed: str) -> None:
    assert as_printed(count_flops(vit_base, image(), {"ff": pattern}).blocks / 1e9, printed)


def test_table_1_where_flops_and_parameters_are(vit_base: nn.Module) -> None:
    forward = Forward("an image", count_flops(vit_base, image()))
    groups = report_coverage("vit", candidates(vit_base), Coverage(()), forward).groups
    blocks = forward.report.blocks
    weights = {role: sum(each.weights for each in groups if each.roles == role) for role in ("q k v", "o", "ff")}
    flops = {role: sum(each.flops for each in groups if each.roles == role) for role in weights}
    parts = [
        (blocks - sum(flops.values()), "1.42", "4", 0, "0"),
        (flops["q k v"] + flops["o"], "11.1", "32", weights["q k v"] + weights["o"], "33.3"),
        (flops["ff"], "22.20", "64", weights["ff"], "66.6"),
    ]
    for of_part, giga, share, parameters, share_of_parameters in parts:
        assert as_printed(of_part / 1e9, giga)
        assert as_printed(100 * of_part / blocks, share)
        assert as_printed(100 * parameters / sum(weights.values()), share_of_parameters)
    assert as_printed(parts[1][3] / 1e6, "28.31")
    assert as_printed(parts[2][3] / 1e6, "56.62")


def test_one_of_sixteen_takes_60_percent_fewer_flops_than_dense(vit_base: nn.Module) -> None:
    sixteen, two, dense = (count_flops(vit_base, image(), {"ff": each}).blocks for each in ("1:16", "2:4", "dense"))
    assert as_printed(100 * (1 - sixteen / dense), "60")
    assert as_printed(100 * (1 - sixteen / two), "41")


def test_what_is_printed_can_be_missed() -> None:
    """The check itself: another number of tokens (197, with the class token) or a multiply-add as one do not pass."""
    assert not as_printed(34.89, "34.71")
    assert not as_printed(34.71 / 2, "34.71")
    assert as_printed(13.2079, "13.20")


# ------------------------------------------------------------------------------------ the paper's other networks
def layer_flops(queries: int, keys: int, width: int, hidden: int = 0) -> int:
    """Q, O on the queries, K, V on the keys, Logit and Attend, and a feed-forward layer on the queries."""
    projections = 2 * (2 * queries + 2 * keys) * width * width
    return projections + 4 * queries * keys * width + 4 * queries * width * hidden


def test_vit_large() -> None:
    pytest.importorskip("timm", reason="an extra")
    network = skeleton("timm:vit_large_patch16_224")
    report = count_flops(network, image(), {"ff": "1:16"})
    assert report.dense.blocks == 24 * layer_flops(197, 197, 1024, 4096)
    assert report.blocks == 24 * layer_flops(197, 197, 1024, 256)


def test_swinv2_base() -> None:
    """Windows of 64 tokens; an image of 256 pixels has 64, 32, 16 and 8 patches a side in the four stages."""
    pytest.importorskip("timm", reason="an extra")
    network = skeleton("timm:swinv2_base_window8_256")
    report = count_flops(network, torch.empty(1, 3, 256, 256, device="meta"))
    stages = zip((2, 2, 18, 2), (64, 32, 16, 8), (128, 256, 512, 1024), strict=True)
    assert report.blocks == sum(
        depth * (side // 8) ** 2 * layer_flops(64, 64, width, 4 * width) for depth, side, width in stages
    )


def test_t5_base() -> None:
    transformers = pytest.importorskip("transformers", reason="an extra")
    sizes = {"d_model": 768, "d_kv": 64, "num_heads": 12, "d_ff": 3072, "num_layers": 12, "vocab_size": 32128}
    with torch.device("meta"):
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
        ids = torch.empty(1, 512, dtype=torch.long)
    report = count_flops(model, {"input_ids": ids, "decoder_input_ids": ids[:, :64]})
    encoder, decoder = layer_flops(512, 512, 768, 3072), layer_flops(64, 64, 768, 3072) + layer_flops(64, 512, 768)
    assert report.blocks == 12 * (encoder + decoder)
    assert report.total - report.blocks == report.by_layer["lm_head"] == 2 * 64 * 768 * 32128


def test_the_encoder_decoder_of_the_translations() -> None:
    """6 + 6 layers of width 1024, hidden layers of 4096, 256 tokens."""
    transformers = pytest.importorskip("transformers", reason="an extra")
    layers = {"encoder_layers": 6, "decoder_layers": 6, "encoder_ffn_dim": 4096, "decoder_ffn_dim": 4096}
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(
            transformers.AutoConfig.for_model("marian", d_model=1024, vocab_size=1000, pad_token_id=0, **layers)
        )
    example = example_input(model, length=256)
    report = count_flops(model, example.inputs, {"ff": "1:32"})
    whole, attention = layer_flops(256, 256, 1024, 4096), layer_flops(256, 256, 1024)
    assert report.dense.blocks == report.dense.total == 12 * whole + 6 * attention
    assert report.dense.blocks - report.blocks == 12 * (whole - attention) * 31 // 32


# -------------------------------------------------------------------------------------------- on the command line
def call(*arguments: str) -> Any:
    return CliRunner().invoke(cli, list(arguments))


def test_the_command_counts() -> None:
    """vit-tiny: 64 patches of 4 x 4 pixels, three layers of width 192, ten classes."""
    done = call("flops", "vit-tiny", "pattern=1:16", "recipe=sr-ste", "steps=100", "--json")
    assert done.exit_code == 0, done.output
    facts = json.loads(done.output)
    rest = 2 * 64 * 48 * 192 + 2 * 192 * 10
    assert facts["example"] == "1 image of 3 x 32 x 32, the size that it is configured for"
    assert facts["blocks"] == {"dense": 3 * layer_flops(64, 64, 192, 768), "sparse": 3 * layer_flops(64, 64, 192, 48)}
    assert facts["total"]["sparse"] == facts["blocks"]["sparse"] + rest == sum(facts["by_layer"]["sparse"].values())
    assert facts["training"]["dense"] == 300 * facts["total"]["dense"]
    assert [(each["start"], each["end"], each["phase"]) for each in facts["schedule"]] == [(0, 100, "fine-tune")]
    lines = call("flops", "vit-tiny", "pattern=1:16", "recipe=sr-ste", "steps=100").output.splitlines()
    assert lines[0] == f"vit-tiny, a forward on {facts['example']}"
    assert any(line.split()[:5] == ["encoder.layers.*.linear1.weight", "3", "FF", "1:16", "56.62"] for line in lines)
    training = facts["training"]
    assert lines[-1] == (
        f"training, 100 steps by sr-ste: {short(training['sparse'])}, "
        f"{100 * training['sparse'] / training['dense']:.1f} % of {short(training['dense'])} for as many dense ones"
    )


def test_the_command_takes_sizes() -> None:
    sizes = ("--length", "32", "--batch", "4")
    facts = json.loads(call("flops", "lm-tiny", *sizes, "--targets", "q=1:8", "--json").output)
    assert facts["example"] == "4 texts of 32 tokens"
    assert facts["by_kind"]["dense"]["Logit"] == 4 * 3 * 2 * 32 * 32 * 192
    assert facts["by_kind"]["sparse"]["Q"] * 8 == facts["by_kind"]["dense"]["Q"] == 3 * 2 * 4 * 32 * 192 * 192
    assert facts["training"] == {"dense": None, "sparse": None}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("vit-tiny", "patern=1:16"), "expected pattern=N:M, recipe=NAME or steps=NUMBER"),
        (("vit-tiny", "steps=5"), "need both"),
        (("vit-tiny", "pattern=1:16", "pattern=1:8"), "given twice"),
        (("vit-tiny", "pattern=1:16", "--targets", "ff=1:8"), "given twice"),
        (("vit-tiny", "pattern=16:1"), "did you mean"),
        (("vit-tiny", "recipe=ste", "steps=5"), "of which weights?"),
        (("vit-tiny", "pattern=1:16", "recipe=ste", "steps=0"), "expected a number of optimizer steps"),
        (("vit-tiny", "pattern=1:128"), "128 does not divide it"),
        (("vit-tiny", "--length", "5"), "is of no use: the network takes images"),
        (("vit-tiny", "--image", "30"), "does not run without numbers"),
        (("lm-tiny", "--image", "32"), "is of no use: the network takes text"),
        (("vit-tny",), "no network"),
    ],
)
def test_the_command_refuses(arguments: tuple[str, ...], told: str) -> None:
    done = call("flops", *arguments)
    assert done.exit_code == 2
    assert told in done.output


@pytest.mark.parametrize(
    ("flops", "text"),
    [(0, "0"), (999, "999"), (1000, "1.000 K"), (22_196_256_768, "22.20 G"), (999_949, "999.9 K"),
     (999_960, "1.000 M"), (123_456_789 * 10**15, "123457 E")],
)  # fmt: skip
def test_numbers_for_people(flops: int, text: str) -> None:
    assert short(flops) == text


EXAMPLES = {
    "timm:resnet18": "1 image of 3 x 224 x 224, the size that it is configured for",
    "transformers:bert": "1 text of 512 tokens; its context is 512",
    "transformers:gpt2": "1 text of 512 tokens; its context is 1,024",
    "transformers:t5": "1 pair of texts, each of 512 tokens; its context is not told",
    "transformers:vit": "1 image of 3 x 224 x 224, the size that it is configured for",
    "lm-tiny": "1 text of 128 tokens; its context is 128",
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_networks_say_what_they_are_counted_on(name: str) -> None:
    pytest.importorskip(name.partition(":")[0] if ":" in name else "torch", reason="an extra")
    network = skeleton(name)
    example = example_input(network)
    assert example.text == EXAMPLES[name]
    assert count_flops(network, example.inputs).total > 0


def test_a_network_of_sounds_has_no_example() -> None:
    pytest.importorskip("transformers", reason="an extra")
    with pytest.raises(ValueError, match="neither images nor text"):
        example_input(skeleton("transformers:wav2vec2"))
    done = call("targets", "transformers:wav2vec2")
    assert done.exit_code == 0, done.output
    assert "FLOPs are not counted: the network takes neither images nor text" in done.output
    assert call("targets", "transformers:wav2vec2", "--batch", "2").exit_code == 2


def test_functional_attention_on_plain_tensors() -> None:
    class Heads(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    q, k, v = torch.zeros(2, 4, 5, 8), torch.zeros(2, 4, 7, 8), torch.zeros(2, 4, 7, 6)
    assert count_flops(Heads(), (q, k, v)).by_kind == {"Logit": 2 * 8 * 5 * 7 * 8, "Attend": 2 * 8 * 5 * 7 * 6}


def test_a_pattern_that_keeps_everything_is_dense() -> None:
    x = torch.zeros(2, 16)
    assert count_flops(nn.Linear(16, 4), x, {"weight": Pattern.dense()}).total == 2 * 2 * 64
