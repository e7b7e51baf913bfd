"""The native projection against a stable sort, block by block, and against the bits it must leave alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from projections import BITS, NAN, convolution, lying, rows_of, same_bits, survivors, weights
from torch import Tensor, nn

from nmflow import Sparsifier, ops
from nmflow.attach import attached_weights
from nmflow.layout import to_rows
from nmflow.masks import REMAINDERS, nm_mask
from nmflow.ops import native_library, native_project, projection
from nmflow.ops.native_project import LARGEST_M, project_native, why_not
from nmflow.pattern import Pattern

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"no native projection: {why_not()}")

BEST = 0 if why_not() else native_library.loaded().best_isa
ISAS = native_library.ISAS[: BEST + 1]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LIE = ["rows", "columns"]
"""Whether the entries of a row, or else the rows, are neighbours in memory."""
EXAMPLES = int(os.environ.get("NMFLOW_TEST_EXAMPLES", 120))                 # fewer where sanitizers slow everything

# Every method of native/project_select.hpp, in the widths of every instruction set.
PATTERNS = [
    *("1:2", "1:4", "2:4", "3:4", "1:8", "4:8", "7:8", "1:16", "4:16", "8:16", "15:16"),
    *("1:32", "4:32", "1:48", "8:64", "1:128", "16:128", "64:128", "127:128"),
    *("1:3", "3:5", "5:7", "2:6", "9:19", "17:33", "20:40", "30:48", "31:47", "40:47", "100:300", "6:6", "dense"),
]


# ---------------------------------------------------------------------------------------------- oracle and data
def packed(mask_RK: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(mask_RK.contiguous().numpy(), axis=1, bitorder="little"))


def check(w_RK: Tensor, pattern: str, decay: float, isa: str = "auto", lie: str = "rows") -> None:
    """Projects into poisoned outputs and compares mask, flips, W~ and bits with the oracle. W lies as `lie` says."""
    form = Pattern.parse(pattern)
    keep = survivors(w_RK, form.n, form.m, form.v)
    before = torch.rand(w_RK.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    mask, effective = lying(before, lie).clone(), lying(torch.full_like(w_RK, NAN), lie)
    bits = torch.full((len(w_RK), -(-w_RK.shape[1] // 8)), 0xA5, dtype=torch.uint8)
    flips = project_native(w_RK, form, decay, "partial", mask, effective, bits_RB=bits, isa=isa)
    assert torch.equal(mask, keep), f"mask of {pattern}"
    assert torch.equal(mask.view(torch.uint8), keep.view(torch.uint8))      # True is 1, not merely non-zero
    assert flips == int((before != keep).sum())
    assert torch.equal(effective[keep].view(BITS[w_RK.dtype]), w_RK[keep].view(BITS[w_RK.dtype]))
    assert same_bits(effective[~keep], w_RK[~keep] * decay if decay else torch.zeros_like(w_RK[~keep]))
    assert torch.equal(bits, packed(keep))


def check_convolution(w_RK: Tensor, taps: int, pattern: str, decay: float, isa: str = "auto") -> None:
    """The same for a convolution's weight, of which `w_RK` are the rows."""
    form = Pattern.parse(pattern)
    keep = survivors(w_RK, form.n, form.m, form.v)
    before = torch.rand(w_RK.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    w, mask = convolution(w_RK, taps), convolution(before, taps)
    assert w.is_contiguous()
    effective, cast = torch.full_like(w, NAN), torch.full_like(w, NAN, dtype=torch.bfloat16)
    bits = torch.full((len(w), -(-w_RK.shape[1] // 8)), 0xA5, dtype=torch.uint8)
    narrow = cast if w.dtype == torch.float32 else None
    flips = project_native(w, form, decay, "partial", mask, effective, narrow, bits, isa=isa)
    assert torch.equal(rows_of(mask.view(torch.uint8)), keep.view(torch.uint8)), f"mask of {pattern}, {taps} taps"
    assert flips == int((before != keep).sum())
    assert torch.equal(rows_of(effective)[keep].view(BITS[w.dtype]), w_RK[keep].view(BITS[w.dtype]))
    assert same_bits(rows_of(effective)[~keep], w_RK[~keep] * decay if decay else torch.zeros_like(w_RK[~keep]))
    assert narrow is None or same_bits(narrow, effective.bfloat16())
    assert torch.equal(bits, packed(keep))


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------ exactness
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_it_is_the_stable_sort(pattern: str, isa: str, dtype: torch.dtype) -> None:
    m = Pattern.parse(pattern).m
    for kind, decay in [("random", 0.37), ("tied", 0.0), ("special", 0.0), ("special", 0.37), ("tied", 1.0)]:
        for axis in (32 * m if m <= 32 else 18 * m, 5 * m + m // 2 + 1):    # full vectors; a short last block
            check(weights(kind, 2, axis, dtype), pattern, decay, isa)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_it_is_the_stable_sort_of_columns(pattern: str, isa: str, dtype: torch.dtype) -> None:
    m = Pattern.parse(pattern).m
    for kind, decay, rows in [("random", 0.37, 64), ("tied", 0.0, 67), ("special", 0.37, 3)]:
        for axis in (64 * m if m <= 8 else 2 * m, 5 * m + m // 2 + 1):      # a panel as one row; a short last block
            check(lying(weights(kind, rows, axis, dtype), "columns"), pattern, decay, isa, "columns")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_it_is_the_stable_sort_of_convolutions(pattern: str, isa: str, dtype: torch.dtype) -> None:
    m = Pattern.parse(pattern).m
    for kind, decay, taps in [("random", 0.37, 9), ("tied", 0.0, 9), ("special", 0.37, 25), ("special", 0.0, 2)]:
        for channels in (2 * m if m > 8 else 64, m // 2 + 1):               # blocks within a tap; over several
            check_convolution(weights(kind, 3, taps * channels, dtype), taps, pattern, decay, isa)


SHARED = ["1:4v2", "2:4v4", "1:8v64", "1:16v16", "4:16v8", "3:5v4", "16:128v32", "100:300v16", "6:6v8", "1:32v128"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("pattern", SHARED)
def test_rows_that_share_their_columns_are_added_and_sorted(pattern: str, isa: str, dtype: torch.dtype) -> None:
    m, v = Pattern.parse(pattern).m, Pattern.parse(pattern).v
    for kind, decay, rows in [("random", 0.37, 2 * v), ("tied", 0.0, v + 3), ("special", 0.37, v // 2 + 1)]:
        for axis in (16 * m if m <= 32 else 18 * m, 5 * m + m // 2 + 1):    # full vectors; a short last block
            check(weights(kind, rows, axis, dtype), pattern, decay, isa)
            if 64 % v == 0:
                check(lying(weights(kind, rows, axis, dtype), "columns"), pattern, decay, isa, "columns")
        check_convolution(weights(kind, rows, 9 * (m // 2 + 1), dtype), 9, pattern, decay, isa)


@pytest.mark.parametrize("isa", ISAS)
def test_sums_are_taken_in_float32_and_in_row_order(isa: str) -> None:
    """All of half's numbers and pairs of them; then three that sum to the most only if the small ones come first."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16)
    others = numbers[torch.randperm(2**16, generator=torch.Generator().manual_seed(0))]
    for pair in (numbers, torch.zeros_like(numbers)), (numbers, others):
        check(torch.stack(pair), "3:5v2", 0.0, isa)                         # denormals and others in one block
    for lie in LIE:
        w = torch.tensor([[1.0, 2.0**24], [1.0, 1.0], [2.0**24, 1.0]])      # 2**24 + 2 and, by two roundings, 2**24
        mask = lying(torch.zeros(3, 2, dtype=torch.bool), lie)
        project_native(lying(w, lie), Pattern(1, 2, 4), 0.0, "partial", mask, None, isa=isa)
        assert mask.tolist() == [[True, False]] * 3


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    rows=st.integers(1, 9),
    channels=st.integers(1, 70),
    taps=st.integers(2, 50),
    nm=st.integers(1, 140).flatmap(lambda m: st.tuples(st.integers(1, m), st.just(m))),
    v=st.just(1) | st.integers(2, 12),
    kind=st.sampled_from(["random", "tied", "special"]),
    dtype=st.sampled_from(DTYPES),
    decay=st.sampled_from([0.0, 0.37, 1.0]),
    isa=st.sampled_from(ISAS),
    seed=st.integers(0, 99),
)
def test_any_convolution(
    rows: int,
    channels: int,
    taps: int,
    nm: tuple[int, int],
    v: int,
    kind: str,
    dtype: torch.dtype,
    decay: float,
    isa: str,
    seed: int,
) -> None:
    w = weights(kind, rows, taps * channels, dtype, seed)
    check_convolution(w, taps, f"{nm[0]}:{nm[1]}v{v}", decay, isa)


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    lie=st.sampled_from(LIE),
    rows=st.integers(1, 4) | st.integers(60, 140),
    axis=st.integers(1, 300),
    nm=st.integers(1, 140).flatmap(lambda m: st.tuples(st.integers(1, m), st.just(m))),
    v=st.just(1) | st.sampled_from([2, 4, 8, 16, 32, 64]) | st.integers(2, 200),
    kind=st.sampled_from(["random", "tied", "special"]),
    dtype=st.sampled_from(DTYPES),
    decay=st.sampled_from([0.0, 0.37, 1.0]),
    isa=st.sampled_from(ISAS),
    gap=st.integers(0, 9),
    seed=st.integers(0, 99),
)
def test_any_shape_pattern_and_stride(
    lie: str,
    rows: int,
    axis: int,
    nm: tuple[int, int],
    v: int,
    kind: str,
    dtype: torch.dtype,
    decay: float,
    isa: str,
    gap: int,
    seed: int,
) -> None:
    if lie == "rows" or 64 % v:
        lie, w = "rows", weights(kind, rows, axis + gap, dtype, seed)[:, gap // 2 : gap // 2 + axis]
    else:
        w = weights(kind, axis, rows + gap, dtype, seed)[:, gap // 2 : gap // 2 + rows].t()
    check(w, f"{nm[0]}:{nm[1]}v{v}", decay, isa, lie)


@pytest.mark.parametrize("isa", ISAS)
def test_the_longest_block_and_one_longer_than_the_axis(isa: str) -> None:
    for lie in LIE:
        w = lying(weights("random", 2, LARGEST_M + 100, torch.float32), lie)
        check(w, f"{LARGEST_M // 2}:{LARGEST_M}", 0.0, isa, lie)
        check(lying(weights("tied", 2, LARGEST_M - 1, torch.bfloat16), lie), f"9:{LARGEST_M}", 0.0, isa, lie)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_nan_payloads_and_signs_do_not_rank(isa: str, dtype: torch.dtype) -> None:
    top = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}[dtype]
    sign = -(2**31) if dtype == torch.float32 else -(2**15)
    rising = [top + 1, top + 3 + sign, top + 5, top, top + 7]               # the fourth is infinity
    for pattern in ("1:5", "2:5", "3:5", "4:5"):
        w = torch.tensor([rising * 32], dtype=BITS[dtype]).view(dtype)
        for lie in LIE:
            check(lying(w, lie), pattern, 0.0, isa, lie)
    for m in (4, 8, 16, 32, 64, 128):
        for n in {1, 2, m // 2, m - 1}:
            block = torch.arange(m) % 60 + top + 1
            w = block.repeat(48).view(1, -1).to(BITS[dtype]).view(dtype)
            for lie in LIE:
                check(lying(w, lie), f"{n}:{m}", 0.0, isa, lie)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_decay_rounds_every_sixteen_bit_number(isa: str, dtype: torch.dtype) -> None:
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    blocks = torch.stack([torch.full_like(numbers, NAN), numbers], dim=1)   # the NaN is kept, the number pruned
    check(blocks.reshape(-1, 32), "1:2", 0.37, isa)                         # rows joined: by vectors
    check(blocks.reshape(-1, 32), "1:2", 0.37, isa)                         # joined rows
    check(torch.nn.functional.pad(blocks.reshape(-1, 32), (0, 1))[:, :32], "1:2", 0.37, isa)  # one by one


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("pattern", ["2:4", "1:8", "1:128", "16:128"])
def test_equal_magnitudes_keep_the_lowest_index(pattern: str, isa: str) -> None:
    n, m = map(int, pattern.split(":"))
    mask = torch.zeros(3, 2 * m, dtype=torch.bool)
    w = torch.tensor([1.0, -1.0]).repeat(3, m)
    project_native(w, Pattern(n, m), 0.0, "error", mask, torch.empty_like(w), isa=isa)
    assert torch.equal(mask, (torch.arange(2 * m) % m < n).expand(3, -1))


# ---------------------------------------------------------------------------------------------- outputs
@pytest.mark.parametrize("lie", LIE)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_beside_the_outputs_is_written(dtype: torch.dtype, isa: str, lie: str) -> None:
    for axis in (1, 63, 64, 65, 127, 200):
        shape = (5, axis + 140) if lie == "rows" else (axis + 2, 140)
        inside = (slice(1, 4), slice(70, 70 + axis)) if lie == "rows" else (slice(1, 1 + axis), slice(64, 67))
        frame, mask_frame = torch.full(shape, 7.0, dtype=dtype), torch.full(shape, 7, dtype=torch.uint8)
        bits_frame = torch.full((5, axis + 20), 7, dtype=torch.uint8)
        bits = bits_frame[1:4, 9 : 9 + -(-axis // 8)]
        w = lying(weights("random", 3, axis, dtype), lie)
        mask, effective = mask_frame.view(torch.bool)[inside], frame[inside]
        if lie == "columns":
            mask, effective = mask.t(), effective.t()
        project_native(w, Pattern(2, 4), 0.0, "partial", mask, effective, bits_RB=bits, isa=isa)
        keep = survivors(w, 2, 4)
        assert torch.equal(mask, keep)
        assert torch.equal(effective, w * keep)
        assert torch.equal(bits, packed(keep))
        effective.fill_(7.0)
        mask_frame[inside] = bits[:] = 7
        assert bool((frame == 7).all())
        assert bool((mask_frame == 7).all())
        assert bool((bits_frame == 7).all())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_beside_the_outputs_of_a_convolution_is_written(dtype: torch.dtype, isa: str) -> None:
    for channels, taps in ((1, 9), (7, 9), (64, 9), (30, 2)):
        frame = torch.full((5, channels + 2, taps), 7.0, dtype=dtype)
        mask_frame = torch.full(frame.shape, 7, dtype=torch.uint8)
        bits_frame = torch.full((5, channels * taps + 20), 7, dtype=torch.uint8)
        inside, beside = (slice(1, 4), slice(1, 1 + channels)), (slice(1, 4), slice(9, 9 + -(-channels * taps // 8)))
        w_RK = weights("random", 3, channels * taps, dtype)
        mask, effective, bits = mask_frame.view(torch.bool)[inside], frame[inside], bits_frame[beside]
        project_native(convolution(w_RK, taps), Pattern(2, 4), 0.0, "partial", mask, effective, bits_RB=bits, isa=isa)
        keep = survivors(w_RK, 2, 4)
        assert torch.equal(rows_of(mask), keep)
        assert torch.equal(rows_of(effective), w_RK * keep)
        assert torch.equal(bits, packed(keep))
        effective.fill_(7.0)
        mask_frame[inside] = bits[:] = 7
        assert bool((frame == 7).all())
        assert bool((mask_frame == 7).all())
        assert bool((bits_frame == 7).all())


def test_threads_share_the_rows_of_a_convolution(threads: int) -> None:
    check_convolution(weights("random", 190, 9 * 57, torch.float32), 9, "3:7", 0.37)


@pytest.mark.parametrize("isa", ISAS)
def test_a_convolution_that_leaves_the_caches(isa: str) -> None:
    """27 MB of weight and outputs, rows of whole cache lines: written past the caches."""
    w = torch.randn(512, 640, 9, generator=torch.Generator().manual_seed(0))
    blocks = w.transpose(1, 2).reshape(-1, 8).abs()
    keep = (blocks[:, :, None] < blocks[:, None, :]).sum(2).lt(2).view(512, 9, 640).transpose(1, 2)
    mask, effective = torch.ones_like(w, dtype=torch.bool), torch.full_like(w, NAN)
    assert project_native(w, Pattern(2, 8), 0.5, "error", mask, effective, isa=isa) == int((~keep).sum())
    assert torch.equal(mask, keep)
    assert torch.equal(effective, torch.where(keep, w, w * 0.5))


@pytest.mark.parametrize("isa", ISAS)
def test_a_convolution_may_be_its_own_output(isa: str) -> None:
    rows = weights("random", 5, 9 * 48, torch.float32)
    w = convolution(rows, 9)
    project_native(w, Pattern(4, 16), 0.0, "partial", None, w, isa=isa)
    assert torch.equal(rows_of(w), rows * survivors(rows, 4, 16))


@pytest.mark.parametrize("lie", LIE)
@pytest.mark.parametrize("isa", ISAS)
def test_outputs_that_leave_the_caches(isa: str, threads: int, lie: str) -> None:
    w = weights("random", 320, 12288, torch.float32)  # 35 MB with the outputs: streamed
    blocks = w.view(-1, 8).abs()
    later = w.clone()  # here and there the largest entry of a block is gone: the mask changes in two places of 640
    later.view(-1, 8)[::80].scatter_(1, blocks[::80].argmax(1, keepdim=True), 0.0)

    def kept(w: Tensor) -> Tensor:
        blocks = w.view(-1, 8).abs()
        larger = (blocks[:, :, None] < blocks[:, None, :]).sum(2)  # no ties here
        return larger.lt(2).view_as(w)

    mask, effective = lying(torch.ones_like(w, dtype=torch.bool), lie), lying(torch.full_like(w, NAN), lie)
    before = torch.ones_like(mask)
    for step in (w, later, later):
        keep = kept(step)
        flips = project_native(lying(step, lie), Pattern(2, 8), 0.5, "error", mask, effective, isa=isa)
        assert torch.equal(mask, keep)
        assert torch.equal(effective, torch.where(keep, step, step * 0.5))
        assert flips == int((keep ^ before).sum())
        before = keep
    assert flips == 0
    mask.view(torch.uint8).mul_(0xFE)  # what uninitialized memory may hold: set, and not as a bool is
    assert project_native(lying(later, lie), Pattern(2, 8), 0.5, "error", mask, effective, isa=isa) == 0
    assert torch.equal(mask.view(torch.uint8), keep.to(torch.uint8))


@pytest.mark.parametrize("isa", ISAS)
def test_large_weights_whose_rows_share_their_columns(isa: str) -> None:
    check(weights("random", 320, 12288, torch.float32), "2:8v64", 0.37, isa)  # streamed


@pytest.mark.parametrize("lie", LIE)
@pytest.mark.parametrize("pattern", ["2:4", "3:7", "20:40", "2:4v16", "3:7v4"])
def test_threads_share_the_rows(pattern: str, threads: int, lie: str) -> None:
    check(lying(weights("random", 190, 501, torch.float32), lie), pattern, 0.37, lie=lie)


@pytest.mark.parametrize("lie", LIE)
@pytest.mark.parametrize("isa", ISAS)
def test_pieces_that_end_within_a_byte(isa: str, threads: int, lie: str) -> None:
    for pattern in ("3:1001", "998:1001", "200:1001", "200:1001v8"):        # blocks longer than what a word divides
        check(lying(weights("random", 66, 2100, torch.float32), lie), pattern, 0.0, isa, lie)


@pytest.mark.parametrize("lie", LIE)
@pytest.mark.parametrize("isa", ISAS)
def test_a_bfloat16_copy(isa: str, lie: str) -> None:
    w = lying(weights("special", 67, 333, torch.float32), lie)
    effective, cast = torch.empty_like(w), torch.empty_like(w, dtype=torch.bfloat16)
    project_native(w, Pattern(2, 4), 0.37, "partial", None, effective, cast, isa=isa)
    assert same_bits(cast, effective.bfloat16())


@pytest.mark.parametrize("v", [1, 16])
@pytest.mark.parametrize("lie", LIE)
@pytest.mark.parametrize("isa", ISAS)
def test_the_weight_may_be_its_own_output(isa: str, lie: str, v: int) -> None:
    w = lying(weights("random", 70, 500, torch.float32), lie)
    expected = w * survivors(w, 4, 16, v)
    mask = torch.zeros_like(w, dtype=torch.bool)
    project_native(w, Pattern(4, 16, v), 0.0, "partial", mask, w, isa=isa)
    assert torch.equal(w, expected)


@pytest.mark.parametrize("lie", LIE)
@pytest.mark.parametrize("given", range(16))
def test_any_of_the_outputs_may_be_left_out(given: int, lie: str) -> None:
    w = lying(weights("random", 70, 99, torch.float32), lie)
    keep = survivors(w, 1, 8)
    keep = lying(keep, lie)
    expected = {"mask": keep, "effective": w * keep, "cast": (w * keep).bfloat16(), "bits_RB": packed(keep)}
    wanted = {name: value for bit, (name, value) in enumerate(expected.items()) if given >> bit & 1}
    outputs = {name: torch.zeros_like(value) for name, value in wanted.items()}
    everything = {"mask": None, "effective": None, **outputs}
    flips = project_native(w, Pattern(1, 8), 0.0, "partial", **everything)
    assert flips == (int(keep.sum()) if "mask" in outputs else 0)
    for name, output in outputs.items():
        assert torch.equal(output, wanted[name]), name


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 0), (0, 4, 9), (3, 0, 9), (3, 4, 0)])
def test_empty(shape: tuple[int, ...]) -> None:
    w = torch.empty(shape)
    assert project_native(w, Pattern(1, 4), 0.0, "error", torch.empty(shape, dtype=torch.bool), w.clone()) == 0


def test_autograd_sees_that_the_outputs_were_written() -> None:
    w, mask, effective = torch.ones(2, 8), torch.zeros(2, 8, dtype=torch.bool), torch.zeros(2, 8)
    versions = w._version, mask._version, effective._version
    project_native(w, Pattern(1, 4), 0.0, "error", mask, effective)
    assert w._version == versions[0]
    assert mask._version > versions[1]
    assert effective._version > versions[2]


# ------------------------------------------------------------------------------------------------ refusals
def test_the_remainder_is_the_mask_functions() -> None:
    assert REMAINDERS == ("error", "partial", "skip")
    w, mask, effective = torch.randn(2, 9), torch.zeros(2, 9, dtype=torch.bool), torch.full((2, 9), 7.0)
    with pytest.raises(ValueError, match="9 entries, 4 does not divide it"):
        project_native(w, Pattern(2, 4), 0.0, "error", mask, effective)
    assert bool((effective == 7).all())
    with pytest.raises(ValueError, match=r"1:3v4: the weight has 2 rows, 4 does not divide them"):
        project_native(w, Pattern(1, 3, 4), 0.0, "error", mask, effective)
    assert project_native(w, Pattern(2, 4), 0.0, "skip", mask, effective) == 18
    assert bool(mask.all())
    assert torch.equal(effective, w)
    assert project_native(w, Pattern(1, 3, 4), 0.0, "skip", mask, effective) == 0
    assert bool(mask.all())


def test_every_misfit_is_named_before_anything_is_written() -> None:
    w, mask = torch.randn(4, 8), torch.full((4, 8), False)
    with pytest.raises(ValueError, match=r"mask is torch.uint8.*effective has shape \(4, 4\).*cast is torch.float16"):
        project_native(w, Pattern(2, 4), 0.0, "error", mask.byte(), w[:, ::2].clone(), w.half())
    with pytest.raises(ValueError, match="mask: the entries of a row are 4 apart"):
        project_native(w, Pattern(2, 4), 0.0, "error", torch.zeros(8, 4, dtype=torch.bool).t(), w.clone())
    with pytest.raises(ValueError, match=r"w is torch\.float64"):
        project_native(w.double(), Pattern(2, 4), 0.0, "error", mask, w.double())
    with pytest.raises(ValueError, match=r"w has 1 dimensions, not those of \[R, K\] or \[R, C, T\]"):
        project_native(w[0], Pattern(2, 4), 0.0, "error", mask[0], w[0].clone())
    with pytest.raises(ValueError, match="longer than 32768"):
        project_native(w, Pattern(1, LARGEST_M + 1), 0.0, "partial", mask, w.clone())
    with pytest.raises(ValueError, match="cast is for a float32 w"):
        project_native(w.bfloat16(), Pattern(2, 4), 0.0, "error", None, None, w.bfloat16())
    with pytest.raises(ValueError, match="rows of effective overlap"):
        project_native(w, Pattern(2, 4), 0.0, "error", mask, torch.empty(8).expand(4, 8))
    with pytest.raises(ValueError, match="w: the entries of a row are 4 apart"):
        project_native(lying(w, "columns"), Pattern(2, 4), 0.0, "error", mask, None)
    with pytest.raises(ValueError, match="columns of effective overlap"):
        project_native(lying(w, "columns"), Pattern(2, 4), 0.0, "error", None, torch.empty(4).expand(8, 4).t())
    filters, whole = torch.randn(4, 8, 9), torch.zeros(4, 8, 9)
    with pytest.raises(ValueError, match="w: the entries of a row of a convolution lie apart; make it contiguous"):
        project_native(torch.randn(4, 8, 10)[:, :, :9], Pattern(2, 4), 0.0, "error", None, whole)
    with pytest.raises(ValueError, match="rows of effective overlap: they are 0 apart and 72 long"):
        project_native(filters, Pattern(2, 4), 0.0, "error", None, torch.empty(8, 9).expand(4, 8, 9))
    with pytest.raises(ValueError, match="has 72 entries, 5 does not divide it"):
        project_native(filters, Pattern(2, 5), 0.0, "error", None, whole)
    assert not whole.any()
    bits = torch.zeros(4, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"bits has shape \(4, 2\), \(4, 1\) is that of w's mask"):
        project_native(w, Pattern(2, 4), 0.0, "error", mask, None, bits_RB=bits)
    with pytest.raises(ValueError, match="rows of bits overlap"):
        project_native(w, Pattern(2, 4), 0.0, "error", mask, None, bits_RB=bits[:1, :1].expand(4, 1))
    assert not mask.any()


def test_why_not_answers_with_a_reason() -> None:
    assert why_not(device="cpu", dtype=torch.float16, m=128, strides=((64, 1), (99, 1))) is None
    assert why_not(strides=((1, 64), (1, 99))) is None
    assert why_not(m=8, v=1) is None
    assert why_not(m=8, v=3, strides=((64, 1), (99, 1))) is None
    assert why_not(m=8, v=32, strides=((1, 64), (1, 99))) is None
    assert why_not(m=8, v=3, strides=((1, 64), (1, 99)))
    assert why_not(m=8, v=None, strides=((1, 64), (1, 99))) is None
    assert why_not(strides=((72, 9, 1), (99, 9, 1))) is None
    assert why_not(strides=((72, 9, 1), (80, 10, 1)))
    for facts in ({"device": "cuda"}, {"dtype": torch.float64}, {"m": LARGEST_M + 1}, {"strides": ((1, 64), (64, 1))}):
        assert why_not(**facts)


# ------------------------------------------------------------------------------------------------ in training
def gpt2_conv1d() -> nn.Module:
    utils = pytest.importorskip("transformers.pytorch_utils", reason="needs the optional package transformers")
    module: nn.Module = utils.Conv1D(96, 72)
    return module


@pytest.mark.parametrize(
    ("module", "layout"),
    [
        (gpt2_conv1d, "columns"),
        (lambda: nn.Linear(72, 96), "rows"),
        (lambda: nn.Conv2d(24, 70, 3), "conv"),
        (lambda: nn.Conv2d(24, 70, 1), "conv"),
        (lambda: nn.Conv2d(24, 70, 3).to(memory_format=torch.channels_last), "conv"),
    ],
    ids=["Conv1D of GPT-2", "Linear", "Conv2d", "Conv2d 1x1", "Conv2d channels last"],
)
@pytest.mark.parametrize("pattern", ["2:8", "2:8v2"])
def test_the_sparsifier_projects_every_layout_by_the_native_kernel(
    module: Callable[[], nn.Module], layout: str, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(module())
    seen: list[Tensor] = []

    def spied(w_RK: Tensor, *arguments: object) -> int:                     # the kernel itself, and that it was asked
        seen.append(w_RK)
        return project_native(w_RK, *arguments)

    monkeypatch.setattr(native_project, "project_native", spied)
    sparsifier = Sparsifier(model, {"0.weight": pattern}, "ste", 4)
    sparsifier.step()
    ((weight, effective),) = attached_weights(model).values()
    assert [slot.layout for slot in sparsifier.slots] == [layout]
    assert seen
    assert seen[-1].data_ptr() == weight.data_ptr()                         # W where it lies, not a copy
    w = to_rows(weight.detach(), layout)
    mask, expected = torch.zeros_like(w, dtype=torch.bool), torch.empty_like(w)
    projection.project(w, Pattern.parse(pattern), 0.0, "error", mask, expected)
    assert torch.equal(to_rows(effective.mask, layout), mask)
    assert same_bits(to_rows(model[0].weight.detach(), layout), expected)
    assert 0 < int(mask.sum()) < mask.numel()


def test_slots_of_a_fused_weight_are_written_beside_each_other() -> None:
    """Three slots of one weight: each a view of some rows, which are columns in memory."""
    stored = torch.randn(64, 3 * 40, generator=torch.Generator().manual_seed(0))
    w, mask, effective = stored.t(), torch.zeros(64, 120, dtype=torch.bool).t(), torch.zeros(64, 120).t()
    for start in (0, 40, 80):
        rows = slice(start, start + 40)
        assert why_not(strides=(w[rows].stride(), mask[rows].stride(), effective[rows].stride())) is None
        project_native(w[rows], Pattern(1, 4), 0.0, "error", mask[rows], effective[rows])
    assert torch.equal(mask, survivors(w, 1, 4))
    assert torch.equal(effective, w * survivors(w, 1, 4))


def test_panels_that_cut_through_groups_are_left_to_plain_torch() -> None:
    """The registry is told, and whoever calls the native projection itself is refused."""
    w = torch.randn(16, 6).t()
    pattern = Pattern(1, 8, 3)
    mask, effective = torch.zeros(16, 6, dtype=torch.bool).t(), torch.empty(16, 6).t()
    with pytest.raises(ValueError, match="1:8v3: where rows lie next to each other, those that share columns must div"):
        project_native(w, pattern, 0.0, "error", mask, effective)
    facts = {"device": "cpu", "dtype": w.dtype, "m": 8, "strides": (w.stride(),) * 3}
    assert ops.select("project", v=2, **facts).name == "native"
    assert ops.select("project", v=3, **facts).name == "reference"
    flips = ops.project(w, pattern, 0.5, "error", mask, effective)
    assert torch.equal(mask, nm_mask(w, pattern))
    assert torch.equal(effective, torch.where(mask, w, 0.5 * w))
    assert int(flips) == 12
