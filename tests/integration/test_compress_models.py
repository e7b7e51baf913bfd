"""Compressed models of torch, timm and transformers against the same models pruned by hand, in memory and in files."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nmflow import Sparsifier
from nmflow.ops import select
from nmflow.runtime import (
    NMConv2d,
    NMLinear,
    compress,
    compress_file,
    compression_report,
    decompress,
    load_compressed,
    save_compressed,
    save_model,
    verify,
)
from nmflow.runtime.modules import PackedWeight


# ---------------------------------------------------------------------------------------------- models
def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.attn(x, x, x)[0]
        return found


class CrossAttention(nn.Module):
    """Keys and values of a width of their own: three projection parameters in place of one."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 2, kdim=8, vdim=12, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.attn(x, x[..., :8], x[..., :12])[0]
        return found


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 2)


def convnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.ReLU(), nn.Conv2d(8, 16, 1, bias=False),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip


def vit() -> nn.Module:
    timm = pytest.importorskip("timm", reason="needs the optional package timm")
    model: nn.Module = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=5
    )
    return model


def beit() -> nn.Module:
    """Multiplies with `qkv.weight` itself."""
    timm = pytest.importorskip("timm", reason="needs the optional package timm")
    model: nn.Module = timm.create_model(
        "beit_base_patch16_224", img_size=16, patch_size=4, embed_dim=24, depth=1, num_heads=3, num_classes=5
    )
    return model


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="needs the optional package transformers")
    config = transformers.GPT2Config(
        vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model: nn.Module = transformers.GPT2LMHeadModel(config)
    return model


def t5() -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="needs the optional package transformers")
    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model: nn.Module = transformers.T5ForConditionalGeneration(config)
    return model


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="needs the optional package transformers")
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model: nn.Module = transformers.BertForMaskedLM(config)
    return model


def features(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(3, *shape)


def tokens() -> Tensor:
    return torch.randint(1, 32, (3, 8))


@dataclass(frozen=True)
class Host:
    make: Callable[[], nn.Module]
    draw: Callable[[], Tensor]
    targets: Mapping[str, str]
    sparse: Mapping[str, tuple[tuple[int, int, int, int], ...]]
    """Parameter -> (first row, last row, N, M), written by hand; rows are outputs."""
    kernels: Mapping[str, str] = field(default_factory=dict)
    """What the report must say of some weights; "sparse" stands for the kernel of this machine, and for the others."""
    forward: Callable[[nn.Module, Tensor], Tensor] = lambda model, x: model(x)
    input_gradient: bool = True


STORED = "storage only"


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    found: Tensor = model(ids).logits
    return found


def seq2seq(model: nn.Module, ids: Tensor) -> Tensor:
    found: Tensor = model(input_ids=ids, decoder_input_ids=ids.flip(1)).logits
    return found


HOSTS: dict[str, Host] = {
    "linear": Host(lambda: nn.Linear(16, 8), features(16), {"weight": "1:4"}, {"weight": ((0, 8, 1, 4),)}),
    "mlp": Host(
        mlp, features(16), {"0": "1:16", "2": "3:8"}, {"0.weight": ((0, 32, 1, 16),), "2.weight": ((0, 8, 3, 8),)}
    ),
    "attention": Host(
        Attention,
        features(5, 16),
        {"qk": "1:4", "o": "1:8"},
        {"attn.in_proj_weight": ((0, 16, 1, 4), (16, 32, 1, 4)), "attn.out_proj.weight": ((0, 16, 1, 8),)},
        {"attn.in_proj_weight": STORED, "attn.out_proj.weight": STORED},
    ),
    "attention, own widths": Host(
        CrossAttention,
        features(5, 16),
        {"q": "1:4", "v": "2:6"},
        {"attn.q_proj_weight": ((0, 16, 1, 4),), "attn.v_proj_weight": ((0, 16, 2, 6),)},
        {"attn.q_proj_weight": STORED, "attn.v_proj_weight": STORED},
    ),
    "encoder": Host(
        encoder,
        features(5, 16),
        {"ff": "1:8", "v": "1:4", "o": "2:4"},
        {
            f"layers.{i}.{name}": rows
            for i in range(2)
            for name, rows in {
                "linear1.weight": ((0, 32, 1, 8),),
                "linear2.weight": ((0, 16, 1, 8),),
                "self_attn.in_proj_weight": ((32, 48, 1, 4),),
                "self_attn.out_proj.weight": ((0, 16, 2, 4),),
            }.items()
        },
        {f"layers.{i}.self_attn.{n}": STORED for i in range(2) for n in ("in_proj_weight", "out_proj.weight")},
    ),
    "convnet": Host(
        convnet,
        features(3, 6, 6),
        {"conv": "1:4", "8": "1:8"},
        {"3.weight": ((0, 8, 1, 4),), "5.weight": ((0, 16, 1, 4),), "8.weight": ((0, 4, 1, 8),)},
        {"3.weight": "dense"},
    ),
    "vit": Host(
        vit,
        features(3, 16, 16),
        {"ff": "1:8", "q": "1:4", "v": "2:8"},
        {
            f"blocks.{i}.{name}": rows
            for i in range(2)
            for name, rows in {
                "mlp.fc1.weight": ((0, 96, 1, 8),),
                "mlp.fc2.weight": ((0, 24, 1, 8),),
                "attn.qkv.weight": ((0, 24, 1, 4), (48, 72, 2, 8)),
            }.items()
        },
        {f"blocks.{i}.attn.qkv.weight": "sparse+dense" for i in range(2)},
    ),
    "beit": Host(beit, features(3, 16, 16), {"qkv": "1:4"}, {"blocks.0.attn.qkv.weight": ((0, 72, 1, 4),)}),
    "gpt2": Host(
        gpt2,
        tokens,
        {"ff": "1:8", "k": "1:4", "transformer.wte.weight": "1:4"},
        {
            "transformer.wte.weight": ((0, 32, 1, 4),),
            **{
                f"transformer.h.{i}.{name}": rows
                for i in range(2)
                for name, rows in {
                    "attn.c_attn.weight": ((16, 32, 1, 4),),
                    "mlp.c_fc.weight": ((0, 64, 1, 8),),
                    "mlp.c_proj.weight": ((0, 16, 1, 8),),
                }.items()
            },
        },
        {
            "transformer.wte.weight": "storage only and sparse",
            **{f"transformer.h.{i}.attn.c_attn.weight": "dense+sparse" for i in range(2)},
        },
        logits,
        input_gradient=False,
    ),
    "t5": Host(
        t5,
        tokens,
        {"ff": "1:8", "re:.*EncDecAttention.o": "1:4"},
        {
            **{f"{side}.block.{i}.layer.{n}.DenseReluDense.wi.weight": ((0, 32, 1, 8),)
               for side, n in (("encoder", 1), ("decoder", 2)) for i in range(2)},
            **{f"{side}.block.{i}.layer.{n}.DenseReluDense.wo.weight": ((0, 16, 1, 8),)
               for side, n in (("encoder", 1), ("decoder", 2)) for i in range(2)},
            **{f"decoder.block.{i}.layer.1.EncDecAttention.o.weight": ((0, 16, 1, 4),) for i in range(2)},
        },
        forward=seq2seq,
        input_gradient=False,
    ),
    "bert": Host(
        bert,
        tokens,
        {"ff": "1:16", "q": "1:4"},
        {
            f"bert.encoder.layer.{i}.{name}": rows
            for i in range(2)
            for name, rows in {
                "intermediate.dense.weight": ((0, 32, 1, 16),),
                "output.dense.weight": ((0, 16, 1, 16),),
                "attention.self.query.weight": ((0, 16, 1, 4),),
            }.items()
        },
        forward=logits,
        input_gradient=False,
    ),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------- by hand
def rows_of(name: str, weight: Tensor) -> Tensor:
    """A view of the weight with one output a row and its inputs in order."""
    if weight.dim() == 4:
        return weight.permute(0, 2, 3, 1)
    return weight.T if "c_attn" in name or "c_fc" in name or "c_proj" in name else weight


def pruned(host: Host, seed: int = 0) -> nn.Module:
    """The model with every block but its N largest weights set to zero, block by block."""
    torch.manual_seed(seed)
    model = host.make()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            elif "norm" not in name:
                parameter.normal_(std=0.1)
        for name, slices in host.sparse.items():
            rows = rows_of(name, model.get_parameter(name))
            for first, last, n, m in slices:
                for row in rows[first:last]:
                    flat = row.reshape(-1).clone()
                    for start in range(0, len(flat), m):
                        block = flat[start : start + m]
                        order = sorted(range(len(block)), key=lambda k: -abs(float(block[k])))
                        block[order[n:]] = 0.0
                    row.copy_(flat.reshape(row.shape))
    return model.eval()


@pytest.fixture(params=HOSTS)
def host(request: pytest.FixtureRequest) -> Host:
    return HOSTS[request.param]


def same_state(a: nn.Module, b: nn.Module) -> None:
    mine, theirs = a.state_dict(), b.state_dict()
    assert list(mine) == list(theirs)
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name


def classes(model: nn.Module) -> list[type[nn.Module]]:
    return [type(module) for module in model.modules()]


# ---------------------------------------------------------------------------------------------- the table
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_output_and_gradient_are_those_of_the_pruned_model(host: Host, training: bool) -> None:
    model = pruned(host).train(training)
    compressed = compress(model, host.targets).train(training)
    x = host.draw()
    if not host.input_gradient:
        torch.testing.assert_close(host.forward(compressed, x), host.forward(model, x), rtol=1e-4, atol=1e-5)
        return
    gradients = []
    for subject in (model, compressed):
        leaf = x.clone().requires_grad_()
        y = host.forward(subject, leaf)
        (y * torch.arange(y.numel()).reshape(y.shape).cos()).sum().backward()
        gradients.append((y.detach(), leaf.grad))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        found, expected = host.forward(compressed.eval(), x), host.forward(model.eval(), x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_given_model_is_untouched_and_comes_back(host: Host) -> None:
    model = pruned(host)
    twin, before = copy.deepcopy(model), classes(model)
    compressed = compress(model, host.targets)
    assert classes(model) == before
    same_state(model, twin)
    mine = {t.data_ptr() for t in (*model.parameters(), *model.buffers()) if t.numel()}
    assert not mine & {t.data_ptr() for t in (*compressed.parameters(), *compressed.buffers()) if t.numel()}
    restored = decompress(compressed)
    assert classes(restored) == before
    same_state(restored, model)
    assert [n for n, _ in restored.named_parameters()] == [n for n, _ in model.named_parameters()]  # ties too
    assert [(p.requires_grad, type(p)) for p in restored.parameters()] == [
        (p.requires_grad, type(p)) for p in model.parameters()
    ]
    x = host.draw()
    with torch.no_grad():
        assert torch.equal(host.forward(restored, x), host.forward(model, x))
    assert verify(restored).ok


def test_what_is_stored_and_what_the_report_says(host: Host) -> None:
    model = pruned(host)
    compressed = compress(model, host.targets)
    stored = {m.stored.name for m in compressed.modules() if isinstance(m, PackedWeight)}
    assert stored == set(host.sparse)
    assert not stored & {name for name, _ in compressed.named_parameters(remove_duplicate=False)}
    report = compression_report(compressed)
    chosen = select("linear", dtype=torch.float32, shape=(16, 16), n=1, m=4, tokens=1, device="cpu").name
    assert {layer.name: layer.kernel for layer in report.layers} == {
        name: "+".join(dict.fromkeys(host.kernels.get(name, "sparse").replace("sparse", chosen).split("+")))
        for name in host.sparse
    }
    for layer in report.layers:
        height, axis = rows_of(layer.name, model.get_parameter(layer.name)).flatten(1).shape
        after = height * axis * 4
        for first, last, n, m in host.sparse[layer.name]:  # 4 bytes a weight; 5 a kept one; every M here divides
            after -= (last - first) * (axis * 4 - axis // m * n * 5)
        assert (layer.bytes_before, layer.bytes_after) == (height * axis * 4, after)
    total = sum({id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}.values())
    assert report.bytes_before == total
    assert report.bytes_after < total
    assert verify(compressed).ok


def test_files_bring_back_every_bit(host: Host, tmp_path: Path) -> None:
    model = pruned(host)
    compressed = compress(model, host.targets)
    path = tmp_path / "c.safetensors"
    save_compressed(compressed, path)
    into = pruned(host, seed=1)
    assert load_compressed(path, into) is into
    assert classes(into) == classes(compressed)
    same_state(decompress(into), model)
    x = host.draw()
    with torch.no_grad():
        assert torch.equal(host.forward(into, x), host.forward(compressed, x))
    assert verify(path).ok
    assert len(verify(path).layers) == sum(len(slices) for slices in host.sparse.values())
    save_model(decompress(compressed), tmp_path / "model.safetensors")
    compress_file(tmp_path, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_broken_blocks_are_named_before_anything_is_copied(host: Host) -> None:
    model = pruned(host)
    name, slices = next(iter(host.sparse.items()))
    first, _, _, m = slices[0]
    with torch.no_grad():
        row = rows_of(name, model.get_parameter(name))[first + 1]
        row.copy_(torch.ones(row.shape))
    with pytest.raises(ValueError, match=rf"{name}.* is not .*: row {first + 1}, block 0: {m} non-zeros"):
        compress(model, host.targets)


def test_copies_and_dtypes(host: Host) -> None:
    model = pruned(host)
    compressed = copy.deepcopy(compress(model, host.targets)).bfloat16()
    x = host.draw()
    x = x.bfloat16() if x.is_floating_point() else x
    with torch.no_grad():
        found, expected = host.forward(compressed, x), host.forward(copy.deepcopy(model).bfloat16(), x)
    assert found.dtype is torch.bfloat16
    torch.testing.assert_close(found.float(), expected.float(), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", ["encoder", "convnet", "vit", "gpt2"])
def test_compiles_to_one_graph(name: str) -> None:
    host = HOSTS[name]
    compressed = compress(pruned(host), host.targets)
    x = host.draw()
    with torch.no_grad():
        compiled = torch.compile(lambda x: host.forward(compressed, x), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), host.forward(compressed, x), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


# ---------------------------------------------------------------------------------------------- ways in
def test_what_finalize_recorded() -> None:
    torch.manual_seed(0)
    model = encoder()
    sparsifier = Sparsifier(model, {"ff": "1:8", "qk": "1:4"}, "ste", total_steps=2)
    with pytest.raises(ValueError, match=r"carries a sparsifier; call its finalize\(\) first"):
        compress(model)
    for _ in range(2):
        sparsifier.step()
    sparsifier.finalize()
    compressed = compress(model)
    patterns = {layer.name: layer.pattern for layer in compression_report(compressed).layers}
    assert patterns["layers.0.linear1.weight"] == "1:8"
    assert patterns["layers.0.self_attn.in_proj_weight"] == "1:4+dense"
    with pytest.raises(ValueError, match="is compressed already"):
        compress(compressed)


@pytest.mark.parametrize("pattern", ["1:4", "2:8", "3:8", "1:6", "1:16", "5:32", "5:96", "1:128"])
def test_the_tightest_pattern_is_found(pattern: str) -> None:
    """Nothing recorded, nothing asked: every block of the found pattern is full somewhere, and no tighter one fits."""
    n, m = map(int, pattern.split(":"))
    torch.manual_seed(0)
    layer = nn.Linear(384, 4)
    with torch.no_grad():
        for row in layer.weight:
            for start in range(0, 384, m):
                row[start : start + m][torch.randperm(m)[n:]] = 0.0
    best = None
    for other in (d for d in range(2, 257) if 384 % d == 0):
        full = max(
            int((row[start : start + other] != 0).sum()) for row in layer.weight for start in range(0, 384, other)
        )
        if best is None or full * best[1] < best[0] * other:
            best = (full, other)
    assert best is not None
    found = compression_report(compress(layer)).layers[0].pattern
    assert found == f"{best[0]}:{best[1]}"
    assert best[0] * m <= n * best[1]


def test_what_would_not_be_smaller_stays_dense() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8), nn.Embedding(8, 8))
    with torch.no_grad():
        model[0].weight[:, ::8] = 0.0  # 7:8: 7·5 bytes in place of 8·4
        model[1].weight[:, 1::2] = 0.0
        model[2].weight[:, 1:] = 0.0  # nobody asked for the embedding
    compressed = compress(model)
    assert [type(module) for module in compressed] == [nn.Linear, NMLinear, nn.Embedding]
    assert compression_report(compressed).layers[0].pattern == "1:2"
    half = copy.deepcopy(model).half()  # 1:2 of two bytes and one for the offset: still smaller
    assert type(compress(half)[1]) is NMLinear
    assert compression_report(compress(nn.Linear(16, 8))).layers == ()


def test_slices_of_a_fused_projection_are_found() -> None:
    host = HOSTS["vit"]
    report = compression_report(compress(pruned(host)))
    assert {layer.name: layer.pattern for layer in report.layers}["blocks.0.attn.qkv.weight"] == "1:4+dense+2:8"


@pytest.mark.parametrize("targets", [None, {"0": "1:2"}], ids=str)
def test_nan_and_inf_are_refused_by_name(targets: dict[str, str] | None) -> None:
    model = mlp()
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
        model[0].weight[1, 0] = float("inf")
    with pytest.raises(ValueError, match=r"0.weight: 2 of its 512 weights are NaN or inf"):
        compress(model, targets)


def test_the_axis_need_not_be_divided() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(10, 4)
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[:, [0, 7, 9]] = 1.0  # blocks of 4, 4 and 2
    compressed = compress(layer, {"weight": "1:4"})
    x = torch.randn(3, 10)
    torch.testing.assert_close(compressed(x), layer(x))
    assert compressed.weight_nm[0].values.shape == (4, 3)


# ---------------------------------------------------------------------------------------------- what lives around it
def test_ties_are_stored_once() -> None:
    host = HOSTS["gpt2"]
    compressed = compress(pruned(host), host.targets)
    packed = compressed.transformer.wte.weight_nm
    assert compressed.lm_head.weight_nm is packed
    assert type(compressed.lm_head) is NMLinear
    assert torch.equal(compressed.lm_head.weight, compressed.transformer.wte.weight)
    moved = copy.deepcopy(compressed).double()
    assert moved.lm_head.weight_nm is moved.transformer.wte.weight_nm
    assert moved.lm_head.weight.dtype is torch.float64
    restored = decompress(compressed)
    assert restored.lm_head.weight is restored.transformer.wte.weight


def test_t5_unpacks_nothing_to_look_at_a_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    host = HOSTS["t5"]
    compressed = compress(pruned(host), host.targets)
    unpacked: list[str] = []
    original = PackedWeight.unpack
    monkeypatch.setattr(PackedWeight, "unpack", lambda self: (unpacked.append(self.stored.name), original(self))[1])
    with torch.no_grad():
        host.forward(compressed, host.draw())
    assert unpacked == []


def test_the_encoder_calls_its_runtime_layers_in_eval() -> None:
    host = HOSTS["encoder"]
    model = pruned(host)
    compressed = compress(model, host.targets)
    called: list[str] = []
    for name, module in compressed.named_modules():
        if isinstance(module, NMLinear):
            module.register_forward_hook(lambda m, i, o, name=name: called.append(name))
    x, padding = host.draw(), torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = True
    with torch.no_grad():
        found = compressed(x, src_key_padding_mask=padding)
        expected = model(x, src_key_padding_mask=padding)
    assert called == [f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]
    torch.testing.assert_close(found[~padding], expected[~padding], rtol=1e-4, atol=1e-5)
    assert [layer.activation_relu_or_gelu for layer in compressed.layers] == [0, 0]
    restored = decompress(compressed)
    assert [layer.activation_relu_or_gelu for layer in restored.layers] == [1, 1]
    assert restored.use_nested_tensor is model.use_nested_tensor is True
    assert [layer.activation_relu_or_gelu for layer in model.layers] == [1, 1]


def test_one_compressed_layer_of_an_encoder_is_enough() -> None:
    """The layers before it must not hand it nested tensors, which only the fused path understands."""
    model = pruned(HOSTS["encoder"])
    compressed = compress(model, {"layers.1.linear1": "1:8"})
    x, padding = torch.randn(3, 5, 16), torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = True
    with torch.no_grad():
        found = compressed(x, src_key_padding_mask=padding)
        expected = model(x, src_key_padding_mask=padding)
    torch.testing.assert_close(found[~padding], expected[~padding], rtol=1e-4, atol=1e-5)


def test_hooks_and_attributes_stay() -> None:
    model = mlp()
    with torch.no_grad():
        model[0].weight[:, 1:] = 0.0
    model[0].note = "kept"
    calls: list[int] = []
    model[0].register_forward_hook(lambda *args: calls.append(1))
    compressed = compress(model, {"0": "1:16"})
    compressed(torch.randn(2, 16))
    assert (compressed[0].note, len(calls)) == ("kept", 1)
    assert (compressed[0].in_features, compressed[0].out_features) == (16, 32)
    assert not compressed.eval()[0].training


def test_gpt2_layers_have_the_attributes_of_both_kinds() -> None:
    host = HOSTS["gpt2"]
    model = pruned(host)
    before = dict(model.transformer.h[0].mlp.c_fc.__dict__)
    layer = compress(model, host.targets).transformer.h[0].mlp.c_fc
    assert type(layer) is NMLinear
    assert (layer.nx, layer.nf, layer.in_features, layer.out_features) == (16, 64, 16, 64)
    assert layer.weight.shape == (16, 64)
    restored = decompress(compress(model, host.targets)).transformer.h[0].mlp.c_fc
    assert restored.__dict__.keys() == before.keys()


def test_convolutions_keep_their_attributes() -> None:
    host = HOSTS["convnet"]
    layer = compress(pruned(host), host.targets)[3]
    assert type(layer) is NMConv2d
    assert (layer.in_channels, layer.out_channels, layer.groups, layer.kernel_size) == (8, 8, 2, (3, 3))
