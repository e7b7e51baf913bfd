"""The compressed form and the layers that compute with it, against double loops and products in float64."""

from __future__ import annotations

import copy
import math
import pickle
import random
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nmflow import ops
from nmflow.pattern import Pattern
from nmflow.runtime import CompressedNM, NMConv2d, NMLinear, compress, compression_report, decompress
from nmflow.runtime.modules import PackedWeight
from nmflow.targets import Slot, record, recorded

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


# ---------------------------------------------------------------------------------------------- oracle
def places(shape: tuple[int, ...], layout: str) -> list[list[tuple[int, ...]]]:
    """The indices of a weight, row by row of the reduction axis, written out for each layout."""
    if layout == "rows":
        lead = [()]
        for size in shape[:-1]:
            lead = [(*index, i) for index in lead for i in range(size)]
        return [[(*index, k) for k in range(shape[-1])] for index in lead]
    if layout == "columns":
        return [[(k, r) for k in range(shape[0])] for r in range(shape[1])]
    out, in_, height, width = shape
    return [[(o, i, y, x) for y in range(height) for x in range(width) for i in range(in_)] for o in range(out)]


def nm_weight(shape: tuple[int, ...], layout: str, n: int, m: int, dtype: torch.dtype, seed: int) -> Tensor:
    """A weight of pattern N:M, filled place by place; some blocks hold fewer than N non-zeros, zeros of both signs."""
    rng = random.Random(seed)
    weight = torch.zeros(shape, dtype=torch.float64)
    for row in places(shape, layout):
        for start in range(0, len(row), m):
            block = row[start : start + m]
            for index in rng.sample(block, rng.randint(0, min(n, len(block)))):
                weight[index] = rng.choice([1.0, -2.5, 0.125, 3.0, -0.0])
    return weight.to(dtype)


def bits(tensor: Tensor) -> list[int]:
    found: list[int] = tensor.contiguous().view(BITS[tensor.element_size()]).flatten().tolist()
    return found


SHAPES: list[tuple[tuple[int, ...], str]] = [
    ((5, 24), "rows"), ((1, 7), "rows"), ((2, 3, 10), "rows"), ((24, 5), "columns"), ((7, 2), "columns"),
    ((3, 4, 3, 3), "conv"), ((2, 5, 1, 2), "conv"), ((4, 1, 3, 3), "conv"),
]  # fmt: skip


# ---------------------------------------------------------------------------------------------- the form
@pytest.mark.parametrize(
    ("weight", "pattern", "layout", "values", "offsets"),
    [
        ([[0, 5, 0, 0, 7, 0, 0, 0]], "1:4", "rows", [[5, 7]], [[1, 0]]),
        ([[0, 5, 0, 6, 7, 0, 0, 8]], "2:4", "rows", [[5, 6, 7, 8]], [[1, 3, 0, 3]]),
        # Too few non-zeros: filled up at the lowest unused places.
        ([[0, 5, 0, 0, 0, 0, 0, 0]], "2:4", "rows", [[0, 5, 0, 0]], [[0, 1, 0, 1]]),
        ([[5, 0, 0, 0, 0, 0, 0, 9]], "3:4", "rows", [[5, 0, 0, 0, 0, 9]], [[0, 1, 2, 0, 1, 3]]),
        # The last block has 2 entries of 4 and owns the last min(N, 2) slots.
        ([[0, 0, 3, 0, 0, 4]], "1:4", "rows", [[3, 4]], [[2, 1]]),
        ([[0, 1, 3, 2, 0, 4]], "3:4", "rows", [[1, 3, 2, 0, 4]], [[1, 2, 3, 0, 1]]),
        ([[1, 2], [0, 3]], "dense", "rows", [[1, 2], [0, 3]], [[0, 0], [0, 0]]),
        ([[1, 2], [0, 3]], "2:2", "rows", [[1, 2], [0, 3]], [[0, 1], [0, 1]]),
        ([[0, 4], [3, 0], [0, 0], [0, 5]], "1:2", "columns", [[3, 0], [4, 5]], [[1, 0], [0, 1]]),
        # [out 1, in 2, height 1, width 2]: blocks run over the input channels of one pixel first.
        ([[[[0, 4]], [[3, 0]]]], "1:2", "conv", [[3, 4]], [[1, 0]]),
        ([0, 5, 0], "1:3", "rows", [[5]], [[1]]),
    ],
)
def test_golden_forms(weight: list[Any], pattern: str, layout: Any, values: list[Any], offsets: list[Any]) -> None:
    packed = CompressedNM.pack(torch.tensor(weight, dtype=torch.float32), pattern, layout)
    assert packed.values.tolist() == values
    assert packed.offsets.tolist() == offsets
    assert packed.offsets.dtype is torch.uint8
    assert packed.unpack().tolist() == weight
    assert packed.check() == []


@settings(deadline=None)
@given(
    place=st.sampled_from(SHAPES),
    nm=st.integers(1, 30).flatmap(lambda m: st.tuples(st.integers(1, m), st.just(m))),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 9999),
)
def test_pack_and_unpack_are_inverse(
    place: tuple[tuple[int, ...], Any], nm: tuple[int, int], dtype: torch.dtype, seed: int
) -> None:
    shape, layout = place
    n, m = nm
    weight = nm_weight(shape, layout, n, m, dtype, seed)
    packed = CompressedNM.pack(weight, Pattern(n, m), layout)
    assert packed.check() == []
    unpacked = packed.unpack()
    assert (unpacked.shape, unpacked.dtype, unpacked.is_contiguous()) == (weight.shape, dtype, True)
    assert torch.equal(unpacked, weight)
    for r, row in enumerate(places(shape, layout)):  # the form itself, slot by slot
        slot = 0
        for start in range(0, len(row), m):
            block = row[start : start + m]
            width = min(n, len(block))
            offsets = packed.offsets[r, slot : slot + width].tolist()
            assert offsets == sorted(set(offsets))
            assert set(offsets) <= set(range(len(block)))
            kept = dict(zip(offsets, packed.values[r, slot : slot + width].tolist(), strict=True))
            assert [kept.get(i, 0.0) for i in range(len(block))] == [float(weight[index]) for index in block]
            slot += width
        assert slot == packed.values.shape[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kept_bits_are_exact_and_the_rest_is_plus_zero(dtype: torch.dtype) -> None:
    kind = BITS[torch.empty(0, dtype=dtype).element_size()]
    smallest = torch.tensor([[1, 0, 0, 7]], dtype=kind).view(dtype)  # subnormal numbers
    assert bits(CompressedNM.pack(-smallest, "2:4").unpack())[3] == bits(-smallest)[3] != 0
    assert bits(CompressedNM.pack(smallest, "2:4").unpack()) == [1, 0, 0, 7]
    odd = torch.tensor([[math.inf, -0.0, -0.0, 1 / 3]], dtype=dtype)
    unpacked = CompressedNM.pack(odd, "2:4").unpack()
    assert bits(unpacked) == [bits(odd)[0], 0, 0, bits(odd)[3]]
    nan = CompressedNM.pack(torch.tensor([[0.0, math.nan, 0.0, 0.0]], dtype=dtype), "1:4").unpack()
    assert nan.isnan().tolist() == [[False, True, False, False]]


def test_equal_weights_have_equal_forms() -> None:
    """A filler is +0 at the lowest free place, wherever zeros and their signs came from."""
    one = CompressedNM.pack(torch.tensor([[0.0, -0.0, 3.0, 0.0]]), "3:4")
    other = CompressedNM.pack(torch.tensor([[-0.0, 0.0, 3.0, -0.0]]), "3:4")
    assert bits(one.values) == bits(other.values)
    assert one.offsets.tolist() == other.offsets.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (0, 0), (0,), ()], ids=str)
def test_empty_and_scalar_weights(shape: tuple[int, ...]) -> None:
    weight = torch.ones(shape)
    packed = CompressedNM.pack(weight, "1:4")
    assert packed.check() == []
    assert torch.equal(packed.unpack(), weight)


@pytest.mark.parametrize(
    ("m", "dtype"), [(255, torch.uint8), (256, torch.uint8), (257, torch.uint16), (65_536, torch.uint16)]
)
def test_offsets_are_as_wide_as_m_needs(m: int, dtype: torch.dtype) -> None:
    weight = torch.zeros(2, m + 3)
    weight[0, m - 1] = weight[1, m + 2] = 4.0
    packed = CompressedNM.pack(weight, Pattern(1, m))
    assert packed.offsets.dtype is dtype
    assert packed.offsets.to(torch.int64).tolist() == [[m - 1, 0], [0, 2]]
    assert torch.equal(packed.unpack(), weight)
    assert packed.nbytes == 4 * 4 + 4 * packed.offsets.element_size()


def test_pack_refuses() -> None:
    with pytest.raises(ValueError, match="65536"):
        CompressedNM.pack(torch.zeros(1, 4), "1:65537")
    with pytest.raises(TypeError, match="int64"):
        CompressedNM.pack(torch.zeros(1, 4, dtype=torch.int64), "1:4")
    weight = torch.zeros(6, 12)
    weight[2, 5], weight[2, 7] = 1.0, 1e-30
    weight[4, 8:12] = math.nan
    message = "row 2, block 1: 2 non-zeros, 1 allowed; row 4, block 2: 4 non-zeros, 1 allowed"
    with pytest.raises(ValueError, match=message):
        CompressedNM.pack(weight, "1:4")
    with pytest.raises(ValueError, match=r"row 0, block 0: 4 non-zeros, 2 allowed.* and 15 more blocks"):
        CompressedNM.pack(torch.ones(6, 12), "2:4")


GOOD = CompressedNM.pack(nm_weight((4, 10), "rows", 2, 4, torch.float32, seed=1) + 0.0, "2:4")


def spoiled(row: int, slot: int, offset: int) -> Tensor:
    offsets = GOOD.offsets.clone()
    offsets[row, slot] = offset
    return offsets


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": GOOD.values[:, :-1]}, r"values have shape \(4, 5\).* at 2:4 has \(4, 6\)"),
        ({"offsets": GOOD.offsets[:3]}, r"offsets have shape \(3, 6\)"),
        ({"values": GOOD.values.to(torch.int32)}, "values have dtype torch.int32"),
        ({"offsets": GOOD.offsets.to(torch.int32)}, "offsets have dtype torch.int32, not torch.uint8"),
        ({"pattern": Pattern(6, 300)}, "offsets have dtype torch.uint8, not torch.uint16"),
        ({"pattern": Pattern(1, 70_000)}, "65536"),
        ({"offsets": spoiled(3, 1, 4)}, "row 3, block 0: .*below 4"),
        ({"offsets": spoiled(1, 5, 2)}, r"row 1, block 2: offsets \[0, 2\] of a block of 2"),
        ({"offsets": GOOD.offsets.flip(1)}, "row 0, block 0: offsets"),
        ({"offsets": torch.zeros_like(GOOD.offsets)}, "row 0, block 0.*and 9 more blocks"),
    ],
)
def test_check_says_what_is_inconsistent(change: dict[str, Any], message: str) -> None:
    assert GOOD.check() == []
    problems = replace(GOOD, **change).check()
    assert len(problems) == 1
    assert re.search(message, problems[0]), problems


# ---------------------------------------------------------------------------------------------- layers
def packed_linear(parts: dict[tuple[int, int], str], out: int = 12, in_: int = 16, bias: bool = True) -> nn.Linear:
    """An ordinary linear layer whose row slices have these patterns, noted as `finalize` would."""
    layer = nn.Linear(in_, out, bias=bias)
    with torch.no_grad():
        layer.weight.normal_()
        for (start, stop), text in parts.items():
            pattern = Pattern.parse(text)
            part = nm_weight((stop - start, in_), "rows", pattern.n, pattern.m, torch.float32, seed=start)
            layer.weight[start:stop] = part * 0.3
    whole = (0, out)
    slots = [
        Slot("weight", "rows", (out, in_), Pattern.parse(text), None if rows == whole else rows)
        for rows, text in parts.items()
    ]
    record(layer, slots)
    return layer


LAYERS: dict[str, Callable[[], nn.Linear]] = {
    "whole": lambda: packed_linear({(0, 12): "1:4"}),
    "no bias": lambda: packed_linear({(0, 12): "2:8"}, bias=False),
    "tail": lambda: packed_linear({(0, 12): "1:4"}, in_=18),
    "slices": lambda: packed_linear({(0, 4): "1:4", (4, 8): "2:8"}),
    "dense first and between": lambda: packed_linear({(2, 4): "1:4", (8, 12): "1:16"}),
}


@pytest.fixture(params=LAYERS, ids=str)
def layer(request: pytest.FixtureRequest) -> nn.Linear:
    torch.manual_seed(0)
    return LAYERS[request.param]()


def in_float64(layer: nn.Linear, x: Tensor) -> Tensor:
    y = torch.einsum("...k,rk->...r", x.double(), layer.weight.detach().double())
    return y if layer.bias is None else y + layer.bias.detach().double()


def test_the_layer_is_the_dense_layer(layer: nn.Linear) -> None:
    compressed = compress(layer)
    assert type(compressed) is NMLinear
    assert isinstance(compressed, nn.Linear)
    assert (compressed.in_features, compressed.out_features) == (layer.in_features, layer.out_features)
    for lead in [(), (0,), (5,), (2, 3)]:
        x = torch.randn(*lead, layer.in_features)
        torch.testing.assert_close(compressed(x).double(), in_float64(layer, x), rtol=1e-5, atol=1e-5)
    assert [name for name, _ in compressed.named_parameters()] == (["bias"] if layer.bias is not None else [])


def test_the_weight_reads_as_the_dense_one(layer: nn.Linear) -> None:
    compressed = compress(layer)
    weight = compressed.weight
    assert isinstance(weight, Tensor)
    assert (weight.shape, weight.dtype, weight.ndim) == (layer.weight.shape, torch.float32, 2)
    assert weight.device == layer.weight.device
    assert weight.requires_grad is False
    assert torch.equal(weight, layer.weight)
    assert weight.tolist() == layer.weight.tolist()
    assert (weight.numpy() == layer.weight.detach().numpy()).all()
    assert torch.equal(weight[3], layer.weight[3])
    assert torch.equal(weight.T, layer.weight.T)
    assert torch.equal(copy.deepcopy(weight), layer.weight)
    assert type(weight + 0) is Tensor
    assert weight.data_ptr() != 0


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for every weight that is unpacked."""
    seen: list[str] = []
    unpack = PackedWeight.unpack

    def counted(self: PackedWeight) -> Tensor:
        seen.append(self.stored.name)
        return unpack(self)

    monkeypatch.setattr(PackedWeight, "unpack", counted)
    return seen


def test_metadata_unpacks_nothing(unpacked: list[str]) -> None:
    weight = compress(LAYERS["whole"]()).weight
    assert (weight.dtype, tuple(weight.shape), weight.device.type) == (torch.float32, (12, 16), "cpu")
    assert (weight.size(0), weight.dim(), weight.numel(), weight.is_floating_point()) == (12, 2, 192, True)
    assert unpacked == []
    weight.sum()
    assert unpacked == ["weight"]


@pytest.mark.parametrize(
    "write",
    [
        lambda layer: layer.weight.zero_(),
        lambda layer: layer.weight.data.fill_(1.0),
        lambda layer: nn.init.normal_(layer.weight),
        lambda layer: layer.weight.__setitem__(0, 1.0),
        lambda layer: layer.weight.__iadd__(1.0),
        lambda layer: torch.zeros(12, 16, out=layer.weight),
        lambda layer: torch.add(torch.zeros(12, 16), 1.0, out=layer.weight),
        lambda layer: setattr(layer.weight, "requires_grad", True),
    ],
)
def test_writing_into_the_weight_is_refused_and_not_lost(write: Callable[[nn.Linear], object]) -> None:
    layer = LAYERS["whole"]()
    compressed = compress(layer)
    with pytest.raises(RuntimeError, match="compressed weight"):
        write(compressed)
    assert torch.equal(compressed.weight, layer.weight)


def test_replacing_the_weight_is_refused() -> None:
    compressed = compress(LAYERS["whole"]())
    with pytest.raises((KeyError, AttributeError)):
        compressed.weight = nn.Parameter(torch.zeros(12, 16))


def test_gradients_reach_the_input_and_the_bias(layer: nn.Linear) -> None:
    compressed = compress(layer).train()
    x = torch.randn(3, layer.in_features, requires_grad=True)
    upstream = torch.randn(3, 12)
    compressed(x).backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ layer.weight.detach())
    if compressed.bias is not None:
        torch.testing.assert_close(compressed.bias.grad, upstream.sum(0))


def test_state_dict_round_trip(layer: nn.Linear) -> None:
    compressed = compress(layer)
    other = copy.deepcopy(compressed)
    for tensor in other.state_dict().values():
        tensor.zero_()
    assert not torch.equal(other.weight, layer.weight)
    assert all(tensor.any() for name, tensor in compressed.state_dict().items() if name.endswith("values"))
    nm = {name: tensor for name, tensor in other.state_dict().items() if name.endswith(".nm")}
    for name in nm:
        nm[name].copy_(compressed.state_dict()[name])
    other.load_state_dict(compressed.state_dict())
    assert torch.equal(other.weight, layer.weight)


def test_a_state_dict_of_another_pattern_of_the_same_size_is_refused() -> None:
    quarter, eighths = compress(packed_linear({(0, 12): "1:4"})), compress(packed_linear({(0, 12): "2:8"}))
    shapes = [[tuple(t.shape) for t in model.state_dict().values()] for model in (quarter, eighths)]
    assert shapes[0] == shapes[1]
    with pytest.raises(RuntimeError, match="holds 2:8, this layer 1:4"):
        quarter.load_state_dict(eighths.state_dict())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_moving_to_another_dtype(layer: nn.Linear, dtype: torch.dtype) -> None:
    compressed = compress(layer).to(dtype)
    assert compressed.weight.dtype is dtype
    assert torch.equal(compressed.weight, layer.weight.detach().to(dtype))
    x = torch.randn(3, layer.in_features, dtype=dtype)
    expected = in_float64(copy.deepcopy(layer).to(dtype), x)
    tolerance = 1e-12 if dtype is torch.float64 else 5e-2
    torch.testing.assert_close(compressed(x).double(), expected, rtol=tolerance, atol=tolerance)
    moved = compressed.to("meta")
    assert moved.weight.device.type == "meta"


def test_autocast(layer: nn.Linear) -> None:
    x = torch.randn(3, layer.in_features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = compress(layer)(x), layer(x)
    assert found.dtype is torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_stand_on_their_own(layer: nn.Linear, clone: Callable[[nn.Module], nn.Module]) -> None:
    compressed = compress(layer)
    twin = clone(compressed)
    assert type(twin) is NMLinear
    with torch.no_grad():
        for tensor in compressed.state_dict().values():
            tensor.zero_()
    assert torch.equal(twin.weight, layer.weight)
    x = torch.randn(3, layer.in_features)
    torch.testing.assert_close(twin(x), layer(x))


def test_compiles_to_one_graph(layer: nn.Linear) -> None:
    compressed = compress(layer)
    compiled = torch.compile(compressed, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, layer.in_features)
    torch.testing.assert_close(compiled(x), layer(x))


def test_a_reader_of_the_weight_compiles_to_one_graph() -> None:
    layer = LAYERS["slices"]()
    compressed = compress(layer)

    def read(x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x.to(compressed.weight.dtype), compressed.weight) * compressed.weight.shape[0]

    x = torch.randn(3, 16)
    found = torch.compile(read, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(found, 12 * x @ layer.weight.detach().T)


def test_the_registry_decides_who_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    always = [kernel for kernel in ops.registry._KERNELS if kernel.name == "dense"]
    monkeypatch.setattr(ops.registry, "_KERNELS", always)
    seen: list[tuple[int, int]] = []

    def noted(x: Tensor, values: Tensor, offsets: Tensor, shape: tuple[int, int], *rest: Any) -> Tensor:
        seen.append(shape)
        return ops.reference.linear(x, values, offsets, shape, *rest[:3])

    ops.register(ops.Kernel("noted", "linear", lambda n=None, **facts: None if n == 1 else "one of every M", noted))
    layer = LAYERS["slices"]()
    compressed = compress(layer)
    x = torch.randn(3, 16)
    torch.testing.assert_close(compressed(x), layer(x))
    assert seen == [(4, 16)]  # of 1:4, 2:8 and four dense rows
    assert compression_report(compressed).layers[0].kernel == "noted+dense"


def test_what_is_printed() -> None:
    text = repr(compress(LAYERS["slices"]()))
    assert "in_features=16, out_features=12, bias=True, weight=1:4+2:8+dense in 416 of 768 bytes" in text


def test_runtime_layers_are_not_built_by_hand() -> None:
    for cls in (NMLinear, NMConv2d):
        with pytest.raises(TypeError, match=r"nmflow\.compress"):
            cls(4, 4, 1)


def test_back_to_the_ordinary_layer(layer: nn.Linear) -> None:
    layer.weight.requires_grad_(False)
    compressed = compress(layer)
    restored = decompress(compressed)
    assert type(restored) is nn.Linear
    assert type(compressed) is NMLinear
    assert list(restored.state_dict()) == list(layer.state_dict())
    assert [name for name, _ in restored.named_parameters()] == [name for name, _ in layer.named_parameters()]
    for mine, theirs in zip(restored.parameters(), layer.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.requires_grad == theirs.requires_grad
    assert restored.__dict__.keys() == layer.__dict__.keys()
    assert recorded(restored) == recorded(layer)
    restored.weight = nn.Parameter(torch.zeros(12, layer.in_features))  # an ordinary attribute again
    assert not restored.weight.any()


# ---------------------------------------------------------------------------------------------- convolutions
@pytest.mark.parametrize(
    "options",
    [
        {"bias": False},
        {"padding": 1, "stride": 2},
        {"groups": 2},
        {"padding": 1, "padding_mode": "reflect"},
        {"dilation": 2},
        {"kernel_size": 1},
    ],
    ids=str,
)
def test_convolutions(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 6, **{"kernel_size": 3, **options})
    shape = tuple(layer.weight.shape)
    with torch.no_grad():
        layer.weight.copy_(nm_weight(shape, "conv", 1, 4, torch.float32, seed=2))
    compressed = compress(layer, {"weight": "1:4"})
    assert type(compressed) is NMConv2d
    assert isinstance(compressed, nn.Conv2d)
    assert torch.equal(compressed.weight, layer.weight)
    assert compressed.weight.stride() == layer.weight.stride()  # they decide which algorithm runs
    x = torch.randn(2, 8, 9, 9, requires_grad=True)
    y = torch.randn(2, 8, 9, 9)
    assert torch.equal(compressed(y), layer(y))
    compressed(x).square().sum().backward()
    found = x.grad.clone()
    x.grad = None
    layer(x).square().sum().backward()
    torch.testing.assert_close(found, x.grad)
    assert torch.equal(decompress(compressed).weight, layer.weight)
    twin = pickle.loads(pickle.dumps(compressed))
    assert torch.equal(twin(y), layer(y))
    compiled = torch.compile(compressed, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(y), layer(y))


# ---------------------------------------------------------------------------------------------- storage only
class Scaled(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return 2.0 * super().forward(input)


@pytest.mark.parametrize(
    ("make", "name", "x"),
    [
        (lambda: nn.Embedding(10, 8), "weight", torch.tensor([[1, 2], [9, 0]])),
        (lambda: Scaled(8, 6), "weight", torch.randn(3, 8)),
        (lambda: nn.LayerNorm(8), "weight", torch.randn(3, 8)),
        (lambda: nn.Linear(4, 8), "bias", torch.randn(3, 4)),
        (lambda: nn.Conv1d(8, 4, 3), "weight", torch.randn(2, 8, 5)),
        (lambda: nn.Bilinear(4, 8, 3), "weight", (torch.randn(2, 4), torch.randn(2, 8))),
        (lambda: nn.PReLU(8), "weight", torch.randn(2, 8)),
    ],
    ids=["embedding", "own forward", "norm", "bias", "conv1d", "bilinear", "prelu"],
)
def test_any_other_reader_keeps_its_forward(make: Callable[[], nn.Module], name: str, x: Any) -> None:
    torch.manual_seed(0)
    module = make()
    cls = type(module)
    parameter = module.get_parameter(name)
    with torch.no_grad():
        if isinstance(module, nn.Conv1d):
            flat = nm_weight((4, 3, 8), "rows", 1, 4, torch.float32, seed=3)
            parameter.copy_(flat.permute(0, 2, 1))
        else:
            parameter.copy_(nm_weight(tuple(parameter.shape), "rows", 1, 4, torch.float32, seed=3))
    compressed = compress(module, {name: "1:4"})
    inputs = x if isinstance(x, tuple) else (x,)
    assert isinstance(compressed, cls)
    assert type(module) is cls
    assert torch.equal(compressed(*inputs), module(*inputs))
    assert torch.equal(getattr(compressed, name), parameter)
    assert name not in dict(compressed.named_parameters())
    assert compression_report(compressed).layers[0].kernel == "storage only"
    for twin in (copy.deepcopy(compressed), pickle.loads(pickle.dumps(compressed))):
        assert type(twin) is type(compressed)
        assert torch.equal(twin(*inputs), module(*inputs))
    restored = decompress(compressed)
    assert type(restored) is cls
    assert torch.equal(restored.get_parameter(name), parameter)
    assert list(restored.state_dict()) == list(module.state_dict())


class Tripled(nn.Linear):
    """Torch's forward, all else its own."""

    def __call__(self, x: Tensor) -> Tensor:
        return 3.0 * super().__call__(x)

    def twice(self, x: Tensor) -> Tensor:
        return self(self(x))


class TripledConv(nn.Conv2d):
    def __call__(self, x: Tensor) -> Tensor:
        return 3.0 * super().__call__(x)

    def twice(self, x: Tensor) -> Tensor:
        return self(self(x))


class Named(nn.Linear):
    """Has what a runtime layer has, in another sense."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.activation = nn.Tanh()

    def twice(self, x: Tensor) -> Tensor:
        return self.activation(self(self.activation(self(x))))


@pytest.mark.parametrize(
    ("make", "x", "kernel"),
    [
        (lambda: Tripled(8, 8), torch.randn(3, 8), True),
        (lambda: TripledConv(8, 8, 1), torch.randn(2, 8, 5, 5), True),
        (lambda: Named(8, 8), torch.randn(3, 8), False),
    ],
    ids=["linear", "convolution", "a name of ours"],
)
def test_a_subclass_keeps_what_is_its_own(make: Callable[[], Any], x: Tensor, kernel: bool) -> None:
    torch.manual_seed(0)
    module = make()
    layout = "conv" if module.weight.dim() == 4 else "rows"
    with torch.no_grad():
        module.weight.copy_(nm_weight(tuple(module.weight.shape), layout, 1, 4, torch.float32, seed=3))
    before = {name for name in module.__dict__ if not name.startswith("_")}
    compressed = compress(module, {"weight": "1:4"})
    assert isinstance(compressed, type(module))
    assert isinstance(compressed, NMLinear | NMConv2d) is kernel
    for twin in (compressed, copy.deepcopy(compressed), pickle.loads(pickle.dumps(compressed))):
        assert type(twin) is type(compressed)
        torch.testing.assert_close(twin(x), module(x))
        torch.testing.assert_close(twin.twice(x), module.twice(x))
    restored = decompress(compressed)
    assert type(restored) is type(module)
    assert {name for name in restored.__dict__ if not name.startswith("_")} == before
    assert torch.equal(restored.twice(x), module.twice(x))


def test_two_weights_of_one_layer() -> None:
    layer = nn.Linear(8, 8)
    with torch.no_grad():
        layer.weight.copy_(nm_weight((8, 8), "rows", 1, 4, torch.float32, seed=3))
        layer.bias.copy_(nm_weight((8,), "rows", 1, 4, torch.float32, seed=4))
    compressed = compress(layer, {"weight": "1:4", "bias": "1:4"})
    assert isinstance(compressed, NMLinear)
    assert list(compressed.parameters()) == []
    x = torch.randn(3, 8)
    torch.testing.assert_close(compressed(x), layer(x))
    torch.testing.assert_close(pickle.loads(pickle.dumps(compressed))(x), layer(x))
    assert type(decompress(compressed)) is nn.Linear
    assert list(decompress(compressed).state_dict()) == ["weight", "bias"]
