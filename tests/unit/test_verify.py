"""`verify` against a count over Python numbers: what it must find, in models and in files, and what it must refuse."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nmflow import Sparsifier
from nmflow.pattern import Pattern
from nmflow.runtime import compress, compress_file, save_compressed, save_model, verify
from nmflow.targets import Slot, record, slots_to_json


def crowded(rows: list[list[float]], n: int, m: int) -> list[tuple[int, int, int]]:
    """(row, block, non-zeros) of every block with more than n of them, counted one entry at a time."""
    found = []
    for r, row in enumerate(rows):
        for block, start in enumerate(range(0, len(row), m)):
            count = 0
            for value in row[start : start + m]:
                if value != 0.0:  # NaN too
                    count += 1
            if count > n:
                found.append((r, block, count))
    return found


def with_pattern(shape: tuple[int, int], n: int, m: int, seed: int = 0) -> Tensor:
    """Random rows that keep n of every m, places drawn one block at a time."""
    rng = random.Random(seed)
    weight = torch.zeros(shape)
    for r in range(shape[0]):
        for start in range(0, shape[1], m):
            block = range(start, min(start + m, shape[1]))
            for k in rng.sample(block, min(n, len(block))):
                weight[r, k] = rng.uniform(0.5, 1.5) * rng.choice([-1, 1])
    return weight


def mlp() -> nn.Sequential:
    """Two layers, 1:4 and 2:8, noted as `finalize` notes them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12), nn.GELU(), nn.Linear(12, 8))
    with torch.no_grad():
        model[0].weight.copy_(with_pattern((12, 16), 1, 4))
        model[2].weight.copy_(with_pattern((8, 12), 2, 6))
    slots = [
        Slot("0.weight", "rows", (12, 16), Pattern(1, 4), rule="0"),
        Slot("2.weight", "rows", (8, 12), Pattern(2, 6), rule="2"),
    ]
    record(model, slots)
    return model


# ---------------------------------------------------------------------------------------------- models
def test_a_sound_model() -> None:
    report = verify(mlp())
    assert report.ok is True
    assert [(layer.label, layer.pattern, layer.blocks, layer.broken) for layer in report.layers] == [
        ("0.weight", "1:4", 48, 0),
        ("2.weight", "2:6", 16, 0),
    ]
    assert report.lines() == ["verified: 2 of 2 layers are N:M"]
    assert str(report) == "verified: 2 of 2 layers are N:M"


def test_one_extra_non_zero_is_named() -> None:
    model = mlp()
    row = model[0].weight[7]
    with torch.no_grad():
        zero = int((row[8:12] == 0).nonzero()[0])
        row[8 + zero] = 0.5
    report = verify(model)
    assert report.ok is False
    assert report.lines() == [
        "0.weight: not 1:4 in 1 of 48 blocks: row 7, block 2: 2 non-zeros, 1 allowed",
        "not verified: 1 of 2 layers break their pattern",
    ]
    [broken] = report.layers[0].first
    assert (broken.row, broken.block, broken.nonzeros) == (7, 2, 2)
    data = json.loads(json.dumps(report.to_dict()))
    assert data["ok"] is False
    assert data["layers"][0]["broken"] == 1
    assert data["layers"][0]["first"][0]["row"] == 7
    assert data["layers"][1]["first"] == []


def test_enough_zeros_in_the_wrong_blocks() -> None:
    model = mlp()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].weight[:, :4] = 1.0  # density 1/4 exactly, as 1:4 has
    report = verify(model)
    assert report.layers[0].broken == 12
    assert "row 0, block 0: 4 non-zeros, 1 allowed" in report.lines()[0]
    assert report.lines()[0].endswith("and 9 more blocks")


@pytest.mark.parametrize("tiny", [1e-30, 1e-45, -1e-30])
def test_nearly_zero_is_not_zero(tiny: float) -> None:
    model = mlp()
    with torch.no_grad():
        model[2].weight[model[2].weight == 0] = tiny
    assert verify(model).layers[1].broken == 16
    with torch.no_grad():
        model[2].weight[model[2].weight == tiny] = -0.0
    assert verify(model).ok


@settings(deadline=None)
@given(
    shape=st.tuples(st.integers(1, 6), st.integers(1, 30)),
    nm=st.integers(1, 12).flatmap(lambda m: st.tuples(st.integers(1, m), st.just(m))),
    density=st.floats(0.0, 1.0),
    seed=st.integers(0, 9999),
)
def test_every_block_is_counted(shape: tuple[int, int], nm: tuple[int, int], density: float, seed: int) -> None:
    rng = random.Random(seed)
    height, width = shape
    rows = [[rng.choice([1.0, -2.0]) if rng.random() < density else 0.0 for _ in range(width)] for _ in range(height)]
    layer = nn.Linear(shape[1], shape[0])
    layer.weight = nn.Parameter(torch.tensor(rows))
    record(layer, [Slot("weight", "rows", shape, Pattern(*nm))])
    expected = crowded(rows, *nm)
    [check] = verify(layer).layers
    assert check.broken == len(expected)
    assert [(b.row, b.block, b.nonzeros) for b in check.first] == expected[:3]
    assert check.blocks == shape[0] * math.ceil(shape[1] / nm[1])


def test_other_layouts() -> None:
    conv = nn.Conv2d(4, 2, 3)
    record(conv, [Slot("weight", "conv", (2, 4, 3, 3), Pattern(1, 4))])
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[1, 0] = 1.0  # one input channel: one non-zero a block
        assert verify(conv).ok
        conv.weight[1, 3, 2, 0] = 1.0
    [check] = verify(conv).layers
    assert check.blocks == 18
    assert [(b.row, b.block) for b in check.first] == [(1, 6)]
    stacked = nn.Module()
    stacked.experts = nn.Parameter(torch.zeros(2, 3, 8))
    record(stacked, [Slot("experts", "rows", (2, 3, 8), Pattern(1, 4))])
    with torch.no_grad():
        stacked.experts[1, 2, 4:6] = 1.0
    assert [(b.row, b.block) for b in verify(stacked).layers[0].first] == [(5, 1)]


def test_rows_of_a_slice_count_from_the_top_of_the_weight() -> None:
    layer = nn.Linear(8, 12)
    record(layer, [Slot("weight", "rows", (12, 8), Pattern(1, 4), (4, 8))])
    with torch.no_grad():
        layer.weight[4:8] = 0.0
        layer.weight[6, 5:7] = 1.0
    [check] = verify(layer).layers
    assert (check.label, check.blocks) == ("weight[4:8]", 8)
    assert [(b.row, b.block) for b in check.first] == [(6, 1)]


def test_given_targets_count_instead_of_recorded_ones() -> None:
    model = mlp()
    assert verify(model, {"0": "2:4"}).ok
    assert [layer.label for layer in verify(model, {"0": "2:4"}).layers] == ["0.weight"]
    assert not verify(model, {"0": "1:8"}).ok
    assert verify(model, {"2.weight": "2:5"}).layers[0].blocks == 24  # 5 + 5 + 2
    with pytest.raises(ValueError, match="matches nothing"):
        verify(model, {"3": "1:4"})


def test_the_forward_of_a_live_sparsifier_is_checked_not_its_dense_weights() -> None:
    model = nn.Sequential(nn.Linear(16, 12))
    sparsifier = Sparsifier(model, {"0": "1:4"}, "ste", total_steps=3)
    assert not (model[0]._parameters["weight"] == 0).any()
    assert verify(model, {"0": "1:4"}).ok
    assert not verify(model, {"0": "1:8"}).ok
    with pytest.raises(ValueError, match="says nothing of patterns"):
        verify(model)
    for _ in range(3):
        sparsifier.step()
    assert str(sparsifier.finalize()).splitlines()[-1].startswith("finalized: density 0.")
    assert verify(model).ok


def test_a_compressed_model() -> None:
    compressed = compress(mlp())
    assert verify(compressed).lines() == ["verified: 2 of 2 layers are N:M"]
    assert verify(compressed, {"0": "2:8"}).ok == (not crowded(mlp()[0].weight.tolist(), 2, 8))
    assert not verify(compressed, {"0": "1:16"}).ok


def test_a_model_that_cannot_be_verified() -> None:
    with pytest.raises(ValueError, match="the model says nothing of patterns; give targets"):
        verify(nn.Linear(4, 4))
    model = nn.Linear(4, 4)
    record(model, [])
    with pytest.raises(ValueError, match="says nothing of patterns"):
        verify(model)
    model = mlp()
    with torch.no_grad():
        model[0].weight[3, 3] = math.nan
        model[2].weight[0, 0] = math.inf
    with pytest.raises(ValueError, match=r"(?s)0.weight: 1 of its 192 weights.*2.weight: 1 of its 96 weights"):
        verify(model)
    model = mlp()
    record(model, [Slot("0.weight", "rows", (12, 17), Pattern(1, 4)), Slot("9.weight", "rows", (1, 4), Pattern(1, 4))])
    message = r"(?s)0.weight: shape \(12, 16\), its slot says \(12, 17\).*9.weight: missing"
    with pytest.raises(ValueError, match=message):
        verify(model)


# ---------------------------------------------------------------------------------------------- dense files
def stripped(source: Path, destination: Path, **change: Tensor) -> Path:
    """The tensors of a file without its metadata."""
    save_file({**load_file(source), **change}, destination)
    return destination


def test_a_dense_file_and_its_folder(tmp_path: Path) -> None:
    model = mlp()
    save_model(model, tmp_path / "model.safetensors")
    for path in (tmp_path / "model.safetensors", str(tmp_path / "model.safetensors"), tmp_path):
        assert verify(path).lines() == ["verified: 2 of 2 layers are N:M"]
    with torch.no_grad():
        model[2].weight[5, 6:] = 1.0
    save_model(model, tmp_path / "model.safetensors")
    assert verify(tmp_path).lines() == [
        "2.weight: not 2:6 in 1 of 16 blocks: row 5, block 1: 6 non-zeros, 2 allowed",
        "not verified: 1 of 2 layers break their pattern",
    ]
    assert verify(tmp_path, {"0": "1:4"}).ok


def test_a_foreign_file_needs_targets(tmp_path: Path) -> None:
    save_model(mlp(), tmp_path / "ours.safetensors")
    foreign = stripped(tmp_path / "ours.safetensors", tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="says nothing of patterns"):
        verify(foreign)
    assert verify(foreign, {"0.weight": "1:4"}).ok
    assert verify(foreign, {"re:2.*": "2:6"}).ok
    assert not verify(foreign, {"re:2.*": "1:6"}).ok
    with pytest.raises(ValueError, match="matches nothing"):
        verify(foreign, {"1.weight": "1:4"})
    torch.manual_seed(0)
    by_role = {"blocks.0.mlp.fc1.weight": with_pattern((8, 16), 1, 16), "head.weight": torch.randn(4, 16)}
    save_file(by_role, tmp_path / "roles.safetensors")
    assert [layer.label for layer in verify(tmp_path / "roles.safetensors", {"ff": "1:16"}).layers] == [
        "blocks.0.mlp.fc1.weight"
    ]


def test_targets_beside_a_file_that_lost_its_metadata(tmp_path: Path) -> None:
    model = mlp()
    save_model(model, tmp_path / "ours.safetensors")
    stripped(tmp_path / "ours.safetensors", tmp_path / "model.safetensors")
    beside = tmp_path / "targets.json"
    beside.write_text(json.dumps(slots_to_json([Slot("0.weight", "rows", (12, 16), Pattern(1, 4))])))
    assert [layer.label for layer in verify(tmp_path).layers] == ["0.weight"]
    assert [layer.label for layer in verify(tmp_path / "ours.safetensors").layers] == ["0.weight", "2.weight"]
    no_pattern = '[{"name": "0.weight", "shape": [12, 16], "layout": "rows"}]'
    for text in ("{", "{}", '[{"name": "0.weight"}]', no_pattern, "[" * 99_999):
        beside.write_text(text)
        with pytest.raises(ValueError, match=r"targets.json"):
            verify(tmp_path)


def test_a_dense_file_that_cannot_be_verified(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_model(mlp(), path)
    bad = mlp()[0].weight.detach().clone()
    bad[1, 1] = math.nan
    nan = stripped(path, tmp_path / "nan.safetensors", **{"0.weight": bad})
    with pytest.raises(ValueError, match=r"0.weight: 1 of its 192 weights are NaN or inf"):
        verify(nan, {"0": "1:4"})
    slots = [Slot("0.weight", "rows", (12, 16), Pattern(1, 4)), Slot("gone.weight", "rows", (4, 4), Pattern(1, 4))]
    other = mlp()
    record(other, slots)
    save_model(other, path)
    with pytest.raises(ValueError, match=r"gone.weight: missing"):
        verify(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        verify(tmp_path / "nothing.safetensors")
    with pytest.raises(FileNotFoundError, match=r"model.safetensors"):
        verify(tmp_path)
    (tmp_path / "a run").mkdir()
    (tmp_path / "a run" / "config.yaml").touch()
    with pytest.raises(FileNotFoundError, match=r"model.safetensors: no such file; .* train resume='.*/a run'$"):
        verify(tmp_path / "a run")
    (tmp_path / "a run" / "runs").mkdir()
    with pytest.raises(FileNotFoundError, match=r"a comparison has its models in .*/a run/runs"):
        verify(tmp_path / "a run")
    with pytest.raises(TypeError):
        verify(42)


# ---------------------------------------------------------------------------------------------- compressed files
@pytest.fixture
def packed(tmp_path: Path) -> Path:
    path = tmp_path / "packed.safetensors"
    save_compressed(mlp(), path)
    return path


def edited(path: Path, change: dict[str, Tensor | None], metadata: dict[str, Any] | None = None) -> Path:
    """The file with some tensors replaced (None: left out), and entries of our metadata."""
    with safe_open(path, "pt") as file:
        kept = dict(file.metadata())
    kept["nmflow"] = json.dumps({**json.loads(kept["nmflow"]), **(metadata or {})})
    tensors = {name: tensor for name, tensor in {**load_file(path), **change}.items() if tensor is not None}
    save_file(tensors, path, kept)
    return path


def test_a_compressed_file(packed: Path) -> None:
    assert verify(packed).lines() == ["verified: 2 of 2 layers are N:M"]
    assert [layer.blocks for layer in verify(packed).layers] == [48, 16]


@pytest.mark.parametrize(
    ("where", "offset", "reason"),
    [
        ((5, 2), 4, "row 5, block 2: offsets [4] of a block of 4"),
        ((5, 2), 255, "row 5, block 2: offsets [255] of a block of 4"),
    ],
)
def test_offsets_outside_their_block(packed: Path, where: tuple[int, int], offset: int, reason: str) -> None:
    offsets = load_file(packed)["0.weight.offsets"]
    offsets[where] = offset
    report = verify(edited(packed, {"0.weight.offsets": offsets}))
    assert not report.ok
    assert report.layers[0].broken == 1
    assert reason in report.lines()[0]


@pytest.mark.parametrize("swap", [True, False])
def test_offsets_that_do_not_rise(packed: Path, swap: bool) -> None:
    offsets = load_file(packed)["2.weight.offsets"]
    first, second = offsets[3, 2:4].tolist()
    offsets[3, 2:4] = torch.tensor([second, first] if swap else [first, first], dtype=torch.uint8)
    report = verify(edited(packed, {"2.weight.offsets": offsets}))
    [broken] = report.layers[1].first
    assert (report.ok, report.layers[1].broken, broken.row, broken.block, broken.nonzeros) == (False, 1, 3, 1, 2)
    assert "must rise" in report.lines()[0]


def test_every_offset_of_a_tail_is_checked(tmp_path: Path) -> None:
    layer = nn.Linear(6, 2)
    with torch.no_grad():
        layer.weight.copy_(with_pattern((2, 6), 1, 4))
    path = tmp_path / "tail.safetensors"
    save_compressed(compress(layer, {"weight": "1:4"}), path)
    assert verify(path).ok
    for offset, sound in [(0, True), (1, True), (2, False), (3, False)]:
        offsets = load_file(path)["weight.offsets"]
        offsets[1, 1] = offset
        assert verify(edited(path, {"weight.offsets": offsets})).ok is sound, offset


@pytest.mark.parametrize(
    ("change", "metadata", "message"),
    [
        ({"0.weight.values": torch.zeros(12, 3)}, {}, r"0.weight.values: torch.float32 of shape \(12, 3\)"),
        ({"0.weight.offsets": torch.zeros(11, 4, dtype=torch.uint8)}, {}, "0.weight.offsets: .*its slot asks for"),
        ({"0.weight.offsets": torch.zeros(12, 4, dtype=torch.int8)}, {}, "0.weight.offsets: torch.int8"),
        ({"2.weight.values": None}, {}, "2.weight.values: missing"),
        ({}, {"dtypes": {"0.weight": "bfloat16", "2.weight": "float32"}}, "asks for torch.bfloat16"),
        ({}, {"dtypes": {"0.weight": "abs", "2.weight": "float32"}}, "0.weight: the metadata names no floating dtype"),
        ({}, {"dtypes": {"0.weight": "float32", "2.weight": "int8"}}, "2.weight: the metadata names no floating dtype"),
        ({}, {"dtypes": {}}, "no floating dtype"),
        ({}, {"slots": []}, "says nothing of patterns"),
        ({}, {"slots": 3}, "slots: expected a list"),
        ({"0.weight.values": torch.full((12, 4), math.nan)}, {}, "0.weight: 48 of its 48 weights are NaN"),
        ({"2.weight.values": torch.full((8, 4), math.inf)}, {}, "2.weight: 32 of its 32 weights are NaN or inf"),
    ],
)
def test_an_inconsistent_file_is_no_answer(
    packed: Path, change: dict[str, Tensor | None], metadata: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        verify(edited(packed, change, metadata))


@settings(deadline=None, max_examples=40)
@given(
    stored=st.sampled_from([(1, 4), (2, 6), (3, 8), (1, 16)]),
    nm=st.integers(2, 20).flatmap(lambda m: st.tuples(st.integers(1, m - 1), st.just(m))),
    seed=st.integers(0, 99),
)
def test_another_pattern_asked_of_a_compressed_file(
    tmp_path_factory: pytest.TempPathFactory, stored: tuple[int, int], nm: tuple[int, int], seed: int
) -> None:
    """Counted from values and offsets, without unpacking: the same blocks as in the dense weight."""
    layer = nn.Linear(20, 6)
    with torch.no_grad():
        layer.weight.copy_(with_pattern((6, 20), *stored, seed=seed))
    record(layer, [Slot("weight", "rows", (6, 20), Pattern(*stored), rows=(0, 4))])
    with torch.no_grad():
        layer.weight[:4][torch.rand(4, 20) > 0.7] = 0.0  # stored as fillers, which do not count
        layer.weight[4:] = torch.randn(2, 20) * (torch.rand(2, 20) > 0.7)
    path = tmp_path_factory.mktemp("asked") / "c.safetensors"
    save_compressed(layer, path)
    expected = crowded(layer.weight.tolist(), *nm)
    [check] = verify(path, {"weight": Pattern(*nm)}).layers
    assert (check.blocks, check.broken) == (6 * math.ceil(20 / nm[1]), len(expected))
    assert [(b.row, b.block, b.nonzeros) for b in check.first] == expected[:3]


def test_broken_offsets_are_not_hidden_by_other_targets(packed: Path) -> None:
    offsets = load_file(packed)["0.weight.offsets"]
    offsets[5, 2] = 9
    report = verify(edited(packed, {"0.weight.offsets": offsets}), {"2": "2:6"})
    assert not report.ok
    assert [layer.label for layer in report.layers] == ["0.weight", "2.weight"]


def test_a_dense_weight_of_a_compressed_file(tmp_path: Path) -> None:
    model = mlp()
    record(model, [Slot("0.weight", "rows", (12, 16), Pattern(1, 4))])
    save_compressed(model, tmp_path / "c.safetensors")
    assert verify(tmp_path / "c.safetensors", {"2.weight": "2:6", "0": "1:4"}).ok
    assert not verify(tmp_path / "c.safetensors", {"2.weight": "1:6"}).ok


def test_compressing_a_file_keeps_the_answer(tmp_path: Path) -> None:
    save_model(mlp(), tmp_path / "model.safetensors")
    compress_file(tmp_path, tmp_path / "c.safetensors")
    assert verify(tmp_path / "c.safetensors").lines() == verify(tmp_path).lines()
