"""Compressed weights whose V rows share their columns: form, layers, files, verdicts; against loops and dense products.

Weights are filled place by place, so no mask of nmflow decides what they hold.
"""

from __future__ import annotations

import copy
import io
import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nmflow import ops
from nmflow.layout import to_rows
from nmflow.ops import native, reference
from nmflow.pattern import Pattern
from nmflow.runtime import (
    CompressedNM,
    NMConv2d,
    NMLinear,
    compress,
    decompress,
    for_inference,
    load_compressed,
    save_compressed,
    save_model,
    verify,
)
from nmflow.targets import Slot, record

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LAYOUTS: list[tuple[tuple[int, ...], str]] = [
    ((7, 24), "rows"), ((1, 7), "rows"), ((2, 3, 10), "rows"), ((9,), "rows"), ((24, 5), "columns"),
    ((5, 4, 3, 3), "conv"), ((6, 5, 1, 2), "conv"),
]  # fmt: skip


# ---------------------------------------------------------------------------------------------- oracle
def shared_rows(num_rows: int, axis: int, pattern: Pattern, seed: int) -> list[list[float]]:
    """Rows of this pattern; some groups use fewer than N columns of a block, zeros of both signs in used columns."""
    rng = random.Random(seed)
    rows = [[0.0] * axis for _ in range(num_rows)]
    for top in range(0, num_rows, pattern.v):
        for start in range(0, axis, pattern.m):
            block = range(start, min(start + pattern.m, axis))
            for k in rng.sample(block, rng.randint(0, min(pattern.n, len(block)))):
                for row in rows[top : top + pattern.v]:
                    row[k] = rng.choice([1.0, -2.5, 0.125, 3.0, -0.0, 0.0])
    return rows


def weight_of(shape: tuple[int, ...], layout: Any, pattern: Pattern, dtype: torch.dtype, seed: int) -> Tensor:
    places = torch.arange(math.prod(shape)).reshape(shape)
    order = to_rows(places, layout)
    weight = torch.zeros(math.prod(shape), dtype=torch.float64)
    weight[order.reshape(-1)] = torch.tensor(shared_rows(*order.shape, pattern, seed), dtype=torch.float64).reshape(-1)
    return weight.reshape(shape).to(dtype)


def crowded(rows: list[list[float]], pattern: Pattern) -> list[tuple[int, int, int]]:
    """(first row, block, non-zero columns) of the blocks that have too many."""
    found = []
    for top in range(0, len(rows), pattern.v):
        for block, start in enumerate(range(0, len(rows[0]), pattern.m)):
            columns = zip(*(row[start : start + pattern.m] for row in rows[top : top + pattern.v]), strict=True)
            used = sum(any(value != 0 for value in column) for column in columns)
            if used > pattern.n:
                found.append((top, block, used))
    return found


some_pattern = st.integers(2, 12).flatmap(
    lambda m: st.builds(Pattern, st.integers(1, m - 1), st.just(m), st.integers(1, 9))
)


# ---------------------------------------------------------------------------------------------- the form
def test_golden_forms() -> None:
    rows = torch.tensor([[0.0, 5, 0, 0, 7, 0], [0, 6, 0, 0, 0, 0], [1, 0, 0, 0, 0, 2]])
    packed = CompressedNM.pack(rows, "1:4v2")
    assert packed.values.tolist() == [[5, 7], [6, 0], [1, 2]]
    assert packed.offsets.tolist() == [[1, 0], [0, 1]]
    assert packed.nbytes == 6 * 4 + 4
    filled = CompressedNM.pack(rows[:2], "2:4v2")                  # the lowest column that no row uses
    assert filled.values.tolist() == [[0, 5, 7, 0], [0, 6, 0, 0]]
    assert filled.offsets.tolist() == [[0, 1, 0, 1]]


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(LAYOUTS), some_pattern, st.sampled_from(DTYPES), st.integers(0, 9999))
def test_pack_and_unpack_are_inverse(
    place: tuple[tuple[int, ...], Any], pattern: Pattern, dtype: torch.dtype, seed: int
) -> None:
    shape, layout = place
    weight = weight_of(shape, layout, pattern, dtype, seed)
    packed = CompressedNM.pack(weight, pattern, layout)
    assert packed.check() == []
    assert torch.equal(packed.unpack(), weight)
    rows = to_rows(weight, layout)
    num_rows, stored = rows.shape[0], pattern.kept(rows.shape[1])
    assert packed.values.shape == (num_rows, stored)
    assert packed.offsets.shape == (math.ceil(num_rows / pattern.v), stored)
    for r in range(num_rows):                                      # the form itself, entry by entry
        found = [0.0] * rows.shape[1]
        for s in range(stored):
            found[s // pattern.n * pattern.m + int(packed.offsets[r // pattern.v, s])] = float(packed.values[r, s])
        assert found == rows[r].tolist()
    other = CompressedNM.pack(torch.where(weight == 0, -0.0, weight), pattern, layout)
    assert torch.equal(other.offsets, packed.offsets)              # equal weights have equal forms
    assert other.values.tolist() == packed.values.tolist()


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 3), st.sampled_from(DTYPES), st.integers(0, 9999))
def test_v_of_one_is_the_plain_form(n: int, dtype: torch.dtype, seed: int) -> None:
    weight = weight_of((5, 18), "rows", Pattern(n, 4), dtype, seed)
    plain, one = CompressedNM.pack(weight, f"{n}:4"), CompressedNM.pack(weight, f"{n}:4v1")
    assert torch.equal(plain.values, one.values)
    assert torch.equal(plain.offsets, one.offsets)


def test_blocks_longer_than_a_byte() -> None:
    pattern = Pattern(2, 300, 3)
    weight = weight_of((7, 700), "rows", pattern, torch.float32, 0)
    packed = CompressedNM.pack(weight, pattern)
    assert packed.offsets.dtype == torch.uint16
    assert torch.equal(packed.unpack(), weight)


def test_pack_refuses_what_is_not_shared() -> None:
    rows = torch.zeros(5, 8)
    rows[2, 0] = rows[3, 1] = 1.0                                  # 1:4 in each row
    assert CompressedNM.pack(rows, "1:4").check() == []
    with pytest.raises(ValueError, match=r"not 1:4v2: rows 2-3, block 0: 2 non-zero columns, 1 allowed$"):
        CompressedNM.pack(rows, "1:4v2")
    rows[3, 1] = 0.0
    rows[4, 4] = rows[4, 5] = math.nan
    with pytest.raises(ValueError, match=r"row 4, block 1: 2 non-zero columns, 1 allowed$"):  # the group of one row
        CompressedNM.pack(rows, "1:4v2")


GOOD = CompressedNM.pack(torch.tensor([1.0, 0, 0, 2, 3, 0, 0, 4]).repeat(6, 1), "2:4v4")
FALLING = torch.tensor([[0, 3, 0, 3], [0, 3, 3, 0]], dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": GOOD.values[:5]}, r"values have shape \(5, 4\); .* at 2:4v4 has \(6, 4\)"),
        ({"offsets": GOOD.offsets[:1]}, r"offsets have shape \(1, 4\); .* has \(2, 4\)"),
        ({"offsets": GOOD.offsets.repeat_interleave(3, 0)}, r"offsets have shape \(6, 4\)"),
        ({"offsets": GOOD.offsets + 1}, r"rows 0-3, block 0: offsets \[1, 4\] of a block of 4; .*and 1 more block"),
        ({"offsets": FALLING}, r"^rows 4-5, block 1: offsets \[3, 0\]"),
    ],
)
def test_check_says_what_is_inconsistent(change: dict[str, Any], message: str) -> None:
    assert GOOD.check() == []
    [problem] = replace(GOOD, **change).check()
    with pytest.raises(ValueError, match=message):
        raise ValueError(problem)


# ---------------------------------------------------------------------------------------------- products
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "text"), [((12, 24), "1:8v4"), ((10, 26), "3:7v4"), ((5, 16), "2:4v64"), ((9, 300), "1:300v2")]
)
def test_every_kernel_multiplies_as_the_dense_weight(shape: tuple[int, int], text: str, dtype: torch.dtype) -> None:
    pattern = Pattern.parse(text)
    weight = weight_of(shape, "rows", pattern, dtype, 3)
    packed = CompressedNM.pack(weight, pattern)
    n, m, v = pattern.n, pattern.m, pattern.v
    bias = torch.randn(shape[0]).to(dtype)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 0.05)
    asked = 0
    for lead in [(), (0,), (1,), (3, 7), (40,)]:
        x = torch.randn(*lead, shape[1]).to(dtype)
        expected = torch.einsum("...k,rk->...r", x.double(), weight.double()) + bias.double()
        results = [
            ops.linear(x, packed.values, packed.offsets, shape, n, m, bias, None, v),
            reference.linear(x, packed.values, packed.offsets, shape, n, m, bias, v),
        ]
        for kernel in ops.kernels():
            if kernel.task == "linear" and kernel.why_not(device="cpu", dtype=dtype, n=n, m=m, v=v) is None:
                results.append(kernel.run(x, packed.values, packed.offsets, shape, n, m, bias, None, v))
        for y in results:
            assert y.dtype == dtype
            torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
        asked += len(results)
    assert asked >= 15


@pytest.mark.skipif(native.why_not() is not None, reason=f"no native product: {native.why_not()}")
def test_the_native_product_keeps_the_shared_offsets_and_checks_them() -> None:
    pattern = Pattern(1, 8, 4)
    packed = CompressedNM.pack(weight_of((12, 24), "rows", pattern, torch.float32, 1), pattern)
    ready = native.prepare(packed.values, packed.offsets, 12, 24, 1, 8, v=4)
    x = torch.randn(5, 24)
    torch.testing.assert_close(native.linear(x, ready), F.linear(x, packed.unpack()))
    assert ready.offsets is packed.offsets
    with pytest.raises(ValueError, match=r"offsets have shape \(2, 3\), \[12, 24\] at 1:8v4 has \(3, 3\)"):
        native.prepare(packed.values, packed.offsets[:2], 12, 24, 1, 8, v=4)
    with pytest.raises(ValueError, match="an offset lies outside its block"):
        native.prepare(packed.values, packed.offsets + 8, 12, 24, 1, 8, v=4)


# ---------------------------------------------------------------------------------------------- layers
def linear(text: str, out: int = 12, in_: int = 16, seed: int = 0) -> nn.Linear:
    pattern = Pattern.parse(text)
    layer = nn.Linear(in_, out)
    with torch.no_grad():
        layer.weight.copy_(weight_of((out, in_), "rows", pattern, torch.float32, seed) * 0.3)
    record(layer, [Slot("weight", "rows", (out, in_), pattern)])
    return layer


def fused(text: str, height: int) -> nn.Linear:
    """Three slices, each with groups of its own."""
    pattern, shape = Pattern.parse(text), (3 * height, 16)
    layer = nn.Linear(16, 3 * height)
    with torch.no_grad():
        for i in range(3):
            rows = weight_of((height, 16), "rows", pattern, torch.float32, seed=i)
            layer.weight[i * height : (i + 1) * height] = rows * 0.3
    record(layer, [Slot("weight", "rows", shape, pattern, (i * height, (i + 1) * height)) for i in range(3)])
    return layer


LAYERS: dict[str, Callable[[], nn.Linear]] = {
    "whole": lambda: linear("1:4v4"),
    "shorter last group": lambda: linear("2:8v5"),
    "shorter last block": lambda: linear("1:4v3", in_=18),
    "one group": lambda: linear("1:4v64"),
    "slices of whole groups": lambda: fused("1:4v2", 4),
    "slices that end within a group": lambda: fused("2:8v3", 4),
}


@pytest.fixture(params=LAYERS, ids=str)
def layer(request: pytest.FixtureRequest) -> nn.Linear:
    torch.manual_seed(0)
    return LAYERS[request.param]()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_layer_is_the_dense_layer(layer: nn.Linear, dtype: torch.dtype) -> None:
    layer = layer.to(dtype)
    compressed = compress(layer)
    assert type(compressed) is NMLinear
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 0.03)
    for lead in [(), (5,), (2, 3)]:
        x = torch.randn(*lead, layer.in_features).to(dtype)
        with torch.no_grad():
            for found in (compressed(x), for_inference(copy.deepcopy(compressed))(x)):
                torch.testing.assert_close(found, layer(x), rtol=tolerance, atol=tolerance)
        x.requires_grad_()
        found, expected = (torch.autograd.grad(one(x).sum(), x) for one in (compressed, layer))
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(compressed.weight, layer.weight)
    back = decompress(compressed)
    assert type(back) is nn.Linear
    assert torch.equal(back.weight, layer.weight)


def test_state_dicts_copies_and_dtypes(layer: nn.Linear) -> None:
    compressed = compress(layer)
    x = torch.randn(4, layer.in_features)
    expected = compressed(x)
    other = copy.deepcopy(compressed)
    with torch.no_grad():
        for name, tensor in other.state_dict().items():
            if name.endswith("values"):
                tensor.zero_()
    file = io.BytesIO()
    torch.save(compressed.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), expected)
    torch.testing.assert_close(compressed.double()(x.double()).float(), expected)


def test_graphs_are_compiled_whole(layer: nn.Linear) -> None:
    compressed = compress(layer)
    x = torch.randn(4, layer.in_features)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(compressed, backend="eager", fullgraph=True)(x), layer(x))


def test_a_state_dict_of_another_v_is_refused() -> None:
    """12 groups of one row and 6 of two differ in shape; V = 6 and V = 7 of 12 rows do not."""
    for mine, theirs, alike in [(6, 7, True), (7, 6, True), (2, 1, False), (1, 2, False)]:
        own, other = Pattern(1, 4, mine), Pattern(1, 4, theirs)
        model, state = compress(linear(str(own))), compress(linear(str(other))).state_dict()
        assert ([t.shape for t in model.state_dict().values()] == [t.shape for t in state.values()]) is alike
        with pytest.raises(RuntimeError, match=rf"holds {other}, this layer {own}$"):
            model.load_state_dict(state)


def test_two_numbers_of_an_older_state_dict_are_a_v_of_one() -> None:
    model = compress(linear("1:4"))
    state = model.state_dict()
    [name] = [name for name in state if name.endswith(".nm")]
    assert state[name].tolist() == [1, 4]
    model.load_state_dict({**state, name: torch.tensor([1, 4])})


def test_convolutions_and_columns() -> None:
    pattern = Pattern(1, 4, 3)
    for kernel, groups in ((1, 1), (3, 1), (3, 2)):
        conv = nn.Conv2d(8, 7, kernel, padding=kernel // 2) if groups == 1 else nn.Conv2d(8, 6, 3, groups=2)
        with torch.no_grad():
            conv.weight.copy_(weight_of(tuple(conv.weight.shape), "conv", pattern, torch.float32, kernel))
            compressed = compress(conv, {"weight": "1:4v3"})
            x = torch.randn(2, 8, 5, 5)
            assert type(compressed) is NMConv2d
            torch.testing.assert_close(compressed(x), conv(x), rtol=1e-5, atol=1e-5)
        assert verify(conv, {"weight": "1:4v3"}).ok
    column = weight_of((16, 7), "columns", pattern, torch.float32, 5)
    packed = CompressedNM.pack(column, pattern, "columns")
    assert packed.offsets.shape == (3, 4)
    assert torch.equal(packed.unpack(), column)


def test_what_was_found_in_a_weight_is_a_pattern_of_rows() -> None:
    """Nobody said that the columns are shared."""
    layer = nn.Linear(16, 8)
    with torch.no_grad():
        layer.weight.zero_()[:, ::8] = 1.0
    assert "1:8 " in str(compress(layer))


# ---------------------------------------------------------------------------------------------- verdicts
def test_a_model_is_verified_group_by_group() -> None:
    model = linear("1:4v5")
    report = verify(model)
    assert (report.ok, report.layers[0].pattern, report.layers[0].blocks) == (True, "1:4v5", 3 * 4)
    with torch.no_grad():
        model.weight.zero_()[:, ::4] = 1.0
        model.weight[11, 8:10] = torch.tensor([0.0, 1.0])           # row 11 keeps a column of its own: 1:4, not shared
    assert verify(model, {"weight": "1:4"}).ok
    assert verify(model).lines()[0] == (
        "weight: not 1:4v5 in 1 of 12 blocks: rows 10-11, block 2: 2 non-zero columns, 1 allowed"
    )
    data = json.loads(json.dumps(verify(model).to_dict()))["layers"][0]["first"]
    assert data == [{"row": 10, "block": 2, "nonzeros": 2, "rows": 2, "reason": "2 non-zero columns, 1 allowed"}]
    with pytest.raises(ValueError, match="weight is not 1:4v5: rows 10-11, block 2"):
        compress(model)


@pytest.mark.parametrize(
    ("row", "column", "value", "ok"),
    [(1, 1, 1e-45, False), (1, 1, -1e-30, False), (1, 1, -0.0, True), (1, 0, 0.0, True), (1, 4, 5.0, True)],
)
def test_nearly_zero_is_not_zero(row: int, column: int, value: float, ok: bool) -> None:
    model = linear("1:4v5")
    with torch.no_grad():
        model.weight.zero_()[:, ::4] = 1.0
        model.weight[row, column] = value
    assert verify(model).ok is ok


def test_enough_zeros_in_the_wrong_blocks() -> None:
    model = linear("1:4v4")
    with torch.no_grad():
        model.weight.zero_()[:, :4] = 1.0                          # a quarter is kept, as 1:4 does, and shared
    [check] = verify(model).layers
    assert (check.broken, check.blocks) == (3, 12)
    assert str(check.first[2]) == "rows 8-11, block 0: 4 non-zero columns, 1 allowed"


def test_slices_are_verified_with_groups_of_their_own() -> None:
    model = fused("2:8v3", 4)
    assert [layer.blocks for layer in verify(model).layers] == [4, 4, 4]
    with torch.no_grad():
        model.weight[7] = 1.0                                      # the last group of the second slice, one row
    [broken] = [layer for layer in verify(model).layers if layer.broken]
    assert broken.label == "weight[4:8]"
    assert str(broken.first[0]) == "row 7, block 0: 8 non-zero columns, 2 allowed"


# ---------------------------------------------------------------------------------------------- files
def metadata(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        content: dict[str, Any] = json.loads(file.metadata()["nmflow"])
    return content


def edited(path: Path, change: dict[str, Tensor], **entries: Any) -> Path:
    content = {**metadata(path), **entries}
    save_file({**load_file(path), **change}, path, {"nmflow": json.dumps(content)})
    return path


def test_every_bit_comes_back_from_a_file(layer: nn.Linear, tmp_path: Path) -> None:
    path = tmp_path / "packed.safetensors"
    save_compressed(layer, path)
    loaded = load_compressed(path, nn.Linear(layer.in_features, layer.out_features))
    assert torch.equal(decompress(loaded).weight, layer.weight)
    assert verify(path).ok
    assert [check.pattern for check in verify(path).layers] == [check.pattern for check in verify(layer).layers]
    save_compressed(loaded, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("save", [save_model, save_compressed])
def test_only_files_with_shared_columns_are_of_the_second_version(
    save: Callable[[nn.Module, Path], None], tmp_path: Path
) -> None:
    """What reads the first version alone refuses the second one by its number."""
    for text, version in (("1:4", 1), ("1:4v1", 1), ("1:4v4", 2)):
        path = tmp_path / f"{version}.safetensors"
        save(linear(text), path)
        content = metadata(path)
        assert content["format_version"] == version
        assert content["slots"][0]["pattern"] == text.removesuffix("v1")
        with pytest.raises(ValueError, match=f"format_version {3 - version}, its patterns are those of {version}"):
            verify(edited(path, {}, format_version=3 - version))


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    path = tmp_path / "packed.safetensors"
    save_compressed(linear("2:8v5"), path)
    return path


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("weight.offsets", torch.zeros(12, 4, dtype=torch.uint8), r"offsets: .*\(12, 4\), its slot asks .*\(3, 4\)"),
        ("weight.offsets", torch.zeros(2, 4, dtype=torch.uint8), r"offsets: .*\(2, 4\)"),
        ("weight.values", torch.zeros(3, 4), r"values: .*\(3, 4\), its slot asks for .*\(12, 4\)"),
    ],
)
def test_sizes_that_do_not_go_with_the_pattern(packed: Path, name: str, tensor: Tensor, message: str) -> None:
    edited(packed, {name: tensor})
    for use in (verify, lambda path: load_compressed(path, nn.Linear(16, 12))):
        with pytest.raises(ValueError, match=message):
            use(packed)


def test_another_v_in_the_metadata(packed: Path) -> None:
    slots = metadata(packed)["slots"]
    for text, message in (("2:8v7", "asks for"), ("2:8", "format_version 2"), ("2:8v9999999999", "2147483647")):
        with pytest.raises(ValueError, match=message):
            verify(edited(packed, {}, slots=[{**slots[0], "pattern": text}]))


@pytest.mark.parametrize("offsets", [[7, 8], [5, 5], [6, 2], [0, 255]])
def test_offsets_of_a_group_that_cannot_be(packed: Path, offsets: list[int]) -> None:
    stored = load_file(packed)["weight.offsets"]
    stored[2, 2:] = torch.tensor(offsets, dtype=torch.uint8)
    edited(packed, {"weight.offsets": stored})
    report = verify(packed)
    assert (report.ok, report.layers[0].broken, report.layers[0].blocks) == (False, 1, 6)
    assert f"rows 10-11, block 1: offsets {offsets} of a block of 8" in report.lines()[0]
    with pytest.raises(ValueError, match="rows 10-11, block 1: offsets"):
        load_compressed(packed, nn.Linear(16, 12))


def test_a_v_of_billions_takes_no_memory(tmp_path: Path) -> None:
    layer = linear(f"1:4v{2**31 - 1}")
    path = tmp_path / "packed.safetensors"
    save_compressed(layer, path)
    assert verify(path).ok
    assert verify(path, {"weight": "1:4v12"}).ok
    assert torch.equal(load_compressed(path, nn.Linear(16, 12)).weight, layer.weight)


@settings(deadline=None, max_examples=40)
@given(some_pattern, some_pattern, st.integers(0, 99))
@example(Pattern(1, 8, 2), Pattern(1, 8, 2), 1)                    # two groups, whose columns differ
def test_another_pattern_asked_of_a_compressed_file(
    tmp_path_factory: pytest.TempPathFactory, stored: Pattern, asked: Pattern, seed: int
) -> None:
    """Counted from values and offsets, without unpacking: the same blocks as in the dense weight."""
    layer = nn.Linear(20, 7)
    with torch.no_grad():
        layer.weight[:4] = weight_of((4, 20), "rows", stored, torch.float32, seed)
        layer.weight[4:] = torch.randn(3, 20) * (torch.rand(3, 20) > 0.7)
    record(layer, [Slot("weight", "rows", (7, 20), stored, rows=(0, 4))])
    path = tmp_path_factory.mktemp("asked") / "c.safetensors"
    save_compressed(layer, path)
    expected = crowded(layer.weight.tolist(), asked)
    for subject in (path, layer):
        [check] = verify(subject, {"weight": asked}).layers
        assert (check.blocks, check.broken) == (math.ceil(7 / asked.v) * math.ceil(20 / asked.m), len(expected))
        assert [(b.row, b.block, b.nonzeros) for b in check.first] == expected[:3]
        assert [b.rows for b in check.first] == [min(asked.v, 7 - top) for top, _, _ in expected[:3]]
