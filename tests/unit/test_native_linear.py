"""The native product agrees with a dense one in float64 of the same rounded weights, on every instruction set here.

The oracle writes the dense weight entry by entry and multiplies in float64; it shares nothing with the packing.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch import library as operators

from nmflow.ops import native, native_library, native_tune
from nmflow.ops.native_plan import DENSE, Algorithm, Key, NativePlan, Split, Tiling, bucket, candidates, default_tiling

missing = native.why_not()
pytestmark = pytest.mark.skipif(missing is not None, reason=f"native library: {missing}")

HERE = () if missing else native.ISAS[: native.ISAS.index(str(native.describe()["isa"])) + 1]
PATTERNS = [(2, 4), (1, 4), (1, 8), (1, 16), (1, 32), (1, 64), (1, 128), (3, 5), (4, 16), (16, 128), (2, 300), (5, 5)]
EXAMPLES = int(os.environ.get("NMFLOW_TEST_EXAMPLES", 80))  # fewer where sanitizers slow everything
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3}


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


# ----------------------------------------------------------------------------------------------- oracle
def weight(
    rows: int, axis: int, n: int, m: int, dtype: torch.dtype, seed: int = 0, least: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Values of at least `least`, offsets and the dense float64 weight, placed entry by entry."""
    kept = axis // m * n + min(n, axis % m)
    values = torch.randn(rows, kept, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return placed(torch.where(values.abs() < least, least, values), axis, n, m, seed)


def placed(values: Tensor, axis: int, n: int, m: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Values, offsets by chance, and the dense weight."""
    chance = random.Random(seed)
    rows, kept = values.shape
    offsets, dense = [], torch.zeros(rows, axis, dtype=torch.float64)
    exact = values.double().tolist()
    for r in range(rows):
        line: list[int] = []
        for start in range(0, axis, m):
            size = min(m, axis - start)
            for offset in sorted(chance.sample(range(size), min(n, size))):
                dense[r, start + offset] = exact[r][len(line)]
                line.append(offset)
        offsets.append(line)
    packed = torch.tensor(offsets, dtype=torch.int64).reshape(rows, kept)
    return values, packed.to(torch.uint8 if m <= 256 else torch.uint16), dense


def gap(y: Tensor, expected: Tensor) -> float:
    """Largest error over the largest expected entry; infinite where anything is not finite."""
    if not y.numel():
        return 0.0
    error = ((y.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()
    return error if math.isfinite(error) else math.inf


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, math.nan, dtype=dtype)


@pytest.fixture(autouse=True)
def fresh_plan() -> Iterator[None]:
    before = dict(native.plan.choices)
    yield
    native.plan.choices.clear()
    native.plan.choices.update(before)


def choose(packed: native.PackedWeight, tokens: int, tiling: Tiling) -> None:
    """Have the next products of this weight at this token count done with these tiles."""
    native.plan.choices[packed.forms.key(tokens, torch.get_num_threads())] = tiling
    packed.forms.calls.clear()


# ---------------------------------------------------------------------------------------------- products
@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_every_tiling_agrees_with_the_dense_product(isa: str, dtype: torch.dtype, n: int, m: int, threads: int) -> None:
    for rows, axis in ((48, max(64, m)), (37, 131)):
        values, offsets, dense = weight(rows, axis, n, m, dtype)
        packed = native.prepare(values, offsets, rows, axis, n, m, isa=isa)
        bias = torch.randn(rows).to(dtype)
        for tokens in (1, 19):
            x = torch.randn(tokens, axis).to(dtype)
            expected = x.double() @ dense.T + bias.double()
            tilings = candidates(packed.forms.key(tokens, threads), packed.forms.rv_reach())
            assert tokens == 1 or {tiling.split for tiling in tilings} == {"rows", "tokens"}
            for tiling in tilings if tokens == 1 else tilings[threads :: 2 if len(tilings) < 20 else 5]:
                choose(packed, tokens, tiling)
                y = poisoned(tokens, rows, dtype=dtype)
                assert native.linear(x, packed, bias, out=y) is y
                assert gap(y, expected) <= TOLERANCE[dtype], (rows, axis, tokens, tiling)


# Portable vectors have no permutation, and of the others not all have one of bfloat16.
ROW_VECTORS = [(isa, torch.float32) for isa in HERE[1:]]
if HERE and native.describe()["bf16"]:
    ROW_VECTORS.append((HERE[-1], torch.bfloat16))


@pytest.mark.parametrize(("isa", "dtype"), ROW_VECTORS)
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 7, 8, 12, 16, 24, 32, 64, 100, 128])
@pytest.mark.parametrize(("few", "least"), [(False, 0.0), (True, 0.0), (True, 1e-3)], ids=["wide", "few", "short"])
def test_a_few_tokens_in_the_order_of_the_weight(isa: str, dtype: torch.dtype, m: int, few: bool, least: float) -> None:
    """However the kept weights of a chunk fall into words of indices: whole cycles of them, parts of one, a tail; as
    many tokens as are taken at once, fewer, and some more.

    Values of at least 1e-3 have few exponents.
    """
    m = min(m, 64 if dtype == torch.bfloat16 else m)  # its widest
    numbers_of_tokens = itertools.cycle((2, 3, 4, 5, 6, 7, 8, 9, 19))
    for i, n in enumerate(sorted({1, min(2, m), min(3, m), m // 2 or 1, m - 1 or 1, m})):
        for rows, axis in ((37, 3 * m), (16, 131), (5, 48 * m + 7), (33, 1024), (165, 515)):
            values, offsets, dense = weight(rows, axis, n, m, dtype, i, least)
            packed = native.prepare(values, offsets, rows, axis, n, m, isa=isa)
            for tokens in (1, next(numbers_of_tokens)):
                choose(packed, tokens, Tiling("rv", m if few else 0, 8, 1))
                # Something between the rows of x, or nothing, for sanitizers.
                wide = torch.cat([torch.randn(tokens, axis), torch.full((tokens, 5 * (i % 2)), math.nan)], 1).to(dtype)
                x, y, bias = wide[:, :axis], poisoned(tokens, rows + 3, dtype=dtype), torch.randn(rows).to(dtype)
                native.linear(x, packed, bias, out=y[:, :rows])
                expected = x.double() @ dense.T + bias.double()
                assert gap(y[:, :rows], expected) <= TOLERANCE[dtype], (rows, axis, n, tokens)
                assert y[:, rows:].isnan().all()
            if few and least:
                assert value_bits(packed) == (24 if dtype == torch.float32 and m <= 8 and isa == SHORT_VALUES else 0)


def value_bits(packed: native.PackedWeight) -> int:
    """Of the form for one token; 0: values as they are."""
    return packed.forms.form("rv", packed.m).layout.value_bits


def _short_values() -> str | None:
    """The instruction set that takes values of 24 bits, as it does with nothing but ones."""
    for isa in HERE[1:]:
        packed = native.prepare(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.uint8), 1, 4, 1, 4, isa=isa)
        if value_bits(packed):
            return isa
    return None


SHORT_VALUES = _short_values()
needs_short_values = pytest.mark.skipif(SHORT_VALUES is None, reason="values of 24 bits take AVX-512 VBMI")


def numbers(rows: int, kept: int, exponents: list[int]) -> Tensor:
    """Floats of any sign and mantissa with these exponents (as float32 stores them), every one of them there."""
    chosen = torch.tensor(exponents)[torch.randint(len(exponents), (rows, kept))]
    chosen.view(-1)[: len(exponents)] = torch.tensor(exponents)
    bits = chosen << 23 | torch.randint(1 << 23, (rows, kept)) | torch.randint(2, (rows, kept)) << 31
    return torch.where(bits < 1 << 31, bits, bits - (1 << 32)).to(torch.int32).view(torch.float32)


@needs_short_values
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (1, 2), (2, 3), (1, 8), (5, 8), (4, 7), (1, 1)])
def test_values_of_24_bits_lose_nothing(n: int, m: int, threads: int) -> None:
    """A column of W is its product with a unit vector, to the last bit; zeros, the smallest and largest numbers too."""
    for rows, axis in ((37, 40), (64, 19), (200, 3 * m)):
        for exponents in ([0, 1, 254], list(range(100, 116)), [127], [0, *range(230, 245)]):
            values, offsets, dense = placed(numbers(rows, axis // m * n + min(n, axis % m), exponents), axis, n, m)
            packed = native.prepare(values, offsets, rows, axis, n, m)
            for column, unit in enumerate(torch.eye(axis)):
                assert torch.equal(native.linear(unit[None], packed)[0].double(), dense[:, column]), (rows, exponents)
            assert value_bits(packed) == 24


@needs_short_values
def test_values_of_24_bits_keep_what_is_no_number() -> None:
    values, offsets, _ = placed(numbers(50, 1, [255, 127]), 1, 1, 1)
    values[0], values[1] = math.inf, -math.inf
    packed = native.prepare(values, offsets, 50, 1, 1, 1)
    torch.testing.assert_close(native.linear(torch.ones(1, 1), packed)[0], values[:, 0], rtol=0, atol=0, equal_nan=True)
    assert values.isnan().any()
    assert value_bits(packed) == 24


@needs_short_values
@pytest.mark.parametrize(
    ("isa", "algorithm", "m", "chunk", "dtype", "bits", "status"),
    [
        (2, 1, 4, 4, 0, 24, 0),
        (2, 1, 4, 4, 0, 7, 1),  # no such form
        (2, 0, 4, 4, 0, 24, 1),  # TB
        (2, 1, 4, 0, 0, 24, 2),  # a whole vector of x
        (2, 1, 16, 16, 0, 24, 2),
        (2, 1, 4, 4, 1, 24, 2),  # bfloat16
        (1, 1, 4, 4, 0, 24, 2),  # AVX2
    ],
)
def test_which_layouts_take_values_of_24_bits(
    isa: int, algorithm: int, m: int, chunk: int, dtype: int, bits: int, status: int
) -> None:
    layout = native_library.Layout(16, 64, 1, m, dtype, isa, algorithm, chunk, bits)
    assert native_library.loaded().handle.nmflow_layout_init(layout) == status


@needs_short_values
def test_values_of_many_exponents_stay_as_they_are() -> None:
    for count, bits in ((16, 24), (17, 0)):
        values, offsets, dense = placed(numbers(40, 24, list(range(110, 110 + count))), 48, 2, 4)
        packed, x = native.prepare(values, offsets, 40, 48, 2, 4), torch.randn(1, 48)
        assert gap(native.linear(x, packed), x.double() @ dense.T) <= TOLERANCE[torch.float32]
        assert value_bits(packed) == bits
        vectors, words, table = 3, -(-24 // (5 if bits else 16)), 80 if bits else 0  # 16 rows a vector, 24 steps each
        assert packed.nbytes == vectors * (24 * 16 * (bits or 32) // 8 + words * 64) + table


@pytest.mark.parametrize(("isa", "dtype"), ROW_VECTORS)
@pytest.mark.parametrize(
    ("rows", "axis", "n", "m", "tokens"), [(485, 512, 1, 8, 23), (203, 4096, 1, 16, 91), (86, 3100, 1, 24, 83)]
)
def test_row_vectors_in_blocks_of_the_caches(
    isa: str, dtype: torch.dtype, rows: int, axis: int, n: int, m: int, tokens: int, threads: int
) -> None:
    """More rows than L1 holds beside a tile of tokens, more tokens than L2 holds, and in bfloat16, from 1:16 on, more
    columns than L1 holds of both; none of them ends with a block."""
    values, offsets, dense = weight(rows, axis, n, m, dtype)
    packed = native.prepare(values, offsets, rows, axis, n, m, isa=isa)
    x, bias = torch.randn(tokens, axis).to(dtype), torch.randn(rows).to(dtype)
    product = x.double() @ dense.T
    for split in get_args(Split):
        for tile_tokens, tile_rows in ((5, 4), (8, 2), (8, 1), (3, 1)):
            choose(packed, tokens, Tiling("rv", 0, tile_tokens, tile_rows, split))
            for add, activation in ((None, None), (bias, None), (bias, "gelu")):
                room = poisoned(tokens + 1, rows + 3, dtype=dtype)
                native.linear(x, packed, add, activation, out=room[:tokens, :rows])
                expected = product if add is None else product + add.double()
                assert gap(room[:tokens, :rows], native.activate(expected, activation)) <= TOLERANCE[dtype]
                assert room[tokens:].isnan().all()
                assert room[:, rows:].isnan().all()


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("split", ["rows", "tokens"])
def test_sums_that_stay_in_registers(isa: str, dtype: torch.dtype, split: Split, threads: int) -> None:
    """TB with one vector of tokens, one of rows and all columns in one K-block: `tb_direct`.

    The axes make the indices one byte and two; the rows and tokens end within a vector of every instruction set, the
    kept weights of a row (1, 2, 3 and 0 more than fours) within a load of four.
    """
    functions = [None, "relu", "gelu", "gelu_tanh", "silu"]
    cases = [(1, 16, 80), (3, 16, 96), (1, 4, 248), (5, 20, 72), (1, 32, 600), (2, 64, 1000), (1, 300, 900)]
    for i, (n, m, axis) in enumerate(cases):
        for rows, tokens in ((37, 21), (64, 16), (5, 3)):
            values, offsets, dense = weight(rows, axis, n, m, dtype, i)
            packed = native.prepare(values, offsets, rows, axis, n, m, isa=isa)
            choose(packed, tokens, Tiling("tb", -(-axis // m) * m, 1, 1, split))
            x, bias = torch.randn(tokens, axis).to(dtype), torch.randn(rows).to(dtype)
            product = x.double() @ dense.T
            for activation in functions if (rows, i) in ((37, 1), (37, 4)) else functions[i % 5 :: 5]:
                for add in (None, bias):
                    expected = product if add is None else product + add.double()
                    room = poisoned(tokens + 1, rows + 3, dtype=dtype)
                    native.linear(x, packed, add, activation, out=room[:tokens, :rows])
                    error = gap(room[:tokens, :rows], native.activate(expected, activation))
                    assert error <= TOLERANCE[dtype], (n, m, axis, rows, tokens, activation, add is None)
                    assert room[tokens:].isnan().all()
                    assert room[:, rows:].isnan().all()


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("split", get_args(Split))
@pytest.mark.parametrize("algorithm", ["tb", "rv"])
def test_threads_share_out_rows_or_tokens(
    algorithm: Algorithm, split: Split, isa: str, dtype: torch.dtype, threads: int
) -> None:
    """Enough work for two threads, and tokens that end within a vector."""
    values, offsets, dense = weight(70, 130, 2, 4, dtype)
    packed = native.prepare(values, offsets, 70, 130, 2, 4, isa=isa)
    if algorithm == "rv" and not packed.forms.rv_reach():
        pytest.skip(f"{isa} has no row-vector kernel for {dtype}")
    bias = torch.randn(70).to(dtype)
    for tokens in (16, 17, 40, 90):
        x = torch.randn(tokens, 140).to(dtype)[:, :130]
        choose(packed, tokens, Tiling(algorithm, 64 if algorithm == "tb" else 0, 8, 2, split))
        room = poisoned(tokens + 1, 75, dtype=dtype)
        native.linear(x, packed, bias, out=room[:tokens, :70])
        assert gap(room[:tokens, :70], x.double() @ dense.T + bias.double()) <= TOLERANCE[dtype], tokens
        assert room[tokens:].isnan().all()
        assert room[:, 70:].isnan().all()


@settings(max_examples=EXAMPLES, deadline=None)
@given(data=st.data())
def test_any_shape_pattern_stride_and_tiling(data: st.DataObject) -> None:
    draw = data.draw
    rows, axis = draw(st.integers(1, 70)), draw(st.integers(1, 300))
    m = draw(st.integers(1, 320))
    n = draw(st.integers(1, m))
    tokens, dtype = draw(st.integers(1, 90)), draw(st.sampled_from(list(TOLERANCE)))
    values, offsets, dense = weight(rows, axis, n, m, dtype, draw(st.integers(0, 9)))
    packed = native.prepare(values, offsets, rows, axis, n, m, isa=draw(st.sampled_from(HERE)))
    offered = candidates(packed.forms.key(tokens, torch.get_num_threads()), packed.forms.rv_reach())
    tiling, splits = draw(st.sampled_from(offered)), st.sampled_from(get_args(Split))
    choose(packed, tokens, dataclasses.replace(tiling, split=draw(splits)))
    wide = torch.randn(tokens, axis + draw(st.integers(0, 5))).to(dtype)
    # NaN beside every row of x, and room beside every row of y: neither may be touched.
    wide[:, axis:] = math.nan
    x = wide[:, :axis]
    room = poisoned(tokens + 1, rows + draw(st.integers(0, 5)), dtype=dtype)
    native.linear(x, packed, out=room[:tokens, :rows])
    expected = x.double() @ dense.T
    assert gap(room[:tokens, :rows], expected) <= TOLERANCE[dtype]
    assert room[tokens:].isnan().all()
    assert room[:, rows:].isnan().all()


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("shape", [(24,), (2, 3, 24), (0, 24), (3, 0, 24), (1, 24)])
def test_leading_dimensions(isa: str, shape: tuple[int, ...]) -> None:
    values, offsets, dense = weight(10, 24, 1, 8, torch.float32)
    packed = native.prepare(values, offsets, 10, 24, 1, 8, isa=isa)
    x = torch.randn(shape)
    y = native.linear(x, packed)
    assert y.shape == (*shape[:-1], 10)
    assert gap(y, x.double() @ dense.T) <= 1e-5


def test_strides_that_no_kernel_takes_are_copied() -> None:
    values, offsets, dense = weight(10, 24, 1, 8, torch.float32)
    packed = native.prepare(values, offsets, 10, 24, 1, 8)
    swapped = torch.randn(4, 3, 24).transpose(0, 1)
    for x in (torch.randn(24, 6).T, torch.randn(6, 48)[:, ::2], swapped, torch.randn(24).expand(5, 24)):
        assert gap(native.linear(x, packed), x.double() @ dense.T) <= 1e-5


@pytest.mark.parametrize("isa", HERE)
def test_weights_without_rows_or_columns(isa: str) -> None:
    none = torch.empty(0, 6), torch.empty(0, 6, dtype=torch.uint8)
    assert native.linear(torch.randn(3, 24), native.prepare(*none, 0, 24, 1, 4, isa=isa)).shape == (3, 0)
    empty = torch.empty(7, 0), torch.empty(7, 0, dtype=torch.uint8)
    bias = torch.randn(7)
    for tokens in (1, 30):
        y = native.linear(torch.empty(tokens, 0), native.prepare(*empty, 7, 0, 1, 4, isa=isa), bias)
        assert torch.equal(y, bias.expand(tokens, 7))


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [1, 5, 200])
@pytest.mark.parametrize(
    ("activation", "function"),
    [
        ("relu", F.relu),
        ("gelu", F.gelu),
        ("gelu_tanh", lambda y: F.gelu(y, approximate="tanh")),
        ("silu", F.silu),
    ],
)
def test_activations(isa: str, dtype: torch.dtype, tokens: int, activation: native.Activation, function) -> None:
    values, offsets, dense = weight(33, 40, 2, 4, dtype)
    packed = native.prepare(values, offsets, 33, 40, 2, 4, isa=isa)
    x, bias = torch.randn(tokens, 40).to(dtype), torch.randn(33).to(dtype)
    expected = function(x.double() @ dense.T + bias.double())
    assert gap(native.linear(x, packed, bias, activation), expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_activations_from_end_to_end(isa: str, activation: native.Activation) -> None:
    """Weight 1:1 of size 1: y is the activation of x alone."""
    packed = native.prepare(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.uint8), 1, 1, 1, 1, isa=isa)
    x = torch.cat([torch.linspace(-30, 30, 4001), torch.tensor([-1e4, -100.0, -0.0, 0.0, 100.0, 1e4])])[:, None]
    for tokens in (1, len(x)):
        y = torch.cat([native.linear(part, packed, None, activation) for part in x.split(tokens)])
        error = (y.double() - native.activate(x.double(), activation)).abs()
        assert (error <= 3e-7 * (1 + x.abs())).all()


def test_nan_and_infinity_reach_only_their_own_outputs() -> None:
    values, offsets, dense = weight(20, 64, 1, 8, torch.float32)
    x = torch.randn(30, 64)
    x[3, 5], x[9, 7] = math.nan, math.inf
    y = native.linear(x, native.prepare(values, offsets, 20, 64, 1, 8))
    touched = torch.zeros(30, 20, dtype=torch.bool)
    touched[3], touched[9] = dense[:, 5] != 0, dense[:, 7] != 0
    assert touched.any()
    assert torch.equal(~y.isfinite(), touched)


def test_bfloat16_outputs_round_to_nearest_even(threads: int) -> None:
    packed = native.prepare(
        torch.ones(40, 2, dtype=torch.bfloat16), torch.tensor([[0, 1]] * 40, dtype=torch.uint8), 40, 2, 2, 2
    )
    ulp = 2.0**-7
    x = torch.tensor([[1.0, ulp / 2], [1.0, 1.5 * ulp], [1.0, 0.75 * ulp], [-1.0, -ulp / 2]]).bfloat16()
    expected = torch.tensor([1.0, 1 + 2 * ulp, 1 + ulp, -1.0]).bfloat16()
    for copies in (1, 60):
        y = native.linear(x.repeat(copies, 1), packed)
        assert torch.equal(y, expected.repeat(copies)[:, None].expand(-1, 40))


# ---------------------------------------------------------------------------------------------- refusals
def test_problems_of_a_weight_are_collected() -> None:
    with pytest.raises(ValueError, match=r"values have shape \(3, 2\).*offsets have dtype torch.int64"):
        native.prepare(torch.ones(3, 2), torch.zeros(3, 4, dtype=torch.int64), 3, 16, 1, 4)
    with pytest.raises(ValueError, match=r"values have dtype torch\.float64"):
        native.prepare(torch.ones(3, 4).double(), torch.zeros(3, 4, dtype=torch.uint8), 3, 16, 1, 4)
    with pytest.raises(ValueError, match="pattern 5:4"):
        native.prepare(torch.ones(3, 4), torch.zeros(3, 4, dtype=torch.uint8), 3, 16, 5, 4)


@pytest.mark.parametrize(("at", "offset"), [((0, 0), 4), ((2, 3), 255), ((1, 4), 2)])
def test_an_offset_outside_its_block_never_reaches_a_kernel(at: tuple[int, int], offset: int) -> None:
    offsets = torch.zeros(3, 5, dtype=torch.uint8)
    native.prepare(torch.ones(3, 5), offsets, 3, 18, 1, 4)  # four whole blocks and one of two
    offsets[at] = offset
    with pytest.raises(ValueError, match="outside its block"):
        native.prepare(torch.ones(3, 5), offsets, 3, 18, 1, 4)


def test_calls_that_do_not_fit_are_refused() -> None:
    packed = native.prepare(torch.ones(3, 4), torch.zeros(3, 4, dtype=torch.uint8), 3, 16, 1, 4)
    x = torch.ones(2, 16)
    with pytest.raises(ValueError, match="in_features = 16"):
        native.linear(torch.ones(2, 15), packed)
    with pytest.raises(ValueError, match="in_features = 16"):
        native.linear(torch.tensor(1.0), packed)
    with pytest.raises(TypeError, match="bfloat16"):
        native.linear(x.bfloat16(), packed)
    with pytest.raises(TypeError, match="bias"):
        native.linear(x, packed, torch.ones(3).double())
    with pytest.raises(ValueError, match="bias has shape"):
        native.linear(x, packed, torch.ones(4))
    with pytest.raises(ValueError, match="activation"):
        native.linear(x, packed, None, "tanh")  # type: ignore[arg-type]  # wrong on purpose
    for out in (torch.ones(2, 4), torch.ones(3, 3), torch.ones(2, 3).double(), torch.ones(3, 2).T):
        with pytest.raises(ValueError, match="out "):
            native.linear(x, packed, out=out)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="no backward"):
        native.linear(x.requires_grad_(), packed)


def test_the_operator_refuses_what_would_read_beyond_x() -> None:
    layer = Layer()
    with pytest.raises(ValueError, match="in_features = 32"):
        layer(torch.ones(3, 31))
    with pytest.raises(ValueError, match="values have shape"):
        torch.ops.nmflow.linear(torch.ones(3, 64), layer.values, layer.offsets, None, 20, 64, 1, 8, None)
    layer(torch.ones(3, 32))
    with pytest.raises(ValueError, match="values have shape"):
        torch.ops.nmflow.linear(torch.ones(3, 64), layer.values, layer.offsets, None, 20, 64, 1, 8, None)


def test_what_does_not_run_here_says_so() -> None:
    assert native.why_not(device="cpu", dtype=torch.float32, shape=(4, 4), n=1, m=4, tokens=1) is None
    assert "cuda" in str(native.why_not(device="cuda"))
    assert "float16" in str(native.why_not(dtype=torch.float16))
    assert "65537" in str(native.why_not(m=65537))


# ------------------------------------------------------------------------------------ compile and export
class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        values, offsets, self.dense = weight(20, 32, 1, 8, torch.float32)
        self.register_buffer("values", values)
        self.register_buffer("offsets", offsets)
        self.bias = nn.Parameter(torch.randn(20), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.nmflow.linear(x, self.values, self.offsets, self.bias, 20, 32, 1, 8, "gelu")

    def expected(self, x: Tensor) -> Tensor:
        return F.gelu(x.double() @ self.dense.T + self.bias.double())


def test_the_operator_is_what_torch_wants_of_one() -> None:
    layer, x = Layer(), torch.randn(3, 2, 32)
    arguments = (x, layer.values, layer.offsets, layer.bias, 20, 32, 1, 8, "relu")
    operators.opcheck(torch.ops.nmflow.linear.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_export_passes_through() -> None:
    layer, x = Layer(), torch.randn(3, 32)
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("tokens", min=2)},))
    assert any(node.target is torch.ops.nmflow.linear.default for node in exported.graph.nodes)
    for tokens in (3, 50):
        x = torch.randn(tokens, 32)
        assert gap(exported.module()(x), layer.expected(x)) <= 1e-5


def test_compile_passes_through_without_a_break() -> None:
    layer = Layer()
    packed = native.prepare(layer.values, layer.offsets, 20, 32, 1, 8)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        return layer(x), native.linear(x * 1, packed, layer.bias, "gelu")

    x = torch.randn(5, 32)
    for y in both(x):
        assert gap(y, layer.expected(x)) <= 1e-5


def test_the_operator_sees_a_weight_that_was_changed_in_place() -> None:
    layer, x = Layer(), torch.randn(3, 32)
    before = layer(x)
    layer.values.mul_(0.0)
    assert not torch.equal(before, layer(x))
    assert torch.allclose(layer(x), F.gelu(layer.bias).expand(3, 20), atol=1e-6)


# --------------------------------------------------------------------------------------------- the plan
def test_tuning_keeps_a_choice_that_is_used_and_right(threads: int) -> None:
    values, offsets, dense = weight(64, 64, 1, 8, torch.float32)
    packed = native.prepare(values, offsets, 64, 64, 1, 8)
    times = native_tune.tune(packed, 20, seconds=0.01)
    key = Key(64, 64, 1, 8, "float32", bucket(20), threads)
    assert native.plan.choices[key] == min(times, key=lambda tiling: times[tiling])
    x = torch.randn(20, 64)
    assert gap(native.linear(x, packed), x.double() @ dense.T) <= 1e-5
    for tiling in times:
        native.plan.choose(key, tiling)
        reason = native.why_dense((64, 64), 1, 8, torch.float32, 17)
        assert (reason is not None) == (tiling == DENSE)
        used = tiling if reason is None else default_tiling(key, packed.forms.rv_reach())
        assert packed.forms.tiling(17, threads) == used
        assert gap(native.linear(x, packed), x.double() @ dense.T) <= 1e-5


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    plan = NativePlan({Key(8, 16, 2, 4, "bfloat16", 3, 2): Tiling("tb", 64, 32, 64, "tokens")})
    plan.save(tmp_path / "plan.json")
    assert NativePlan.load(tmp_path / "plan.json") == plan
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    assert (tmp_path / "plan.json").stat().st_mode & 0o777 == 0o666 & ~umask(), "others may read it, where files are so"
    with pytest.raises(IsADirectoryError, match="name a file"):
        plan.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def umask() -> int:
    now = os.umask(0)
    os.umask(now)
    return now


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"version": 2', '"version": 9'),
        ("native-plan", "recipe"),
        ('"tb"', '"qr"'),
        ('"chunk": 64', '"chunk": 63'),
        ('"chunk": 64', '"chunk": "64"'),
        ('"tile_rows": 64', '"tile_rows": 0'),
        ('"m": 4', '"q": 4'),
        ('"m": 4', '"m": 0'),
        ('"m": 4', '"m": "4"'),
        ('"m": 4', '"m": null'),
        ('"n": 2', '"n": true'),
        ('"out_features": 8', '"out_features": "8"'),
        ('"bucket": 3', '"bucket": [3]'),
        ('"bfloat16"', "{}"),
        ('"chunk": 64', '"chunk": 0'),
        ('"chunk": 64', f'"chunk": {1 << 32}'),
        ('"tile_tokens": 32', f'"tile_tokens": {1 << 32}'),
        ('"choices": [', '"choices": [' + "[" * 100_000),
    ],
)
def test_a_plan_that_is_none_is_refused(old: str, new: str) -> None:
    text = NativePlan({Key(8, 16, 2, 4, "bfloat16", 3, 2): Tiling("tb", 64, 32, 64, "tokens")}).to_json()
    assert old in text
    with pytest.raises(ValueError, match=r"plan|tiling"):
        NativePlan.from_json(text.replace(old, new))


@pytest.mark.parametrize("isa", HERE[:-1])
def test_a_plan_of_a_machine_with_other_kernels_is_not_followed(isa: str) -> None:
    values, offsets, dense = weight(40, 64, 1, 32, torch.float32)
    packed = native.prepare(values, offsets, 40, 64, 1, 32, isa=isa)
    choose(packed, 3, Tiling("rv", 32, 8, 1))
    x = torch.randn(3, 64)
    assert gap(native.linear(x, packed), x.double() @ dense.T) <= 1e-5


def test_products_follow_a_plan_that_changed() -> None:
    values, offsets, dense = weight(40, 64, 1, 8, torch.float32)
    packed, x = native.prepare(values, offsets, 40, 64, 1, 8), torch.randn(5, 64)
    key = packed.forms.key(5, torch.get_num_threads())
    for tiling in (Tiling("tb", 8, 16, 64), Tiling("tb", 64, 16, 64)):
        native.plan.choose(key, tiling)
        assert gap(native.linear(x, packed), x.double() @ dense.T) <= 1e-5
        assert ("tb", tiling.chunk) in packed.forms.packed


@pytest.mark.parametrize(("reach", "m", "chunk"), [(8, 4, 4), (8, 8, 0), (128, 4, 4), (128, 8, 8), (128, 16, 0)])
def test_one_token_has_a_form_of_its_own_only_where_indices_get_shorter(reach: int, m: int, chunk: int) -> None:
    assert default_tiling(Key(64, 64, 1, m, "float32", bucket(1), 1), reach).chunk == chunk
    assert default_tiling(Key(64, 64, 1, m, "float32", bucket(4), 1), reach).chunk == chunk
    assert default_tiling(Key(64, 64, 1, m, "float32", bucket(16), 1), reach).chunk == 0


@pytest.mark.parametrize(
    ("n", "m", "tokens", "reach", "way"),
    [
        *[(2, 4, tokens, 128, ("rv", 1)) for tokens in (1, 2, 4, 8, 16)],
        (2, 4, 17, 128, ("rv", 4)),
        (1, 16, 16, 128, ("rv", 1)),
        (1, 32, 4, 128, ("rv", 1)),
        (1, 32, 5, 128, ("rv", 4)),
        (1, 128, 1, 128, ("rv", 1)),
        (1, 128, 8, 128, ("rv", 4)),
        (1, 128, 9, 128, ("tb", 256)),
        (1, 256, 1, 128, ("rv", 4)),  # gathered
        (1, 256, 2, 128, ("tb", 256)),
        (1, 8, 16, 8, ("rv", 1)),  # AVX2
        (1, 16, 16, 8, ("tb", 256)),
        (2, 4, 1, 0, ("tb", 256)),  # portable
    ],
)
def test_a_few_tokens_read_the_weight_in_its_order(
    n: int, m: int, tokens: int, reach: int, way: tuple[str, int]
) -> None:
    tiling = default_tiling(Key(64, 64, n, m, "float32", bucket(tokens), 2), reach)
    assert (tiling.algorithm, tiling.tile_rows) == way


@pytest.mark.parametrize(
    ("rows", "axis", "n", "m", "tokens", "split"),
    [
        (768, 3072, 1, 16, 2048, "tokens"),  # x has 6.3 M numbers, the weight 0.15 M
        (768, 3072, 1, 16, 128, "rows"),  # 0.39 M and 0.15 M
        (3072, 768, 2, 4, 2048, "rows"),  # 1.6 M and 1.2 M
        (16, 64, 1, 32, 64, "rows"),  # too few tokens for two threads
        (0, 64, 1, 4, 2048, "tokens"),
        (8192, 768, 1, 64, 256, "tokens"),  # TB, which would transpose all of x in every thread
    ],
)
def test_threads_share_tokens_where_x_is_far_larger(
    rows: int, axis: int, n: int, m: int, tokens: int, split: Split
) -> None:
    assert default_tiling(Key(rows, axis, n, m, "float32", bucket(tokens), 2), 128).split == split


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 5000), st.integers(1, 400), st.integers(1, 3000), st.sampled_from([0, 8, 128]),
    st.sampled_from(["float32", "bfloat16"]),
)  # fmt: skip
def test_every_tiling_offered_fits_its_weight(axis: int, m: int, tokens: int, reach: int, dtype: str) -> None:
    key = Key(64, axis, max(1, m // 8), m, dtype, bucket(tokens), 2)
    for tiling in [default_tiling(key, reach), *candidates(key, reach)]:
        assert tiling.algorithm == "rv" or (tiling.chunk >= m and tiling.chunk % m == 0)
        assert tiling.algorithm == "tb" or reach
        assert min(tiling.tile_tokens, tiling.tile_rows) >= 1
