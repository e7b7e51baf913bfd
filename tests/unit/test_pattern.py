"""What a pattern string may say, and what a pattern answers, against hand-written tables and counts."""

from __future__ import annotations

import copy
import pickle

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nmflow import Pattern

patterns = st.integers(1, 300).flatmap(lambda m: st.tuples(st.integers(1, m), st.just(m)))
grouped = st.tuples(patterns, st.integers(1, 2**31 - 1)).map(lambda drawn: (*drawn[0], drawn[1]))


@pytest.mark.parametrize(
    ("text", "n", "m"),
    [
        ("1:16", 1, 16),
        ("2:4", 2, 4),
        ("16:16", 16, 16),
        ("3:7", 3, 7),
        (" 1 : 128 ", 1, 128),
        ("01:016", 1, 16),
        ("dense", 1, 1),
        (" Dense ", 1, 1),
        ("1:1", 1, 1),
    ],
)
def test_a_string_is_read(text: str, n: int, m: int) -> None:
    pattern = Pattern.parse(text)
    assert (pattern.n, pattern.m) == (n, m)
    assert pattern == Pattern(n, m)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("16:1", 'did you mean "1:16"'),
        ("0:4", "1 <= N <= M"),
        ("1:0", "1 <= N <= M"),
        ("0:0", "1 <= N <= M"),
        ("a:b", 'such as "1:16", or "dense"'),
        ("", 'such as "1:16", or "dense"'),
        ("1:", 'such as "1:16", or "dense"'),
        (":4", 'such as "1:16", or "dense"'),
        ("1:4:8", 'such as "1:16", or "dense"'),
        ("-1:4", 'such as "1:16", or "dense"'),
        ("1.0:4", 'such as "1:16", or "dense"'),
        ("1/4", 'such as "1:16", or "dense"'),
        ("1:16 2:4", 'such as "1:16", or "dense"'),
        ("1:8v", 'such as "1:8v64"'),
        ("1:8v-4", 'such as "1:8v64"'),
        ("1:8V64", 'such as "1:8v64"'),
        ("1:8x64", 'such as "1:8v64"'),
        ("1:8v6.4", 'such as "1:8v64"'),
        ("v64", 'such as "1:8v64"'),
        ("densev64", 'such as "1:8v64"'),
        ("1:8v0", '1 to 2147483647; "1:8" lets every row choose its own'),
        ("8:8v0", '"8:8" lets every row'),
        ("1:8v9999999999999999999", "1 to 2147483647"),
        ("1:2147483648", "at most 2147483647"),
        ("1:99999999999999999999999", "at most 2147483647"),
        ("16:1v4", 'did you mean "1:16v4"'),
    ],
)
def test_a_wrong_string_is_refused_with_the_way_out(text: str, hint: str) -> None:
    with pytest.raises(ValueError, match="pattern") as error:
        Pattern.parse(text)
    assert f'"{text}"' in str(error.value)
    assert hint in str(error.value)


def test_no_swap_is_proposed_that_is_wrong_too() -> None:
    with pytest.raises(ValueError, match="1 <= N <= M") as error:
        Pattern(1, 0)
    assert "did you mean" not in str(error.value)


@pytest.mark.parametrize("value", [16, 1.5, None, (1, 16), b"1:16"])
def test_only_strings_and_patterns_are_read(value: object) -> None:
    with pytest.raises(TypeError, match="1:16"):
        Pattern.parse(value)  # type: ignore[arg-type]  # wrong on purpose


@pytest.mark.parametrize(("n", "m"), [(1.0, 4), (1, 4.0), ("1", 4), (True, 4), (1, True), (None, 4)])
def test_a_pattern_takes_whole_numbers_only(n: object, m: object) -> None:
    with pytest.raises(TypeError, match="two whole numbers"):
        Pattern(n, m)  # type: ignore[arg-type]  # wrong on purpose


@pytest.mark.parametrize(("text", "v"), [("1:8v64", 64), (" 1 : 8 v 64 ", 64), ("1:8v1", 1), ("1:8", 1), ("2:4v03", 3)])
def test_rows_that_share_their_columns_are_read(text: str, v: int) -> None:
    pattern = Pattern.parse(text)
    assert (pattern, pattern.v) == (Pattern(pattern.n, pattern.m, v), v)
    plain = Pattern(pattern.n, pattern.m)
    assert str(pattern) == (f"{plain}v{v}" if v > 1 else str(plain))
    assert (pattern.density, pattern.sparsity, pattern.kept(100)) == (plain.density, plain.sparsity, plain.kept(100))


@pytest.mark.parametrize("v", [1.0, "4", True, None])
def test_v_is_a_whole_number(v: object) -> None:
    with pytest.raises(TypeError, match="a whole number"):
        Pattern(1, 4, v)  # type: ignore[arg-type]  # wrong on purpose


def test_a_dense_pattern_knows_no_v() -> None:
    assert Pattern.parse("8:8v64") == Pattern(8, 8) == Pattern(8, 8, 64)
    assert Pattern.parse("8:8v64").is_dense
    assert (Pattern.dense().v, str(Pattern(1, 1, 7))) == (1, "dense")


def test_of_one_density_and_m_more_shared_rows_come_later() -> None:
    ladder = ["1:16v64", "1:8", "1:8v2", "1:8v64", "2:16", "1:4v2"]
    parsed = [Pattern.parse(text) for text in ladder]
    backwards = parsed[::-1]
    assert sorted(backwards) == parsed
    assert len(set(parsed)) == len(parsed)


@settings(deadline=None)
@given(grouped)
def test_the_string_gives_the_pattern_back(nmv: tuple[int, int, int]) -> None:
    pattern = Pattern(*nmv)
    assert Pattern.parse(str(pattern)) == pattern
    assert Pattern.parse(pattern) is pattern


@settings(deadline=None)
@given(patterns, st.integers(0, 700))
def test_kept_counts_the_survivors_of_every_block(nm: tuple[int, int], axis: int) -> None:
    n, m = nm
    kept = 0
    for start in range(0, axis, m):
        kept += min(n, min(m, axis - start))
    assert Pattern(n, m).kept(axis) == kept


@settings(deadline=None)
@given(patterns)
def test_density_and_sparsity_are_parts_of_one(nm: tuple[int, int]) -> None:
    n, m = nm
    pattern = Pattern(n, m)
    assert pattern.density == n / m
    assert pattern.sparsity == pytest.approx((m - n) / m)
    assert pattern.is_dense == (n == m)


def test_dense_keeps_everything() -> None:
    dense = Pattern.dense()
    assert (str(dense), dense.density, dense.sparsity, dense.kept(7)) == ("dense", 1.0, 0.0, 7)
    assert dense.is_dense


def test_patterns_are_ordered_by_density_then_by_m() -> None:
    ladder = ["1:128", "1:32", "1:16", "1:8", "2:16", "1:4", "2:8", "1:3", "2:4", "7:8", "dense", "4:4"]
    parsed = [Pattern.parse(text) for text in ladder]
    backwards = parsed[::-1]
    assert sorted(backwards) == parsed
    assert min(parsed) is parsed[0]
    for i, low in enumerate(parsed):
        for j, high in enumerate(parsed):
            assert (low < high) == (i < j)
            assert (low <= high) == (i <= j)
            assert (low == high) == (i == j)


@settings(deadline=None)
@given(patterns, patterns)
@example((2**31 - 3, 2**31 - 2), (2**31 - 2, 2**31 - 1))           # one float, two densities
def test_the_order_is_exact_where_floats_would_round(a: tuple[int, int], b: tuple[int, int]) -> None:
    expected = (a[0] * b[1], a[1]) < (b[0] * a[1], b[1])          # n/m compared by cross multiplication
    assert (Pattern(*a) < Pattern(*b)) == expected


def test_a_pattern_compares_to_patterns_only() -> None:
    assert Pattern(1, 4) != "1:4"
    with pytest.raises(TypeError):
        assert Pattern(1, 4) < "1:8"  # type: ignore[operator]  # wrong on purpose


def test_a_pattern_is_a_value() -> None:
    pattern = Pattern(1, 4)
    with pytest.raises(AttributeError):
        pattern.n = 2  # type: ignore[misc]  # frozen: must raise
    assert {pattern: "x"}[Pattern(1, 4)] == "x"
    assert copy.deepcopy(pattern) == pickle.loads(pickle.dumps(pattern)) == pattern
    assert Pattern(1, 4) != Pattern(2, 8)                         # one density, two patterns
