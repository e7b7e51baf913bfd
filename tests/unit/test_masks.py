"""Masks and the N:M check against a count over Python numbers, which shares nothing with torch's sorting.

The oracle is the equation of `nm_mask` read aloud: an entry survives if fewer than N entries of its block are
larger, or as large and further left.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nmflow.layout import from_rows, rows_shape, to_rows, write_back
from nmflow.masks import block_counts, is_nm, nm_mask, top_n
from nmflow.pattern import Pattern

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NAN, INF = math.nan, math.inf


# ---------------------------------------------------------------------------------------------- oracle
def larger(a: float, b: float) -> bool:
    """a ranks above b: NaN above everything, +0 and -0 alike."""
    if math.isnan(a) or math.isnan(b):
        return math.isnan(a) and not math.isnan(b)
    return a > b


def survivors(scores: list[float], n: int, m: int) -> list[bool]:
    """The mask of one row by counting, a shorter last block as a block of its own."""
    keep = []
    for i, score in enumerate(scores):
        start = i - i % m
        above = sum(larger(other, score) for other in scores[start : start + m])
        earlier = sum(not larger(other, score) and not larger(score, other) for other in scores[start:i])
        keep.append(above + earlier < n)
    return keep


def lines(shape: tuple[int, ...], dim: int) -> Iterator[list[tuple[int, ...]]]:
    """The indices of every line along `dim`, in order."""
    others = [range(size) for axis, size in enumerate(shape) if axis != dim]
    for fixed in itertools.product(*others):
        yield [(*fixed[:dim], i, *fixed[dim:]) for i in range(shape[dim])]


def conv_lines(shape: tuple[int, ...]) -> Iterator[list[tuple[int, ...]]]:
    """A convolution's reduction axis, one line per output channel: input channels innermost."""
    out, in_, height, width = shape
    for o in range(out):
        yield [(o, i, y, x) for y in range(height) for x in range(width) for i in range(in_)]


def expected_mask(weight: Tensor, n: int, m: int, dim: int = -1, scores: Tensor | None = None) -> Tensor:
    shape = tuple(weight.shape)
    order = conv_lines(shape) if len(shape) == 4 and dim == -1 else lines(shape, dim % len(shape))
    mask = torch.empty(shape, dtype=torch.bool)
    for line in order:
        if scores is None:
            values = [abs(float(weight[index])) for index in line]
        else:
            values = [float(scores[index]) for index in line]
        for index, keep in zip(line, survivors(values, n, m), strict=True):
            mask[index] = keep
    return mask


def tied_weights(shape: tuple[int, ...], dtype: torch.dtype, seed: int, special: bool = True) -> Tensor:
    """Few distinct values, so that ties abound; signed zeros, infinities and NaN among them."""
    values = [0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 0.5]
    if special:
        values += [INF, -INF, NAN]
    rng = random.Random(seed)
    flat = [rng.choice(values) for _ in range(math.prod(shape))]
    return torch.tensor(flat, dtype=torch.float64).reshape(shape).to(dtype)


def test_the_oracle_itself_on_paper() -> None:
    assert survivors([1.0, 3.0, 3.0, 2.0], 1, 4) == [False, True, False, False]
    assert survivors([1.0, NAN, 3.0, NAN], 2, 4) == [False, True, False, True]
    assert survivors([-0.0, 0.0, 5.0], 1, 2) == [True, False, True]


# ---------------------------------------------------------------------------------------------- nm_mask
@pytest.mark.parametrize(
    ("weight", "pattern", "mask"),
    [
        ([3.0, -4.0, 1.0, 1.0], "2:4", [1, 1, 0, 0]),
        ([1.0, 1.0, 1.0, 1.0], "1:4", [1, 0, 0, 0]),
        ([1.0, 1.0, 1.0, 1.0], "3:4", [1, 1, 1, 0]),
        ([-0.0, 0.0, -0.0, 0.0], "2:4", [1, 1, 0, 0]),
        ([0.0, -1.0, 1.0, 0.5], "1:4", [0, 1, 0, 0]),
        ([INF, NAN, -INF, 9.0], "1:4", [0, 1, 0, 0]),
        ([NAN, 1.0, NAN, NAN], "2:4", [1, 0, 1, 0]),
        ([NAN, 1.0, -NAN, 2.0], "3:4", [1, 0, 1, 1]),
        ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], "1:3", [0, 0, 1, 0, 0, 1]),
        ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], "2:3", [0, 1, 1, 0, 1, 1]),
        ([1.0, 2.0, 3.0, 4.0], "dense", [1, 1, 1, 1]),
        ([NAN, 0.0, -INF, 4.0], "4:4", [1, 1, 1, 1]),
    ],
)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_golden_masks(weight: list[float], pattern: str, mask: list[int], dtype: torch.dtype) -> None:
    found = nm_mask(torch.tensor(weight, dtype=dtype), pattern)
    assert found.dtype is torch.bool
    assert found.tolist() == [bool(keep) for keep in mask]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 3, 24), (3, 12, 2, 2)], ids=str)
@pytest.mark.parametrize("nm", [(1, 4), (2, 4), (3, 4), (1, 8), (5, 6), (1, 12), (7, 24), (1, 1), (3, 3)])
def test_ties_zeros_and_nan_as_counted(
    nm: tuple[int, int], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    weight = tied_weights(shape, dtype, seed=sum(shape) + nm[0])
    assert torch.equal(nm_mask(weight, Pattern(*nm)), expected_mask(weight, *nm))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_integer_weights_as_counted(dtype: torch.dtype) -> None:
    low = 0 if dtype is torch.uint8 else -4
    weight = torch.randint(low, 5, (4, 24), generator=torch.Generator().manual_seed(0)).to(dtype)
    for n in (1, 2, 5):
        assert torch.equal(nm_mask(weight, Pattern(n, 6)), expected_mask(weight, n, 6))


@settings(deadline=None)
@given(st.data())
def test_any_pattern_shape_and_axis_as_counted(data: st.DataObject) -> None:
    m = data.draw(st.integers(1, 9), "m")
    n = data.draw(st.integers(1, m), "n")
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=5), "shape"))
    dim = data.draw(st.integers(-len(shape), len(shape) - 1), "dim")
    if not (len(shape) == 4 and dim == -1):
        axis = dim % len(shape)
        shape = (*shape[:axis], data.draw(st.integers(1, 20), "axis"), *shape[axis + 1 :])
    dtype = data.draw(st.sampled_from(FLOATS), "dtype")
    weight = tied_weights(shape, dtype, data.draw(st.integers(0, 2**16), "seed"))
    found = nm_mask(weight, Pattern(n, m), dim, remainder="partial")
    assert torch.equal(found, expected_mask(weight, n, m, dim))


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(0, 2**16), st.sampled_from(FLOATS))
def test_signed_scores_replace_the_magnitudes(n: int, seed: int, dtype: torch.dtype) -> None:
    weight = tied_weights((3, 12), dtype, seed)
    scores = tied_weights((3, 12), torch.float32, seed + 1)
    found = nm_mask(weight, Pattern(n, 6), scores=scores)
    assert torch.equal(found, expected_mask(weight, n, 6, scores=scores))


def test_scores_follow_the_weight_to_every_axis() -> None:
    weight, scores = (tied_weights((3, 8, 2, 2), torch.float32, seed) for seed in (1, 2))
    for dim in (-1, 1, -3):
        found = nm_mask(weight, "1:4", dim, scores)
        assert torch.equal(found, expected_mask(weight, 1, 4, dim, scores))


def test_scores_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(4, 4\).*\(4, 8\)"):
        nm_mask(torch.zeros(4, 8), "1:4", scores=torch.zeros(4, 4))


def test_blocks_of_a_convolution_run_along_input_channels_of_one_pixel() -> None:
    weight = torch.zeros(1, 4, 1, 2)                              # [out, in, kH, kW]
    weight[0, :, 0, 0] = torch.tensor([1.0, 2.0, 4.0, 3.0])       # block of the left pixel
    weight[0, :, 0, 1] = torch.tensor([9.0, 8.0, 7.0, 6.0])       # block of the right pixel
    mask = nm_mask(weight, "1:4")
    assert mask[0, :, 0, 0].tolist() == [False, False, True, False]
    assert mask[0, :, 0, 1].tolist() == [True, False, False, False]


@pytest.mark.parametrize("shape", [(2, 3, 3, 3), (4, 1, 3, 3), (3, 5, 1, 1), (1, 6, 2, 5)], ids=str)
def test_a_convolution_with_an_odd_axis_has_one_tail_a_row(shape: tuple[int, ...]) -> None:
    weight = tied_weights(shape, torch.float32, seed=3)
    for n, m in ((1, 4), (2, 4), (2, 7), (1, 64)):
        found = nm_mask(weight, Pattern(n, m), remainder="partial")
        assert torch.equal(found, expected_mask(weight, n, m))
        axis = math.prod(shape[1:])
        assert found.sum().item() == shape[0] * (axis // m * n + min(n, axis % m))


def test_a_named_dim_of_four_dimensions_is_taken_as_it_is() -> None:
    weight = tied_weights((2, 3, 4, 8), torch.float32, seed=4)
    assert torch.equal(nm_mask(weight, "2:4", dim=3), expected_mask(weight, 2, 4, dim=3))
    assert not torch.equal(nm_mask(weight, "2:4", dim=3), nm_mask(weight, "2:4"))


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "channels_last", "offset"])
def test_memory_layout_makes_no_difference(layout: str) -> None:
    base = tied_weights((8, 16, 2, 2), torch.float32, seed=5)
    weight = {
        "transposed": lambda: base[..., 0, 0].t(),
        "strided": lambda: base[::2, ::2, 0, 1],
        "expanded": lambda: base[:1, :, 0, 0].expand(4, 16),
        "channels_last": lambda: base.to(memory_format=torch.channels_last),
        "offset": lambda: base.reshape(-1)[3:131].reshape(8, 16),
    }[layout]()
    before = weight.clone()
    mask = nm_mask(weight, "1:4")
    assert torch.equal(mask, nm_mask(weight.clone(memory_format=torch.contiguous_format), "1:4"))
    assert torch.equal(mask, expected_mask(weight, 1, 4))
    assert mask.is_contiguous()
    assert torch.equal(weight.nan_to_num(7.0), before.nan_to_num(7.0))   # the weight is only read


@pytest.mark.parametrize(
    "shape", [(0,), (0, 8), (8, 0), (0, 0), (2, 0, 8), (0, 4, 3, 3), (4, 0, 3, 3)], ids=str
)
def test_nothing_to_keep_in_an_empty_weight(shape: tuple[int, ...]) -> None:
    weight = torch.zeros(shape)
    for pattern in ("1:4", "2:4", "dense"):
        assert nm_mask(weight, pattern).shape == weight.shape
        assert is_nm(weight, pattern)


def test_a_scalar_is_one_entry() -> None:
    assert nm_mask(torch.tensor(0.0), "1:4", remainder="partial").tolist() is True
    assert is_nm(torch.tensor(3.0), "dense")


def test_the_mask_is_no_part_of_a_graph() -> None:
    weight = torch.nn.Parameter(torch.arange(8.0))
    scores = (weight * 2).requires_grad_()
    assert not nm_mask(weight, "1:4").requires_grad
    assert not nm_mask(weight, "1:4", scores=scores).requires_grad


@settings(deadline=None)
@given(st.integers(0, 2**16), st.integers(1, 8), st.floats(-1e3, 1e3).filter(lambda x: abs(x) > 1e-3))
@example(0, 3, -1.0)
def test_a_mask_does_not_see_scale_or_sign(seed: int, n: int, scale: float) -> None:
    weight = tied_weights((4, 16), torch.float64, seed, special=False)
    mask = nm_mask(weight, Pattern(n, 8))
    assert torch.equal(nm_mask(weight * scale, Pattern(n, 8)), mask)
    assert torch.equal(nm_mask(weight * mask, Pattern(n, 8)) & (weight != 0), mask & (weight != 0))


@settings(deadline=None)
@given(st.integers(0, 2**16), st.integers(1, 7))
def test_masks_of_one_block_are_nested(seed: int, n: int) -> None:
    weight = tied_weights((4, 16), torch.float32, seed)
    fewer, more = nm_mask(weight, Pattern(n, 8)), nm_mask(weight, Pattern(n + 1, 8))
    assert not (fewer & ~more).any()
    assert (more.sum() - fewer.sum()).item() == 4 * 2


# ------------------------------------------------------------------------------------------- remainders
@pytest.mark.parametrize("axis", [1, 2, 3, 5, 7, 9, 11])
def test_a_remainder_is_refused_with_the_ways_out(axis: int) -> None:
    for check in (nm_mask, is_nm):
        with pytest.raises(ValueError, match=f"{axis} entries, 4 does not divide it") as error:
            check(torch.zeros(2, axis), "1:4")
        assert 'remainder="partial"' in str(error.value)
        assert 'remainder="skip"' in str(error.value)


@pytest.mark.parametrize("axis", [1, 3, 5, 8, 11])
def test_partial_keeps_what_a_short_block_holds(axis: int) -> None:
    weight = tied_weights((3, axis), torch.float32, seed=axis)
    for n in (1, 2, 3):
        found = nm_mask(weight, Pattern(n, 4), remainder="partial")
        assert torch.equal(found, expected_mask(weight, n, 4))
        assert is_nm(torch.where(found, 1.0, 0.0), Pattern(n, 4), remainder="partial")


@pytest.mark.parametrize("axis", [1, 3, 5, 8, 11])
def test_skip_leaves_an_odd_axis_dense(axis: int) -> None:
    mask = nm_mask(torch.ones(3, axis), "1:4", remainder="skip")
    assert bool(mask.all()) == (axis % 4 != 0)
    assert is_nm(torch.ones(3, axis), "1:4", remainder="skip") == (axis % 4 != 0)


@pytest.mark.parametrize("check", [nm_mask, is_nm])
def test_an_unknown_remainder_is_refused(check: object) -> None:
    with pytest.raises(ValueError, match=r'"drop".*error, partial, skip'):
        check(torch.zeros(2, 5), "1:4", remainder="drop")  # type: ignore[operator]  # options vary


def test_blocks_never_run_on_into_the_next_row() -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0], [9.0, 8.0, 7.0]])
    mask = nm_mask(weight, "1:2", remainder="partial")
    assert mask.tolist() == [[False, True, True], [True, False, True]]


# ------------------------------------------------------------------------------------------------ is_nm
def nonzeros_fit(tensor: Tensor, n: int, m: int, dim: int) -> bool:
    shape = tuple(tensor.shape)
    order = conv_lines(shape) if len(shape) == 4 and dim == -1 else lines(shape, dim % len(shape))
    for line in order:
        for start in range(0, len(line), m):
            if sum(float(tensor[index]) != 0 for index in line[start : start + m]) > n:
                return False
    return True


@settings(deadline=None)
@given(st.data())
def test_the_check_counts_nonzeros_block_by_block(data: st.DataObject) -> None:
    m = data.draw(st.integers(1, 6), "m")
    n = data.draw(st.integers(1, m), "n")
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4), "shape"))
    dim = data.draw(st.integers(-len(shape), len(shape) - 1), "dim")
    size = math.prod(shape)
    entry = st.sampled_from([0.0, 0.0, 0.0, -0.0, 1.0, 1e-40, NAN])
    tensor = torch.tensor(data.draw(st.lists(entry, min_size=size, max_size=size))).reshape(shape)
    expected = nonzeros_fit(tensor, n, m, dim)
    assert is_nm(tensor, Pattern(n, m), dim, remainder="partial") == expected


@pytest.mark.parametrize(
    ("row", "pattern", "answer"),
    [
        ([0.0, 2.0, 0.0, 0.0], "1:4", True),
        ([1e-30, 2.0, 0.0, 0.0], "1:4", False),                   # nearly zero is not zero
        ([0.0, 2.0, NAN, 0.0], "1:4", False),                     # NaN is not zero
        ([-0.0, 2.0, -0.0, 0.0], "1:4", True),
        ([1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], "1:4", False), # enough zeros, in the wrong block
        ([1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0], "1:4", True),
        ([0.0, 0.0, 0.0, 0.0], "1:4", True),                      # fewer than N may be left
        ([1.0, 1.0, 1.0, 1.0], "dense", True),
    ],
)
def test_golden_answers(row: list[float], pattern: str, answer: bool) -> None:
    assert is_nm(torch.tensor(row), pattern) is answer


@settings(deadline=None)
@given(st.integers(0, 2**16), st.integers(1, 5), st.sampled_from(FLOATS))
def test_one_more_nonzero_is_found(seed: int, n: int, dtype: torch.dtype) -> None:
    weight = torch.randn(4, 24, generator=torch.Generator().manual_seed(seed)).to(dtype)
    weight = weight + torch.where(weight >= 0, 1, -1).to(dtype)   # no zero by chance
    pruned = torch.where(nm_mask(weight, Pattern(n, 6)), weight, 0)
    assert is_nm(pruned, Pattern(n, 6))
    zeros = (pruned == 0).nonzero()
    row, column = zeros[seed % len(zeros)].tolist()
    pruned[row, column] = 1e-7
    assert not is_nm(pruned, Pattern(n, 6))


# ------------------------------------------------------------------------------- rows, counts and layout
@pytest.mark.parametrize(
    ("shape", "layout"),
    [((5, 8), "rows"), ((5, 8), "columns"), ((3, 4, 2, 2), "conv"), ((3, 4, 5), "conv"), ((2, 3, 4), "rows"),
     ((7,), "rows"), ((7,), "columns"), ((), "rows")],
)
def test_rows_are_the_lines_of_the_reduction_axis_and_come_back(shape: tuple[int, ...], layout: str) -> None:
    weight = torch.arange(float(math.prod(shape))).reshape(shape)
    rows = to_rows(weight, layout)  # type: ignore[arg-type]  # from a table
    assert tuple(rows.shape) == rows_shape(shape, layout)  # type: ignore[arg-type]  # from a table
    if len(shape) == 4:
        expected = [[weight[index].item() for index in line] for line in conv_lines(shape)]
    elif len(shape) == 3 and layout == "conv":
        out, in_, width = shape
        expected = [[weight[o, i, x].item() for x in range(width) for i in range(in_)] for o in range(out)]
    elif len(shape) >= 2:
        dim = 0 if layout == "columns" else len(shape) - 1
        expected = [[weight[index].item() for index in line] for line in lines(shape, dim)]
    else:
        expected = [weight.reshape(-1).tolist()]
    assert rows.tolist() == expected
    assert torch.equal(from_rows(rows, shape, layout), weight)  # type: ignore[arg-type]  # from a table


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(3, 4, 2, 2),
        torch.zeros(3, 4, 1, 1),
        torch.zeros(3, 4, 2, 2).to(memory_format=torch.channels_last),
        torch.zeros(0, 4, 2, 2),
    ],
    ids=["a-copy", "a-view", "channels-last", "empty"],
)
def test_what_is_written_into_rows_stands_in_the_tensor(tensor: Tensor) -> None:
    values = torch.arange(float(tensor.numel())).reshape(rows_shape(tuple(tensor.shape), "conv"))
    rows = to_rows(tensor, "conv")
    rows.copy_(values)
    write_back(rows, tensor, "conv")
    found = [[tensor[index].item() for index in line] for line in conv_lines(tuple(tensor.shape))]
    assert found == values.tolist()


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(0, 30), st.integers(0, 2**16))
def test_block_counts_as_counted(m: int, axis: int, seed: int) -> None:
    rows = tied_weights((3, axis), torch.float32, seed)
    counts = block_counts(rows, Pattern(1, m))
    expected = [
        [sum(value != 0 for value in row[start : start + m]) for start in range(0, axis, m)]
        for row in rows.tolist()
    ]
    assert counts.reshape(3, -1).tolist() == expected


def test_a_block_longer_than_its_axis_takes_no_memory_of_its_own() -> None:
    """A terabyte, were a row filled up to M."""
    rows = torch.tensor([[1.0, 0.0, 2.0]]).expand(1000, 3)
    counts = block_counts(rows, Pattern(1, 2**30))
    assert counts.shape == (1000, 1)
    assert counts.eq(2).all()


def test_top_n_of_one_agrees_with_its_shortcut() -> None:
    scores = tied_weights((50, 7), torch.float32, seed=6)
    for n in range(1, 8):
        expected = [survivors(row, n, 7) for row in scores.tolist()]
        assert top_n(scores, n).tolist() == expected
