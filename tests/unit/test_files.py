"""Model files: every bit comes back, a wrong file changes nothing, a failed write leaves the old one."""

from __future__ import annotations

import copy
import errno
import json
import os
import pickle
import random
import stat
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nmflow import Sparsifier
from nmflow.ops import select
from nmflow.pattern import Pattern
from nmflow.runtime import (
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
from nmflow.targets import Slot, record, recorded


class Net(nn.Module):
    """A convolution with batch statistics, a fused projection, tied weights, an integer buffer, an unsaved buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.qkv = nn.Linear(6, 18)
        self.embed = nn.Embedding(10, 18)
        self.head = nn.Linear(18, 10)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.tensor(7))
        self.register_buffer("scratch", torch.ones(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.norm(self.conv(x)).mean((2, 3))
        return self.head(self.qkv(pooled) + self.embed(torch.arange(len(x))))


def keep(rows: Tensor, n: int, m: int, seed: int) -> Tensor:
    """Zero all but n random entries of every block of m, block by block."""
    rng = random.Random(seed)
    kept = torch.zeros_like(rows)
    for r in range(rows.shape[0]):
        for start in range(0, rows.shape[1], m):
            block = range(start, min(start + m, rows.shape[1]))
            for k in rng.sample(block, min(n, len(block))):
                kept[r, k] = rows[r, k]
    return kept


def net(seed: int = 0, dtype: torch.dtype = torch.float32) -> Net:
    """A network whose weights are N:M, with the slots noted as `finalize` notes them."""
    torch.manual_seed(seed)
    model = Net()
    model.norm.running_mean.normal_()
    model.norm.num_batches_tracked.fill_(11)
    with torch.no_grad():
        flat = model.conv.weight.permute(0, 2, 3, 1).reshape(6, 36)
        model.conv.weight.copy_(keep(flat, 1, 4, seed).reshape(6, 3, 3, 4).permute(0, 3, 1, 2))
        model.qkv.weight[0:6] = keep(model.qkv.weight[0:6], 1, 6, seed)
        model.qkv.weight[12:18] = keep(model.qkv.weight[12:18], 1, 4, seed)  # blocks of 4 and 2
        model.embed.weight.copy_(keep(model.embed.weight, 1, 6, seed))
    model = model.to(dtype).eval()
    record(
        model,
        [
            Slot("conv.weight", "conv", (6, 4, 3, 3), Pattern(1, 4), rule="conv"),
            Slot("qkv.weight", "rows", (18, 6), Pattern(1, 6), (0, 6), rule="q"),
            Slot("qkv.weight", "rows", (18, 6), Pattern(1, 4), (12, 18), rule="v"),
            Slot("embed.weight", "rows", (10, 18), Pattern(1, 6), rule="embed.weight"),
        ],
    )
    return model


def bits(model: nn.Module) -> dict[str, bytes]:
    return {name: t.contiguous().view(torch.uint8).numpy().tobytes() if t.dim() else bytes(str(t), "ascii")
            for name, t in model.state_dict().items()}  # fmt: skip


def metadata(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        content: dict[str, Any] = json.loads(file.metadata()["nmflow"])
    return content


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    path = tmp_path / "net.safetensors"
    save_compressed(net(), path)
    return path


# ---------------------------------------------------------------------------------------------- round trips
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_every_bit_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    model = net(dtype=dtype)
    path = tmp_path / "net.safetensors"
    save_compressed(compress(model), path)
    into = net(seed=1, dtype=dtype)
    loaded = load_compressed(path, into)
    assert loaded is into
    assert type(into.qkv) is NMLinear
    assert recorded(into) == recorded(model)
    restored = decompress(into)
    assert list(restored.state_dict()) == list(model.state_dict())
    assert bits(restored) == bits(model)
    assert restored.head.weight is restored.embed.weight
    assert into.head.weight_nm is into.embed.weight_nm
    x = torch.randn(3, 4, 5, 5, dtype=dtype)
    tolerance = 1e-5 if dtype in (torch.float32, torch.float64) else 5e-2
    torch.testing.assert_close(into(x), model(x), rtol=tolerance, atol=tolerance)


def test_what_the_file_holds(packed: Path) -> None:
    content = metadata(packed)
    assert content["format"] == "nmflow-compressed"
    assert content["format_version"] == 1
    assert content["convention"] == "N of every M consecutive weights are kept"
    assert content["dtypes"] == dict.fromkeys(("conv.weight", "qkv.weight", "embed.weight"), "float32")
    assert content["aliases"] == {"head.weight": "embed.weight"}
    assert [(slot["name"], slot["rows"], slot["pattern"], slot["rule"]) for slot in content["slots"]] == [
        ("conv.weight", None, "1:4", "conv"),
        ("qkv.weight", [0, 6], "1:6", "q"),
        ("qkv.weight", [12, 18], "1:4", "v"),
        ("embed.weight", None, "1:6", "embed.weight"),
    ]
    tensors = load_file(packed)
    model = net()
    assert tensors["qkv.weight[0:6].values"].shape == (6, 1)
    assert tensors["qkv.weight[12:18].offsets"].dtype is torch.uint8
    assert torch.equal(tensors["qkv.weight[6:12]"], model.qkv.weight[6:12])
    assert tensors["conv.weight.values"].shape == (6, 9)
    assert set(tensors) == {
        "conv.weight.values", "conv.weight.offsets", "conv.bias", "embed.weight.values", "embed.weight.offsets",
        "head.bias", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked",
        "qkv.weight[0:6].values", "qkv.weight[0:6].offsets", "qkv.weight[6:12]", "qkv.weight[12:18].values",
        "qkv.weight[12:18].offsets", "qkv.bias", "steps",
    }  # fmt: skip


def test_a_dense_file_is_an_ordinary_one(tmp_path: Path) -> None:
    model = net()
    path = tmp_path / "dense.safetensors"
    save_model(model, path)
    content = metadata(path)
    assert (content["format"], content["format_version"]) == ("nmflow-dense", 1)
    tensors = load_file(path)
    assert set(tensors) == set(model.state_dict()) - {"head.weight"}
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in tensors.items())
    fresh = net(seed=3)
    assert fresh.load_state_dict(tensors, strict=False).missing_keys == ["head.weight"]
    assert bits(fresh) == bits(model)


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    model = net()
    save_compressed(model, tmp_path / "a")
    save_compressed(decompress(compress(model)), tmp_path / "b")
    save_compressed(load_compressed(tmp_path / "a", net(seed=1)), tmp_path / "c")
    save_model(model, tmp_path / "model.safetensors")
    compress_file(tmp_path, tmp_path / "d")
    files = [(tmp_path / name).read_bytes() for name in "abcd"]
    assert files[0] == files[1] == files[2] == files[3]


def test_a_compressed_model_inside_another(tmp_path: Path) -> None:
    """Names in the file are those of the model that is saved, not of the one that was compressed."""
    outer = nn.Sequential(nn.Identity(), compress(net()))
    save_compressed(outer, tmp_path / "outer")
    dense = nn.Sequential(nn.Identity(), net(seed=1))
    load_compressed(tmp_path / "outer", dense)
    assert bits(decompress(dense[1])) == bits(net())
    assert metadata(tmp_path / "outer")["aliases"] == {"1.head.weight": "1.embed.weight"}


def test_a_bare_linear(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 4)
    with torch.no_grad():
        layer.weight.copy_(keep(layer.weight, 1, 4, 0))
    save_compressed(layer, tmp_path / "layer")  # nobody noted a pattern: the tightest one is found
    assert metadata(tmp_path / "layer")["slots"][0]["pattern"] == "1:4"
    loaded = load_compressed(tmp_path / "layer", nn.Linear(8, 4))
    assert type(loaded) is NMLinear
    assert torch.equal(loaded.weight, layer.weight)


def test_views_of_one_storage_are_stored_apart(tmp_path: Path) -> None:
    model = nn.Module()
    flat = torch.arange(12.0)
    model.register_buffer("head", flat[:6].view(2, 3))
    model.register_buffer("tail", flat[4:].view(2, 4))
    save_model(model, tmp_path / "m")
    assert torch.equal(load_file(tmp_path / "m")["tail"], flat[4:].view(2, 4))


def test_the_loaded_model_does_not_lean_on_the_file(packed: Path) -> None:
    model = load_compressed(packed, net(seed=1))
    packed.write_bytes(bytes(packed.stat().st_size))
    assert bits(decompress(model)) == bits(net())


# ---------------------------------------------------------------------------------------------- compress_file
def test_compressing_a_file(tmp_path: Path) -> None:
    save_model(net(), tmp_path / "model.safetensors")
    report = compress_file(tmp_path / "model.safetensors", tmp_path / "out.safetensors")
    assert report.bytes_before == (tmp_path / "model.safetensors").stat().st_size
    assert report.bytes_after == (tmp_path / "out.safetensors").stat().st_size
    assert [(layer.name, layer.pattern) for layer in report.layers] == [
        ("conv.weight", "1:4"),
        ("qkv.weight", "1:6+dense+1:4"),
        ("embed.weight", "1:6"),
    ]
    assert report.layers[0].bytes_before == 6 * 36 * 4
    assert report.layers[0].bytes_after == 6 * 9 * 5
    assert report.lines()[-1].startswith("compressed 3 weights: ")
    assert str(report).splitlines() == report.lines()
    assert json.loads(json.dumps(report.to_dict()))["bytes_after"] == report.bytes_after


def test_compressing_a_foreign_file(tmp_path: Path) -> None:
    """Without metadata: given rules, else what is found in the weights."""
    torch.manual_seed(0)
    tensors = {
        "blocks.0.mlp.fc1.weight": keep(torch.randn(8, 32), 1, 16, 0),
        "blocks.0.attn.qkv.weight": torch.cat([keep(torch.randn(8, 16), 2, 8, 1), torch.randn(16, 16)]),
        "blocks.0.mlp.fc1.bias": torch.zeros(8),
        "ids": torch.arange(64).reshape(4, 16),
    }
    source = tmp_path / "foreign.safetensors"
    save_file(tensors, source)
    found = compress_file(source, tmp_path / "a")
    assert [(layer.name, layer.pattern) for layer in found.layers] == [
        ("blocks.0.attn.qkv.weight", "2:8+dense"),
        ("blocks.0.mlp.fc1.weight", "1:16"),
    ]
    assert torch.equal(load_file(tmp_path / "a")["ids"], tensors["ids"])
    asked = compress_file(source, tmp_path / "b", {"ff": "2:32", "q": "4:16"})
    assert [(layer.name, layer.pattern) for layer in asked.layers] == [
        ("blocks.0.attn.qkv.weight", "4:16+dense"),
        ("blocks.0.mlp.fc1.weight", "2:32"),
    ]
    with pytest.raises(ValueError, match="cannot be compressed:") as caught:
        compress_file(source, tmp_path / "c", {"ff": "1:32", "k": "1:16"})
    assert "blocks.0.mlp.fc1.weight is not 1:32: row 0, block 0: 2 non-zeros, 1 allowed" in str(caught.value)
    assert "blocks.0.attn.qkv.weight[8:16] is not 1:16: row 8, block 0: 16 non-zeros, 1 allowed" in str(caught.value)
    assert not (tmp_path / "c").exists()
    with pytest.raises(ValueError, match="compressed already"):
        compress_file(tmp_path / "a", tmp_path / "c")
    save_file({**tensors, "blocks.0.mlp.fc1.weight": torch.full((8, 32), torch.nan)}, source)
    for targets in (None, {"ff": "1:16"}):
        with pytest.raises(ValueError, match=r"fc1.weight: 256 of its 256 weights are NaN"):
            compress_file(source, tmp_path / "c", targets)


def test_integers_are_not_compressed(tmp_path: Path) -> None:
    model = net()
    record(model, [Slot("steps", "rows", (), Pattern(1, 4)), Slot("gone", "rows", (3, 4), Pattern(1, 4))])
    save_model(model, tmp_path / "m")
    with pytest.raises(ValueError, match=r"(?s)steps: a weight of dtype torch.int64.*gone: there is no such weight"):
        compress_file(tmp_path / "m", tmp_path / "c")


# ---------------------------------------------------------------------------------------------- refusals
def spoil(change: Callable[[Net], object]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = net(seed=1)
        change(model)
        return model

    return make


def rename(model: Net) -> None:
    model.wqkv = model.qkv
    del model.qkv


def untie(model: Net) -> None:
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())


def columns(model: Net) -> None:
    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nf = 6
            self.weight = nn.Parameter(torch.zeros(18, 6))
            self.bias = nn.Parameter(torch.zeros(18))

    model.qkv = Conv1D()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (spoil(rename), r"(?s)wqkv.weight: in the model, not in the file \(near: qkv.weight\).*"
                        r"qkv.weight: in the file, not in the model \(near: wqkv.weight\)"),
        (spoil(lambda m: m.norm.register_buffer("extra", torch.ones(2))), "norm.extra: in the model, not in the file"),
        (spoil(lambda m: delattr(m, "steps")), "steps: in the file, not in the model"),
        (spoil(lambda m: setattr(m, "qkv", nn.Linear(7, 18))), r"qkv.weight: shape \(18, 7\) in the model, \(18, 6\)"),
        (spoil(lambda m: setattr(m, "norm", nn.BatchNorm2d(5))), r"norm.weight: shape \(5,\) in the model, \(6,\)"),
        (spoil(lambda m: m.half()), "conv.weight: torch.float16 in the model, torch.float32"),
        (spoil(lambda m: m.norm.bfloat16()), "norm.bias: torch.bfloat16 in the model, torch.float32"),
        (spoil(untie), "head.weight: a tensor of its own in the model, tied to embed.weight in the file"),
        (spoil(columns), "qkv.weight: columns in the model, rows in the file"),
        (spoil(lambda m: m.to("meta")), "conv.weight: the model holds no memory"),
        (lambda: compress(net()), "load_compressed: the model is compressed already"),
        (spoil(lambda m: Sparsifier(m, {"head": "1:2"}, "ste", total_steps=2)), r"finalize\(\) first"),
    ],
)  # fmt: skip
def test_a_model_that_the_file_does_not_fit(packed: Path, make: Callable[[], nn.Module], message: str) -> None:
    into = make()
    classes = [type(module) for module in into.modules()]
    keys = list(into.state_dict())
    before = {} if next(into.parameters()).is_meta else bits(into)
    with pytest.raises(ValueError, match=message):
        load_compressed(packed, into)
    assert [type(module) for module in into.modules()] == classes
    assert list(into.state_dict()) == keys
    if before:
        assert bits(into) == before


def test_a_model_that_ties_what_the_file_holds_twice(tmp_path: Path) -> None:
    model = net()
    untie(model)
    save_compressed(model, tmp_path / "untied")
    message = "head.weight: tied to embed.weight in the model, a tensor of its own in the file"
    with pytest.raises(ValueError, match=message):
        load_compressed(tmp_path / "untied", net(seed=1))


class Buffered(nn.Module):
    def __init__(self, **buffers: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor)


def buffered(**buffers: Tensor) -> nn.Module:
    model = Buffered(**buffers)
    model.linear.weight.data = torch.eye(4, 8)
    return model


def test_entries_that_share_memory_are_refused_before_anything_is_changed(tmp_path: Path) -> None:
    save_compressed(buffered(a=torch.ones(2), many=torch.ones(4)), tmp_path / "m")
    into = buffered(a=torch.zeros(2), many=torch.zeros(1).expand(4))
    before = bits(into)
    with pytest.raises(ValueError, match=r"many: entries share memory in the model.*clone\(\)"):
        load_compressed(tmp_path / "m", into)
    assert bits(into) == before
    assert type(into.linear) is nn.Linear


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_buffers_of_rarer_dtypes_come_back(tmp_path: Path, dtype: torch.dtype) -> None:
    held = torch.tensor([[1.0, -2.0], [0.5, 448.0]]).to(dtype)
    save_compressed(buffered(held=held), tmp_path / "m")
    into = load_compressed(tmp_path / "m", buffered(held=torch.zeros(2, 2).to(dtype)))
    assert torch.equal(into.held.view(torch.uint8), held.view(torch.uint8))
    save_file({"weight": torch.eye(4, 8), "held": held}, tmp_path / "foreign")
    compress_file(tmp_path / "foreign", tmp_path / "small")
    with safe_open(tmp_path / "small", "pt") as file:
        assert torch.equal(file.get_tensor("held").view(torch.uint8), held.view(torch.uint8))


def test_what_would_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    model = buffered()
    model.linear.weight.data *= 1e7
    compressed = compress(model).half()
    with pytest.raises(ValueError, match=r"not saved.*\ninner\.linear\.weight: 4 of its .* NaN or inf"):
        save_compressed(nn.ModuleDict({"inner": compressed}), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_tensors_only(tmp_path: Path) -> None:
    class Stateful(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"steps": 3}

        def set_extra_state(self, state: object) -> None: ...

    for save in (save_model, save_compressed):
        with pytest.raises(ValueError, match=r"more than tensors.*_extra_state"):
            save(Stateful(4, 4), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_only_ordinary_models_are_saved_dense(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="save_model: the model is compressed already"):
        save_model(compress(net()), tmp_path / "m")
    model = nn.Linear(8, 8)
    Sparsifier(model, {"weight": "1:4"}, "ste", total_steps=2)
    for save in (save_model, save_compressed):
        with pytest.raises(ValueError, match=r"finalize\(\) first"):
            save(model, tmp_path / "m")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file"),
        (b"hello, world, this is no safetensors file at all", "not a safetensors file"),
        (b"\xff" * 100, "not a safetensors file"),
        (struct.pack("<Q", 2**62) + b"{}", "cut short or inconsistent"),
        (struct.pack("<Q", 2) + b"{}", "no nmflow metadata|without nmflow metadata|says nothing of patterns"),
        (struct.pack("<Q", 2) + b"{}garbage", "cut short or inconsistent"),
        (struct.pack("<Q", 9) + b'{"a":[]}}', "cut short or inconsistent"),
    ],
)
def test_foreign_bytes(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    into = net()
    for use in (lambda: load_compressed(path, into), lambda: verify(path), lambda: verify(tmp_path)):
        with pytest.raises(ValueError, match=message) as caught:
            use()
        assert str(path) in str(caught.value)


class Bomb:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return exec, ("raise SystemExit('pickled code was run')",)


@pytest.mark.parametrize("legacy", [False, True])
def test_pickled_files_are_never_opened(tmp_path: Path, legacy: bool) -> None:
    path = tmp_path / "model.pt"
    torch.save({"weight": Bomb()}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(SystemExit):
        torch.load(path, weights_only=False)
    for use in (load_compressed, lambda p, _: verify(p), lambda p, _: compress_file(p, tmp_path / "c")):
        with pytest.raises(ValueError, match=r"pickled code and is not opened|a pickle file; it may hold code"):
            use(path, net())
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="a pickle file"):
        verify(path)


def test_a_file_cut_short_anywhere(packed: Path) -> None:
    whole = packed.read_bytes()
    into = net(seed=1)
    before = bits(into)
    points = {0, 1, 7, 8, 9, len(whole) - 1, *random.Random(0).sample(range(len(whole)), 60)}
    for point in sorted(points):
        packed.write_bytes(whole[:point])
        for use in (lambda: load_compressed(packed, into), lambda: verify(packed)):
            with pytest.raises(ValueError, match=r"cut short|empty file|not a safetensors"):
                use()
    packed.write_bytes(whole + b"x")
    with pytest.raises(ValueError, match="cut short or inconsistent"):
        load_compressed(packed, into)
    assert bits(into) == before
    packed.write_bytes(whole)
    load_compressed(packed, into)


def test_a_flipped_byte_is_noticed_or_harmless(packed: Path) -> None:
    """A header byte may be anything; no flip may crash, and a load that succeeds gives a sound model."""
    whole = packed.read_bytes()
    header = struct.unpack("<Q", whole[:8])[0]
    rng = random.Random(1)
    outcomes = {"refused": 0, "loaded": 0}
    for _ in range(150):
        place = rng.randrange(8 + header)
        packed.write_bytes(whole[:place] + bytes([rng.randrange(256)]) + whole[place + 1 :])
        try:
            model = load_compressed(packed, net(seed=1))
        except ValueError:
            outcomes["refused"] += 1
        else:
            outcomes["loaded"] += 1
            assert verify(model).ok
    assert outcomes["refused"] > 100


def edited(path: Path, change: dict[str, Tensor], **entries: Any) -> Path:
    content = {**metadata(path), **entries}
    save_file({**load_file(path), **change}, path, {"nmflow": json.dumps(content)})
    return path


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"format_version": 3}, "format_version 3; this nmflow reads 1 and 2"),
        ({"format_version": 2}, "format_version 2, its patterns are those of 1"),
        ({"format_version": True}, "format_version True"),
        ({"format_version": None}, "format_version None"),
        ({"format": "nmflow-quantized"}, "'nmflow-quantized'; this nmflow reads nmflow-compressed and nmflow-dense"),
        ({"format": ["nmflow-dense"]}, "this nmflow reads"),
        ({"format": "nmflow-dense"}, "a dense model, not a compressed model"),
        ({"convention": "N of every M consecutive weights are zero"}, "its convention is"),
        ({"aliases": []}, "aliases are not an object"),
        ({"dtypes": {"conv.weight": 32}}, "dtypes are not an object"),
        ({"aliases": {}}, "head.weight: tied to embed.weight in the model, a tensor of its own in the file"),
        ({"aliases": {"head.weight": "embed.weight", "x": "embed.weight"}}, "x: .* tied to embed.weight in the file"),
        ({"slots": {}}, "slots: expected a list"),
        ({"slots": [{"name": "conv.weight", "shape": [6, 4, 3, 3], "layout": "conv"}]}, "pattern"),
        ({"slots": [{"name": "a", "shape": [2, 2, 2], "layout": "columns", "pattern": "1:4"}]}, "layout columns"),
        ({"slots": [{"name": "a", "shape": [9, 9], "layout": "rows", "pattern": "16:1"}]}, "1 <= N <= M"),
    ],
)
def test_metadata_that_says_something_else(packed: Path, entries: dict[str, Any], message: str) -> None:
    into = net(seed=1)
    with pytest.raises(ValueError, match=message):
        load_compressed(edited(packed, {}, **entries), into)
    assert type(into.qkv) is nn.Linear


@pytest.mark.parametrize("text", ["", "{", "3", '"x"', "[" * 100_000, "1" * 5000])
def test_metadata_that_is_no_object(packed: Path, text: str) -> None:
    save_file(load_file(packed), packed, {"nmflow": text})
    with pytest.raises(ValueError, match=r"net\.safetensors: its metadata"):
        load_compressed(packed, net(seed=1))


def slots_changed(packed: Path, index: int, **change: Any) -> list[dict[str, Any]]:
    slots: list[dict[str, Any]] = metadata(packed)["slots"]
    slots[index].update(change)
    return slots


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, {"pattern": "2:8"}, "conv.weight.values: torch.float32 of shape"),
        (0, {"pattern": "1:3"}, "conv.weight.values"),
        (0, {"shape": [6, 4, 3, 4]}, "conv.weight.values"),
        (0, {"layout": "rows"}, r"conv.weight.values: .* its slot asks for torch.float32 of shape \(72, 1\)"),
        (1, {"rows": [0, 7]}, r"qkv.weight\[0:7\].values: missing"),
        (1, {"rows": [0, 19]}, "lie outside"),
        (1, {"rows": [10, 18]}, r"(?s)qkv.weight\[12:18\]: its rows are part of another slot"),
        (1, {"shape": [18, 7]}, "disagree about its shape"),
        (3, {"pattern": "1:70000"}, "65536"),
        (3, {"shape": [10**12, 10**12]}, "embed.weight.values"),
        (3, {"shape": [10**30, 18]}, "embed.weight.values"),
        (3, {"name": "embed.wait"}, "embed.wait"),
    ],
)
def test_slots_that_do_not_go_with_the_tensors(packed: Path, index: int, change: dict[str, Any], message: str) -> None:
    into = net(seed=1)
    with pytest.raises(ValueError, match=message):
        load_compressed(edited(packed, {}, slots=slots_changed(packed, index, **change)), into)
    assert type(into.qkv) is nn.Linear


def test_a_hostile_header_takes_no_memory(tmp_path: Path) -> None:
    """A shape of a petabyte, in the header and in the slots: refused by arithmetic."""
    path = tmp_path / "model.safetensors"
    size = 2**50
    header = {
        "weight.values": {"dtype": "F32", "shape": [2**24, 2**24], "data_offsets": [0, size]},
        "__metadata__": {"nmflow": "{}"},
    }
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 64)
    for targets in (None, {"weight": "1:4"}):
        with pytest.raises(ValueError, match="cut short or inconsistent"):
            verify(path, targets)
    with pytest.raises(ValueError, match="cut short or inconsistent"):
        load_compressed(path, nn.Linear(4, 4))
    # Consistent sizes, and a pattern that would unpack 1 MiB to 64 GiB.
    values = torch.ones(1, 2**18)
    content = {
        "format": "nmflow-compressed", "format_version": 1, "aliases": {}, "dtypes": {"weight": "float32"},
        "convention": "N of every M consecutive weights are kept",
        "slots": [{"name": "weight", "shape": [1, 2**34], "layout": "rows", "pattern": "1:65536", "rows": None}],
    }  # fmt: skip
    offsets = torch.zeros(1, 2**18, dtype=torch.uint16)
    save_file({"weight.values": values, "weight.offsets": offsets}, path, {"nmflow": json.dumps(content)})
    assert verify(path).ok
    assert verify(path, {"weight": "1:32768"}).ok
    assert not verify(path, {"weight": "1:131072"}).ok
    with pytest.raises(ValueError, match=r"weight: shape \(4, 4\) in the model, \(1, 17179869184\) in the file"):
        load_compressed(path, nn.Linear(4, 4, bias=False))


@pytest.mark.parametrize(
    ("name", "where", "value", "message"),
    [
        ("conv.weight.offsets", (3, 5), 4, r"conv.weight: row 3, block 5: offsets \[4\] of a block of 4"),
        ("qkv.weight[12:18].offsets", (2, 1), 2, r"qkv.weight\[12:18\]: row 14, block 1: offsets \[2\]"),
        ("embed.weight.values", (1, 2), torch.nan, "embed.weight: 1 of its 30 weights are NaN"),
        ("qkv.weight[6:12]", (0, 0), torch.inf, r"qkv.weight\[6:12\]: 1 of its 36 weights are NaN or inf"),
    ],
)
def test_damaged_contents(packed: Path, name: str, where: tuple[int, int], value: float, message: str) -> None:
    into = net(seed=1)
    before = bits(into)
    spoilt = load_file(packed)[name]
    spoilt[where] = value
    with pytest.raises(ValueError, match=message):
        load_compressed(edited(packed, {name: spoilt}), into)
    assert type(into.qkv) is nn.Linear
    assert bits(into) == before


def test_swapped_offsets_are_refused(tmp_path: Path) -> None:
    layer = nn.Linear(8, 2)
    with torch.no_grad():
        layer.weight.copy_(keep(layer.weight, 2, 4, 0))
    save_compressed(compress(layer, {"weight": "2:4"}), tmp_path / "l")
    offsets = load_file(tmp_path / "l")["weight.offsets"]
    with pytest.raises(ValueError, match=r"row 0, block 0: .*must rise"):
        load_compressed(edited(tmp_path / "l", {"weight.offsets": offsets[:, [1, 0, 2, 3]]}), nn.Linear(8, 2))


# ---------------------------------------------------------------------------------------------- writing
SAVES: dict[str, Callable[[Path], object]] = {
    "save_compressed": lambda path: save_compressed(net(), path),
    "save_model": lambda path: save_model(net(), path),
    "compress_file": lambda path: compress_file(path.with_name("source.safetensors"), path),
}


@pytest.fixture(params=SAVES)
def save(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Path], object]:
    save_model(net(), tmp_path / "source.safetensors")
    return SAVES[request.param]


def test_a_failing_write_leaves_the_old_file(
    save: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "net.safetensors"
    save(path)
    good = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            save(path)
    assert path.read_bytes() == good
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.safetensors", "source.safetensors"]
    save(path)
    assert verify(path).ok


def test_the_file_is_on_the_disk_before_it_takes_the_name(
    save: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    sync, replace = os.fsync, os.replace

    def noted_sync(descriptor: int) -> None:
        events.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        sync(descriptor)

    def noted_replace(source: str, destination: str) -> None:
        events.append("replace")
        assert Path(source).parent == Path(destination).parent
        replace(source, destination)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "replace", noted_replace)
    save(tmp_path / "net.safetensors")
    assert events == ["file", "replace", "folder"]


@pytest.mark.skipif(sys.platform == "win32", reason="no file size limit there")
def test_a_full_disk(tmp_path: Path) -> None:
    """A real limit on the size of files, in a process of its own."""
    path = tmp_path / "net.safetensors"
    save_model(nn.Linear(8, 8), path)
    before = path.read_bytes()
    code = f"""
import resource, signal, torch
from nmflow.runtime import save_model
model = torch.nn.Linear(500, 500)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save_model(model, {str(path)!r})
except OSError as error:
    print("OSError", error)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.startswith("OSError")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_where_a_file_cannot_go(save: Callable[[Path], object], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        save(tmp_path / "nowhere" / "net.safetensors")
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(IsADirectoryError, match="name a file in it"):
        save(folder)
    assert list(folder.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="no umask there")
def test_the_file_has_the_permissions_of_any_other(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"")
    save_model(nn.Linear(2, 2), tmp_path / "m")
    assert stat.S_IMODE((tmp_path / "m").stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)


def test_compress_file_replaces_its_own_output_and_nothing_else(tmp_path: Path) -> None:
    source, dense, text = (tmp_path / name for name in ("model.safetensors", "other.safetensors", "notes.txt"))
    save_model(net(), source)
    save_model(net(), dense)
    text.write_text("mine")
    (tmp_path / "link").symlink_to(source)
    before = {path: path.read_bytes() for path in (source, dense, text)}
    for given in (source, tmp_path):
        for same in (source, tmp_path / "link"):
            with pytest.raises(FileExistsError, match="is read; name another file for the compressed one"):
                compress_file(given, same)
    for path in (dense, text):
        with pytest.raises(FileExistsError, match=f"{path.name}: exists and is no compressed file of nmflow"):
            compress_file(source, path)
    assert {path: path.read_bytes() for path in before} == before
    out = tmp_path / "out.safetensors"
    compress_file(source, out)
    compress_file(source, out)
    assert bits(decompress(load_compressed(out, net(seed=1)))) == bits(net())


def test_a_file_without_sparse_weights_is_not_compressed(tmp_path: Path) -> None:
    save_model(nn.Linear(8, 8), tmp_path / "m")
    for targets in (None, {"weight": None}):
        with pytest.raises(ValueError, match=r"m: no weight in it is N:M, .* nmflow train"):
            compress_file(tmp_path / "m", tmp_path / "out", targets)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------- the report
def test_the_report_of_a_model() -> None:
    model = net()
    dense = sum({id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}.values())
    report = compression_report(compress(model))
    assert report.bytes_before == dense
    assert report.bytes_after < dense
    chosen = select("linear", device="cpu", dtype=torch.float32, shape=(16, 16), n=1, m=4, tokens=1).name
    assert {layer.name: layer.kernel for layer in report.layers} == {
        "conv.weight": "dense",
        "qkv.weight": "dense" if chosen == "dense" else f"{chosen}+dense",
        "embed.weight": f"storage only and {chosen}",
    }
    assert compression_report(model).layers == ()
    assert compression_report(model).bytes_after == dense
    assert compression_report(copy.deepcopy(compress(model))) == report
