"""Masks whose V rows share their columns, against loops over Python numbers and float32 additions one at a time.

The oracle adds the magnitudes of a column in the order of the rows, then keeps a column if fewer than N of its block
have a larger sum, or as large a one further left.
"""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nmflow.groups import joined, spread, summed
from nmflow.layout import to_rows
from nmflow.masks import block_counts, is_nm, nm_mask, rows_mask
from nmflow.ops.projection import project
from nmflow.pattern import Pattern

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NAN, INF = math.nan, math.inf
some_nm = st.integers(1, 7).flatmap(lambda m: st.tuples(st.integers(1, m), st.just(m)))


# ---------------------------------------------------------------------------------------------- oracle
def column_scores(rows: list[list[float]], exact: bool) -> list[float]:
    """The sum of every column, rounded to float32 after each row (`exact`: to float64)."""
    dtype = torch.float64 if exact else torch.float32
    sums = []
    for column in zip(*rows, strict=True):
        total = torch.tensor(abs(column[0]), dtype=dtype)
        for value in column[1:]:
            total = total + torch.tensor(abs(value), dtype=dtype)
        sums.append(total.item())
    return sums


def survivors(scores: list[float], n: int) -> list[bool]:
    """The columns of one block that stay, by counting; NaN above everything."""

    def larger(a: float, b: float) -> bool:
        return (math.isnan(a) and not math.isnan(b)) or (not math.isnan(b) and a > b)

    keep = []
    for i, score in enumerate(scores):
        above = sum(larger(other, score) for other in scores)
        earlier = sum(not larger(other, score) and not larger(score, other) for other in scores[:i])
        keep.append(above + earlier < n)
    return keep


def expected_rows_mask(rows: Tensor, n: int, m: int, v: int) -> list[list[bool]]:
    mask: list[list[bool]] = []
    values = rows.double().tolist()
    for top in range(0, len(values), v):
        group = values[top : top + v]
        keep: list[bool] = []
        for start in range(0, rows.shape[1], m):
            block = [row[start : start + m] for row in group]
            keep += survivors(column_scores(block, rows.dtype == torch.float64), n)
        mask += [keep] * len(group)
    return mask


def tied(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Few distinct values, so that sums tie; signed zeros, infinities and NaN among them."""
    rng = random.Random(seed)
    values = [0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 0.5] + [INF, -INF, NAN] * (seed % 3 == 0)
    flat = [rng.choice(values) for _ in range(math.prod(shape))]
    return torch.tensor(flat, dtype=torch.float64).reshape(shape).to(dtype)


# ---------------------------------------------------------------------------------------------- masks
def check_masks(seed: int, v: int, nm: tuple[int, int], shape: tuple[int, int], dtype: torch.dtype) -> None:
    pattern = Pattern(*nm, v)
    torch.manual_seed(seed)
    for rows in (tied(shape, dtype, seed), torch.randn(shape).to(dtype), torch.ones(shape, dtype=dtype)):
        found = nm_mask(rows, pattern, remainder="partial")
        assert found.tolist() == expected_rows_mask(rows, *nm, v)
        pruned = torch.where(found, rows, 0)
        assert is_nm(pruned, pattern, remainder="partial")
        assert is_nm(pruned, Pattern(*nm), remainder="partial")   # shared columns are N:M in every row
        mask, effective = torch.zeros(shape, dtype=torch.bool), torch.empty_like(rows)
        flips = project(rows, pattern, 0.0, "partial", mask, effective)
        assert torch.equal(mask, found)
        assert int(flips) == int(found.sum())


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**16), st.integers(1, 9), some_nm, st.tuples(st.integers(1, 11), st.integers(1, 17)),
    st.sampled_from(FLOATS),
)  # fmt: skip
def test_any_group_pattern_and_shape_as_counted(
    seed: int, v: int, nm: tuple[int, int], shape: tuple[int, int], dtype: torch.dtype
) -> None:
    check_masks(seed, v, nm, shape, dtype)


@pytest.mark.parametrize("fault", ["the first row alone", "the next group's", "squares", "the largest"])
def test_the_checker_can_fail(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = {
        "the first row alone": lambda scores, v: scores[::v],
        "the next group's": lambda scores, v: summed(scores, v).roll(1, 0),
        "squares": lambda scores, v: summed(scores.square(), v),
        "the largest": lambda scores, v: torch.maximum(scores[::v], scores[1::v]),
    }
    monkeypatch.setattr("nmflow.masks.summed", planted[fault])
    with pytest.raises(AssertionError):
        check_masks(1, 2, (1, 4), (16, 32), torch.float32)


def test_sums_go_row_by_row_in_float32() -> None:
    """In another order, or in float64, column 0 would have 2^24 + 2 and win; in row order its ones are lost."""
    large = float(2**24)
    rows = torch.tensor([[large, large], [1.0, 0.0], [1.0, 0.0]])
    assert nm_mask(rows, "1:2v3").tolist() == [[True, False]] * 3                    # a tie: the lowest index
    assert nm_mask(rows.flip(1), "1:2v3").tolist() == [[True, False]] * 3
    assert nm_mask(rows.flip(1).double(), "1:2v3").tolist() == [[False, True]] * 3
    first = torch.tensor([[1.0, 0.0], [1.0, 0.0], [large, large]])
    assert nm_mask(first.flip(1), "1:2v3").tolist() == [[False, True]] * 3


def test_half_precision_is_added_in_float32() -> None:
    """256 + 1 is 256 in bfloat16."""
    rows = torch.tensor([[256.0, 256.0], [0.0, 1.0]], dtype=torch.bfloat16)
    assert nm_mask(rows, "1:2v2").tolist() == [[False, True]] * 2


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**16), st.integers(1, 6), st.sampled_from(FLOATS))
def test_v_of_one_is_the_plain_pattern(seed: int, n: int, dtype: torch.dtype) -> None:
    weight = tied((5, 18), dtype, seed)
    assert torch.equal(nm_mask(weight, f"{n}:6v1"), nm_mask(weight, f"{n}:6"))
    assert torch.equal(block_counts(weight, Pattern(n, 6, 1)), block_counts(weight, Pattern(n, 6)))
    many = weight.repeat_interleave(4, 0)                                            # rows alike choose alike
    assert torch.equal(nm_mask(many, Pattern(n, 6, 4)), nm_mask(many, Pattern(n, 6)))


def test_convolutions_columns_and_scores() -> None:
    weight, scores = torch.randn(6, 4, 2, 3), torch.randn(6, 4, 2, 3)
    mask = nm_mask(weight, "1:4v3")
    assert to_rows(mask, "conv").tolist() == expected_rows_mask(to_rows(weight, "conv"), 1, 4, 3)
    flat = weight.reshape(6, 24)
    assert nm_mask(flat, "1:3v8", dim=0).T.tolist() == expected_rows_mask(flat.T, 1, 3, 8)
    chosen = nm_mask(weight, "1:4v3", scores=scores.abs())
    assert to_rows(chosen, "conv").tolist() == expected_rows_mask(to_rows(scores, "conv"), 1, 4, 3)
    signed = nm_mask(torch.zeros(2, 2), "1:2v2", scores=torch.tensor([[-1.0, 5.0], [-1.0, -9.0]]))
    assert signed.tolist() == [[True, False]] * 2


# ------------------------------------------------------------------------------------------- remainders
@pytest.mark.parametrize(("shape", "says"), [((5, 8), "5 rows"), ((8,), "1 row"), ((1, 8), "1 row")])
def test_rows_that_v_does_not_divide(shape: tuple[int, ...], says: str) -> None:
    weight = torch.randn(shape)
    for check in (nm_mask, is_nm):
        with pytest.raises(ValueError, match=f"1:4v2: the weight has {says}, 2 does not divide them") as error:
            check(weight, "1:4v2")
        assert 'remainder="partial"' in str(error.value)
        assert 'remainder="skip"' in str(error.value)
    assert nm_mask(weight, "1:4v2", remainder="skip").all()
    assert is_nm(weight, "1:4v2", remainder="skip")
    found = nm_mask(weight, "1:4v2", remainder="partial")
    assert found.reshape(-1, 8).tolist() == expected_rows_mask(weight.reshape(-1, 8), 1, 4, 2)


def test_a_v_of_more_rows_than_there_are_takes_no_memory_for_them() -> None:
    rows = torch.randn(3, 8)
    wide = Pattern(1, 4, 2**31 - 1)
    assert rows_mask(rows.abs(), wide, "partial").tolist() == expected_rows_mask(rows, 1, 4, 3)
    assert block_counts(rows, wide).tolist() == [[4, 4]]


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 0)], ids=str)
def test_nothing_to_keep(shape: tuple[int, int]) -> None:
    assert nm_mask(torch.zeros(shape), "1:4v2").shape == shape
    assert is_nm(torch.zeros(shape), "1:4v2")


# ------------------------------------------------------------------------------------------------ is_nm
@pytest.mark.parametrize(
    ("rows", "pattern", "answer"),
    [
        ([[0.0, 2.0], [0.0, 3.0]], "1:2v2", True),
        ([[0.0, 2.0], [3.0, 0.0]], "1:2v2", False),                # N:M in each row, shared by none
        ([[0.0, 2.0], [1e-40, 3.0]], "1:2v2", False),              # nearly zero is not zero
        ([[0.0, 2.0], [NAN, 3.0]], "1:2v2", False),
        ([[-0.0, 2.0], [0.0, 3.0]], "1:2v2", True),
        ([[1.0, 2.0, 0.0, 0.0], [1.0, 2.0, 0.0, 0.0]], "1:2v2", False),    # enough zeros, in the wrong block
        ([[0.0, 2.0], [0.0, 0.0]], "1:2v2", True),                 # fewer than N may be left
        ([[0.0, 2.0], [0.0, 3.0], [4.0, 0.0], [5.0, 0.0]], "1:2v2", True),
        ([[0.0, 2.0], [0.0, 3.0], [4.0, 0.0], [5.0, 0.0]], "1:2v4", False),
    ],
)
def test_golden_answers(rows: list[list[float]], pattern: str, answer: bool) -> None:
    assert is_nm(torch.tensor(rows), pattern) is answer


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 6), st.integers(2, 6), st.integers(0, 9), st.integers(0, 12), st.integers(0, 2**16))
def test_block_counts_as_counted(v: int, m: int, num_rows: int, axis: int, seed: int) -> None:
    rows = tied((num_rows, axis), torch.float32, seed)
    values = rows.tolist()
    expected = [
        [
            sum(any(row[k] != 0 for row in values[top : top + v]) for k in range(start, min(start + m, axis)))
            for start in range(0, axis, m)
        ]
        for top in range(0, num_rows, v)
    ]
    assert block_counts(rows, Pattern(1, m, v)).tolist() == expected


def test_spreading_and_joining() -> None:
    marks = torch.tensor([[True, False], [False, False], [False, True]])
    assert spread(joined(marks, 2), 2, 3).tolist() == [[True, False], [True, False], [False, True]]
    assert joined(marks, 1) is marks
    assert spread(marks, 1, 3) is marks
    assert summed(marks.float(), 1).tolist() == marks.float().tolist()
