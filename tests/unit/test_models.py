"""Models: the same numbers as a forward pass written out by hand, first weights, names, and clear refusals."""

from __future__ import annotations

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nmflow.models import build_model, transformers_models
from nmflow.roles import roles_of
from nmflow.train.config_sections import DataConfig, ModelConfig
from nmflow.train.data import Data, batch_indices, load_data
from nmflow.train.data.splits import Pixels, TensorSplit
from nmflow.train.objectives import Classify, PredictTokens


def images(channels: int = 3, height: int = 8, width: int = 8, classes: int = 5) -> Data:
    """A data set of nothing, to build models for."""
    pixels = Pixels(mean=(0.0,) * channels, std=(1.0,) * channels)
    shape = (channels, height, width)
    split = TensorSplit(torch.zeros(1, *shape, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64), pixels)
    return Data("none", "images", Classify(), split, split, split, classes, shape)


def text(context: int = 7, vocabulary: int = 11) -> Data:
    data = images()
    return Data("none", "text", PredictTokens(), data.train, data.val, data.test, vocabulary, (context,))


def build(data: Data, seed: int = 0, name: str = "vit-tiny", **sizes: object) -> torch.nn.Module:
    torch.manual_seed(seed)
    return build_model(ModelConfig(name=name, **sizes), data)


SMALL = {"width": 12, "depth": 2, "heads": 3, "mlp_ratio": 2.0}


# ------------------------------------------------------------------------------- a forward pass by hand
def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5) * weight + bias


def attention(x: Tensor, w: dict[str, Tensor], heads: int, hidden: Tensor | None) -> Tensor:
    """One token, one head at a time."""
    tokens, width = x.shape
    size = width // heads
    mixed = torch.zeros(tokens, width, dtype=x.dtype)
    q, k, v = (x @ w["in_proj_weight"].T + w["in_proj_bias"]).split(width, dim=-1)
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        for token in range(tokens):
            scores = torch.stack([(q[token, part] * k[other, part]).sum() for other in range(tokens)])
            scores = scores / math.sqrt(size)
            if hidden is not None:
                scores[hidden[token]] = -math.inf
            mixed[token, part] = torch.softmax(scores, 0) @ v[:, part]
    return mixed @ w["out_proj.weight"].T + w["out_proj.bias"]


def stack(x: Tensor, state: dict[str, Tensor], depth: int, heads: int, hidden: Tensor | None = None) -> Tensor:
    def below(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}

    for number in range(depth):
        w = below(f"encoder.layers.{number}.")
        normed = norm(x, w["norm1.weight"], w["norm1.bias"])
        x = x + attention(normed, below(f"encoder.layers.{number}.self_attn."), heads, hidden)
        inner = norm(x, w["norm2.weight"], w["norm2.bias"]) @ w["linear1.weight"].T + w["linear1.bias"]
        inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
        x = x + inner @ w["linear2.weight"].T + w["linear2.bias"]
    return norm(x, state["encoder.norm.weight"], state["encoder.norm.bias"])


def noisy(model: torch.nn.Module) -> dict[str, Tensor]:
    """Make every weight matter, biases and norms too; return them in float64."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return {name: value.double() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("mode", ["train", "eval", "eval without gradients"])
@pytest.mark.parametrize("heads", [3, 4])
def test_vit_is_the_forward_pass_written_out(heads, mode):
    model = build(images(height=4, width=6), patch=2, **{**SMALL, "heads": heads}).train(mode == "train")
    state = noisy(model)
    batch = torch.randn(2, 3, 4, 6)
    expected = []
    for image in batch.double():
        patches = [image[:, i : i + 2, j : j + 2] for i in (0, 2) for j in (0, 2, 4)]
        tokens = [(state["stem.weight"] * patch).sum((1, 2, 3)) + state["stem.bias"] for patch in patches]
        x = stack(torch.stack(tokens) + state["position"][0], state, depth=2, heads=heads)
        expected.append(x.mean(0) @ state["head.weight"].T + state["head.bias"])
    with torch.set_grad_enabled(mode != "eval without gradients"):
        torch.testing.assert_close(model(batch).double(), torch.stack(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["train", "eval", "eval without gradients"])
@pytest.mark.parametrize(("heads", "length"), [(3, 7), (4, 5)])
def test_lm_is_the_forward_pass_written_out(heads, length, mode):
    model = build(text(), name="lm-tiny", **{**SMALL, "heads": heads}).train(mode == "train")
    state = noisy(model)
    tokens = torch.randint(0, 11, (2, length))
    hidden = torch.tensor([[other > token for other in range(length)] for token in range(length)])
    expected = []
    for row in tokens:
        x = torch.stack([state["embedding.weight"][token] for token in row]) + state["position"][0, :length]
        x = stack(x, state, depth=2, heads=heads, hidden=hidden)
        expected.append(x @ state["head.weight"].T + state["head.bias"])
    with torch.set_grad_enabled(mode != "eval without gradients"):
        torch.testing.assert_close(model(tokens).double(), torch.stack(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["train", "eval", "eval without gradients"])
def test_lm_does_not_see_the_future(mode):
    model = build(text(), name="lm-tiny", **{**SMALL, "heads": 4}).train(mode == "train")
    tokens = torch.randint(0, 11, (1, 7))
    with torch.set_grad_enabled(mode != "eval without gradients"):
        before = model(tokens)
        for place in range(7):
            changed = tokens.clone()
            changed[0, place] = (changed[0, place] + 1) % 11
            after = model(changed)
            assert torch.equal(after[:, :place], before[:, :place])
            assert not torch.equal(after[:, place], before[:, place])


# ------------------------------------------------------------------------------------- sizes and names
def test_vit_tiny_is_the_papers():
    model = build(images(3, 32, 32, classes=10))
    parameters = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for layer in range(3):
        assert parameters[f"encoder.layers.{layer}.linear1.weight"] == (768, 192)
        assert parameters[f"encoder.layers.{layer}.linear2.weight"] == (192, 768)
        assert parameters[f"encoder.layers.{layer}.self_attn.in_proj_weight"] == (576, 192)
        assert model.encoder.layers[layer].self_attn.num_heads == 3
    assert len(model.encoder.layers) == 3
    assert parameters["stem.weight"] == (192, 3, 4, 4)
    assert parameters["position"] == (1, 64, 192)
    assert parameters["head.weight"] == (10, 192)
    layer = (576 * 192 + 576) + (192 * 192 + 192) + (768 * 192 + 768) + (192 * 768 + 192) + 4 * 192
    assert sum(math.prod(shape) for shape in parameters.values()) == (
        3 * layer + 2 * 192 + (192 * 48 + 192) + 64 * 192 + (10 * 192 + 10)
    )
    assert isinstance(model.stem, torch.nn.Conv2d)


@pytest.mark.parametrize(("size", "patch"), [(8, 2), (32, 4), (64, 16), (224, 16)])
def test_the_patch_follows_the_image(size, patch):
    assert build(images(1, size, size), **SMALL).stem.kernel_size == (patch, patch)


@pytest.mark.parametrize(("name", "data"), [("vit-tiny", images()), ("lm-tiny", text())])
def test_feed_forward_and_attention_are_found_by_their_names(name, data):
    model = build(data, name=name, **SMALL)
    roles = {parameter: roles_of(parameter) for parameter, _ in model.named_parameters()}
    assert sorted(parameter for parameter, role in roles.items() if role == ("ff",)) == [
        f"encoder.layers.{layer}.linear{number}.weight" for layer in range(2) for number in (1, 2)
    ]
    assert sum(role == ("q", "k", "v") for role in roles.values()) == 2
    assert sum(role == ("o",) for role in roles.values()) == 2


# ------------------------------------------------------------------------------------------ first weights
@pytest.mark.parametrize(("name", "data"), [("vit-tiny", images()), ("lm-tiny", text())])
def test_first_weights_come_from_torchs_random_state(name, data):
    first, again, other = (build(data, seed, name, **SMALL).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])
    assert not torch.equal(first["encoder.layers.0.linear1.weight"], first["encoder.layers.1.linear1.weight"])


def test_first_weights_keep_the_signal_at_one_scale():
    state = build(images(3, 32, 32), depth=8).state_dict()
    for name, value in state.items():
        if name == "position":
            expected = 1.0
        elif value.dim() > 1:
            expected = 1 / math.sqrt(math.prod(value.shape[1:]))
            expected *= 0.25 if name.endswith(("out_proj.weight", "linear2.weight")) else 1.0
        else:
            assert torch.equal(value, torch.full_like(value, float("norm" in name and "weight" in name))), name
            continue
        assert abs(float(value.std()) / expected - 1) < 0.1, name
    embedding = build(text(vocabulary=200), name="lm-tiny").state_dict()["embedding.weight"]
    assert abs(float(embedding.std()) - 1) < 0.1


def test_dropout_acts_in_training_alone():
    for name, data, batch in (
        ("vit-tiny", images(), torch.randn(2, 3, 8, 8)),
        ("lm-tiny", text(), torch.zeros(2, 7, dtype=torch.int64)),
    ):
        model = build(data, name=name, dropout=0.5, **SMALL)
        assert not torch.equal(model(batch), model(batch))
        model.eval()
        assert torch.equal(model(batch), model(batch))


def test_a_small_vit_learns_the_digits():
    """The default of width 192 reaches 97 % on val in 200 steps of 64; this is a quick relative of it."""
    data = load_data(DataConfig())
    model = build(data, width=96, depth=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(60):
        inputs, labels = data.train.batch(batch_indices(len(data.train), 32, seed=0, step=step))
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        inputs, labels = data.val.batch(torch.arange(len(data.val)))
        assert float((model(inputs).argmax(1) == labels).float().mean()) > 0.85


# ---------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("data", "sizes", "told"),
    [
        (images(), {"width": 64}, "model.heads: 3 heads do not divide a width of 64"),
        (images(1, 7, 7), {}, "model.patch: 2 does not divide an image of 7x7"),
        (images(1, 8, 8), {"patch": 3}, "model.patch: 3 does not divide an image of 8x8"),
        (images(), {"drop_path": 0.1}, "model.drop_path: vit-tiny has none, only models of timm do; leave it out"),
        (text(), {}, "vit-tiny takes images, not none; use lm-tiny for text, transformers:NAME"),
        (images(), {"name": "lm-tiny"}, "lm-tiny takes text, not none; use vit-tiny for images, transformers:NAME"),
        (text(), {"name": "lm-tiny", "patch": 2}, "model.patch is of no use to lm-tiny"),
        (text(), {"name": "lm-tiny", "heads": 5}, "model.heads: 5 heads do not divide a width of 192"),
    ],
)
def test_what_does_not_fit_is_refused(data, sizes, told):
    with pytest.raises(ValueError, match=told):
        build(data, **sizes)


# -------------------------------------------------------------------------------------------------- timm
def test_timm_models_take_their_sizes_from_the_data():
    pytest.importorskip("timm", reason="timm is not installed")
    sizes = {"width": 24, "depth": 1, "heads": 3, "patch": 4, "mlp_ratio": 2.0, "dropout": 0.1}
    model = build(images(1, 16, 16), name="timm:vit_tiny_patch16_224", **sizes)
    assert model.blocks[0].mlp.fc1.weight.shape == (48, 24)
    assert model.patch_embed.proj.weight.shape == (24, 1, 4, 4)
    assert len(model.blocks) == 1
    assert model.eval()(torch.zeros(2, 1, 16, 16)).shape == (2, 5)
    resnet = build(images(3, 32, 32), name="timm:resnet10t")
    assert resnet(torch.zeros(2, 3, 32, 32)).shape == (2, 5)


@pytest.mark.parametrize("name", ["resnet10t", "resnet18"])
@pytest.mark.parametrize(
    ("patch", "sides"), [(None, [8, 4, 2, 1]), (4, [8, 4, 2, 1]), (2, [16, 8, 4, 2]), (1, [32, 16, 8, 4])]
)
def test_the_stem_of_a_resnet_takes_as_many_pixels_as_asked(name, patch, sides):
    """32 pixels; every stage after the first halves what the stem leaves."""
    pytest.importorskip("timm", reason="timm is not installed")
    model = build(images(3, 32, 32), name=f"timm:{name}", patch=patch)
    seen = []
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        stage.register_forward_hook(lambda _, __, output: seen.append(output.shape[-2:]))
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 5)
    assert seen == [(side, side) for side in sides]


def test_stochastic_depth_is_timms():
    """The n-th of N blocks is skipped with n / (N - 1) of the rate, counted from 0."""
    layers = pytest.importorskip("timm.layers", reason="timm is not installed")
    model = build(images(), name="timm:vit_tiny_patch16_224", patch=4, depth=3, drop_path=0.2)
    rates = [[m.drop_prob for m in block.modules() if isinstance(m, layers.DropPath)] for block in model.blocks]
    assert rates == [[], pytest.approx([0.1, 0.1]), pytest.approx([0.2, 0.2])]


def test_timm_models_come_from_torchs_random_state():
    pytest.importorskip("timm", reason="timm is not installed")
    first, again, other = (
        build(images(), seed, "timm:vit_tiny_patch16_224", patch=4, depth=1).state_dict()["blocks.0.mlp.fc1.weight"]
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("data", "sizes", "told"),
    [
        (images(), {"name": "timm:resnet18", "width": 8}, "timm's resnet18 refuses embed_dim=8"),
        (images(), {"name": "timm:resnet18", "patch": 3}, "resnet18 can go in steps of 1, 2 or 4 pixels, not 3"),
        (images(), {"name": "timm:vit_tiny_patch16_22"}, '"vit_tiny_patch16_22"; did you mean "vit_tiny_patch16_224"'),
        (images(), {"name": "timm:vit_tiny_patch16_224", "heads": 5}, "refuses num_heads=5"),
        (text(), {"name": "timm:resnet18"}, "timm:resnet18 takes images"),
    ],
)
def test_what_timm_cannot_build_is_refused(data, sizes, told):
    pytest.importorskip("timm", reason="timm is not installed")
    with pytest.raises(ValueError, match=told):
        build(data, **sizes)


def test_without_timm_the_way_to_it_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"needs timm: pip install 'nmflow\[timm\]'"):
        build(images(), name="timm:resnet18")


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("bloom", ("hidden_dropout", "attention_dropout")),
        ("mpt", ("emb_pdrop", "resid_pdrop")),
        ("gpt_neo", ("embed_dropout", "resid_dropout", "attention_dropout")),
    ],
)
def test_dropout_reaches_all_that_transformers_calls_so(name, keys):
    transformers = pytest.importorskip("transformers", reason="needs the optional package transformers")
    config = ModelConfig(name=f"transformers:{name}", pretrained=False, dropout=0.25)
    settings = transformers_models._settings(transformers, name, config, text())
    assert [getattr(settings, key) for key in keys] == [0.25] * len(keys)


def test_dropout_of_a_network_without_is_refused():
    transformers = pytest.importorskip("transformers", reason="needs the optional package transformers")
    config = ModelConfig(name="transformers:mamba", pretrained=False, dropout=0.25)
    with pytest.raises(ValueError, match=r"model\.dropout: of no use to transformers:mamba"):
        transformers_models._settings(transformers, "mamba", config, text())
