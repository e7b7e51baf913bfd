"""Recipes against tables written by hand, the spec's formulas over every step, and the laws they keep."""

from __future__ import annotations

import json
import math
import random
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nmflow.pattern import Pattern
from nmflow.schedules import Recipe, Stage, recipe, recipes, sequence

SPARSE = [name for name in recipes() if name != "dense"]
MASK_DECAY = ["mdgf-linear", "mdgf-exponential"]
PHASED = ["mdgf-linear", "mdgf-exponential", "sdgf-stepwise", "sdgf-geometric", "idp"]


def rows(text: str) -> list[tuple[int, str, str, float]]:
    """Lines of "step phase pattern D" as tuples."""
    table = []
    for line in text.strip().splitlines():
        step, phase, pattern, decay = line.split()
        table.append((int(step), phase, pattern, float(decay)))
    return table


# T = 100, target 1:8. Every boundary stands between the steps before and after it.
TABLES = {
    "dense": (
        recipe("dense"),
        None,
        """
        0   dense dense 1
        50  dense dense 1
        100 dense dense 1
        """,
    ),
    "ste": (
        recipe("ste"),
        None,
        """
        0   fine-tune 1:8 0
        1   fine-tune 1:8 0
        100 fine-tune 1:8 0
        """,
    ),
    "ste with a dense start": (
        recipe("ste", dense=0.1),
        None,
        """
        0   dense     dense 1
        9   dense     dense 1
        10  fine-tune 1:8   0
        11  fine-tune 1:8   0
        100 fine-tune 1:8   0
        """,
    ),
    "ste, dense to the end": (recipe("ste", dense=1.0), None, "99 dense dense 1\n100 fine-tune 1:8 0"),
    "sr-ste": (recipe("sr-ste"), None, "0 fine-tune 1:8 0\n100 fine-tune 1:8 0"),
    "snip": (recipe("snip"), None, "0 fine-tune 1:8 0\n100 fine-tune 1:8 0"),
    "mdgf-linear": (
        recipe("mdgf-linear", dense=0.1, decay_end=0.9),
        None,
        """
        9   dense     dense 1
        10  decay     1:8   1
        11  decay     1:8   0.9875
        50  decay     1:8   0.5
        89  decay     1:8   0.0125
        90  fine-tune 1:8   0
        91  fine-tune 1:8   0
        100 fine-tune 1:8   0
        """,
    ),
    "mdgf-linear by default: 5 % and 70 %": (
        recipe("mdgf-linear"),
        None,
        """
        4  dense     dense 1
        5  decay     1:8   1
        18 decay     1:8   0.8
        69 decay     1:8   0.0153846153846
        70 fine-tune 1:8   0
        """,
    ),
    "mdgf-linear, β that is through early": (
        recipe("mdgf-linear", dense=0.1, decay_end=0.9, beta=0.025),
        None,
        """
        10 decay     1:8 1
        11 decay     1:8 0.975
        49 decay     1:8 0.025
        50 decay     1:8 0
        89 decay     1:8 0
        90 fine-tune 1:8 0
        """,
    ),
    "mdgf-linear, β that is cut off": (
        recipe("mdgf-linear", dense=0.1, decay_end=0.9, beta=0.005),
        None,
        "89 decay 1:8 0.605\n90 fine-tune 1:8 0",
    ),
    "mdgf-exponential": (
        recipe("mdgf-exponential", dense=0.1, decay_end=0.9),
        None,
        """
        9   dense     dense 1
        10  decay     1:8   1
        11  decay     1:8   0.917275935390
        50  decay     1:8   0.0316227766017
        89  decay     1:8   0.00109018449239
        90  fine-tune 1:8   0
        100 fine-tune 1:8   0
        """,
    ),
    "mdgf-exponential, floor": (
        recipe("mdgf-exponential", dense=0.1, decay_end=0.9, floor=0.01),
        None,
        "10 decay 1:8 1\n50 decay 1:8 0.1\n90 fine-tune 1:8 0",
    ),
    "mdgf-exponential, β": (
        recipe("mdgf-exponential", dense=0.1, decay_end=0.9, beta=0.1),
        None,
        """
        10 decay     1:8 1
        20 decay     1:8 0.367879441171
        89 decay     1:8 0.000370743540459
        90 fine-tune 1:8 0
        """,
    ),
    "sdgf-stepwise": (
        recipe("sdgf-stepwise", dense=0.1, decay_end=0.9),
        None,
        """
        9   dense     dense 1
        10  decay     7:8   0
        11  decay     7:8   0
        29  decay     7:8   0
        30  decay     4:8   0
        31  decay     4:8   0
        49  decay     4:8   0
        50  decay     2:8   0
        51  decay     2:8   0
        69  decay     2:8   0
        70  decay     1:8   0
        71  decay     1:8   0
        89  decay     1:8   0
        90  fine-tune 1:8   0
        100 fine-tune 1:8   0
        """,
    ),
    "sdgf-stepwise, 65 steps in 4": (
        recipe("sdgf-stepwise"),
        None,
        """
        4  dense     dense 1
        5  decay     7:8   0
        21 decay     7:8   0
        22 decay     4:8   0
        37 decay     4:8   0
        38 decay     2:8   0
        53 decay     2:8   0
        54 decay     1:8   0
        69 decay     1:8   0
        70 fine-tune 1:8   0
        """,
    ),
    "sdgf-geometric, no axis": (
        recipe("sdgf-geometric", dense=0.1, decay_end=0.9),
        None,
        """
        9   dense     dense  1
        10  decay     16:128 0
        25  decay     16:128 0
        26  decay     8:64   0
        41  decay     8:64   0
        42  decay     4:32   0
        57  decay     4:32   0
        58  decay     2:16   0
        73  decay     2:16   0
        74  decay     1:8    0
        89  decay     1:8    0
        90  fine-tune 1:8    0
        100 fine-tune 1:8    0
        """,
    ),
    "sdgf-geometric, k = 8": (
        recipe("sdgf-geometric", dense=0.1, decay_end=0.9),
        192,
        """
        9  dense     dense 1
        10 decay     8:64  0
        29 decay     8:64  0
        30 decay     4:32  0
        49 decay     4:32  0
        50 decay     2:16  0
        69 decay     2:16  0
        70 decay     1:8   0
        90 fine-tune 1:8   0
        """,
    ),
    "sdgf-geometric, k = 1": (
        recipe("sdgf-geometric", dense=0.1, decay_end=0.9),
        24,
        "9 dense dense 1\n10 decay 1:8 0\n89 decay 1:8 0\n90 fine-tune 1:8 0",
    ),
    "idp": (
        recipe("idp", dense=0.1, decay_end=0.9),
        None,
        """
        9  dense     dense 1
        10 decay     7:8   0
        29 decay     7:8   0
        30 decay     4:8   0
        50 decay     2:8   0
        70 decay     1:8   0
        89 decay     1:8   0
        90 fine-tune 1:8   0
        """,
    ),
    "schedule, structure, 0.333 of the run": (
        recipe("sdgf-stepwise", schedule=[(0.1, "6:8"), (0.333, "4:16"), (0.8, "1:8")]),
        None,
        """
        0   dense     dense 1
        9   dense     dense 1
        10  decay     6:8   0
        32  decay     6:8   0
        33  decay     4:16  0
        79  decay     4:16  0
        80  fine-tune 1:8   0
        81  fine-tune 1:8   0
        100 fine-tune 1:8   0
        """,
    ),
    "schedule, mask": (
        recipe("mdgf-linear", decay_end=0.9, schedule={0.1: "4:8", 0.5: "1:8"}),
        None,
        """
        9  dense     dense 1
        10 decay     4:8   1
        49 decay     4:8   0.5125
        50 decay     1:8   0.5
        89 decay     1:8   0.0125
        90 fine-tune 1:8   0
        """,
    ),
    "schedule from step 0": (recipe("ste", schedule=[(0, "1:8")]), None, "0 fine-tune 1:8 0\n100 fine-tune 1:8 0"),
    "structure, then mask": (
        # parts [0, 50) and [50, 100); of the second, dense is 50-54 and decay ends at 50 + 40
        sequence(
            (recipe("sdgf-stepwise", dense=0.2, decay_end=0.8), 0.5, "2:8"),
            (recipe("mdgf-linear", dense=0.1, decay_end=0.8), 1.0),
        ),
        None,
        """
        9   dense     dense 1
        10  decay     7:8   0
        19  decay     7:8   0
        20  decay     4:8   0
        29  decay     4:8   0
        30  decay     2:8   0
        39  decay     2:8   0
        40  decay     2:8   0
        49  decay     2:8   0
        50  decay     2:8   0
        54  decay     2:8   0
        55  decay     1:8   1
        72  decay     1:8   0.514285714286
        89  decay     1:8   0.0285714285714
        90  fine-tune 1:8   0
        100 fine-tune 1:8   0
        """,
    ),
}


@pytest.mark.parametrize("case", TABLES)
def test_stages_at_every_boundary(case: str) -> None:
    subject, axis, table = TABLES[case]
    for step, phase, pattern, decay in rows(table):
        stage = subject.at(step, 100, "1:8", axis)
        assert (stage.phase, str(stage.pattern)) == (phase, pattern), step
        assert stage.decay == pytest.approx(decay, rel=1e-11, abs=0.0), step


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("1:2", "1:2"),
        ("2:4", "3:4 2:4"),
        ("1:4", "3:4 2:4 1:4"),
        ("1:8", "7:8 4:8 2:8 1:8"),
        ("2:8", "7:8 4:8 2:8"),
        ("3:8", "7:8 4:8 3:8"),
        ("7:8", "7:8"),
        ("1:3", "2:3 1:3"),
        ("1:5", "4:5 3:5 2:5 1:5"),
        ("3:10", "9:10 5:10 3:10"),
        ("1:128", "127:128 64:128 32:128 16:128 8:128 4:128 2:128 1:128"),
        ("1:8v64", "7:8v64 4:8v64 2:8v64 1:8v64"),
        ("4:4", "4:4"),
        ("dense", "dense"),
    ],
)
@pytest.mark.parametrize("name", ["sdgf-stepwise", "idp"])
def test_stepwise_patterns(name: str, target: str, expected: str) -> None:
    assert patterns_seen(recipe(name), target) == expected.split()


@pytest.mark.parametrize(
    ("target", "axis", "expected"),
    [
        ("1:8", None, "16:128 8:64 4:32 2:16 1:8"),
        ("1:8", 768, "16:128 8:64 4:32 2:16 1:8"),
        ("1:8", 64, "8:64 4:32 2:16 1:8"),
        ("1:16", 192, "4:64 2:32 1:16"),
        ("2:4", 24, "4:8 2:4"),
        ("1:3", 36, "4:12 2:6 1:3"),
        ("1:128", 192, "1:128"),  # a shorter last block: 256 does not fit
        ("1:8", 100, "8:64 4:32 2:16 1:8"),  # 64 fits, 128 does not
        ("1:8", 5, "1:8"),
        ("1:16", 16, "1:16"),
        ("1:8v64", 64, "8:64v64 4:32v64 2:16v64 1:8v64"),
        ("dense", 192, "dense"),
        ("8:8", 192, "8:8"),
    ],
)
def test_geometric_patterns(target: str, axis: int | None, expected: str) -> None:
    assert patterns_seen(recipe("sdgf-geometric"), target, axis) == expected.split()


def patterns_seen(subject: Recipe, target: str, axis: int | None = None) -> list[str]:
    seen: list[str] = []
    for step in range(1000):
        stage = subject.at(step, 1000, target, axis)
        if stage.phase == "decay" and str(stage.pattern) not in seen:
            seen.append(str(stage.pattern))
    return seen


@pytest.mark.parametrize(
    ("name", "pruned_gradient", "mask", "sr_ste", "needs_gradients"),
    [
        ("dense", "straight-through", "fresh", 0.0, False),
        ("ste", "straight-through", "fresh", 0.0, False),
        ("sr-ste", "straight-through", "fresh", 2e-4, False),
        ("mdgf-linear", "straight-through", "fresh", 0.0, False),
        ("mdgf-exponential", "straight-through", "fresh", 0.0, False),
        ("sdgf-stepwise", "straight-through", "fresh", 0.0, False),
        ("sdgf-geometric", "straight-through", "fresh", 0.0, False),
        ("snip", "masked", "frozen", 0.0, True),
        ("idp", "masked", "inherit", 0.0, False),
    ],
)
def test_what_else_a_stage_says(
    name: str, pruned_gradient: str, mask: str, sr_ste: float, needs_gradients: bool
) -> None:
    subject = recipe(name)
    for step in (0, 40, 100):
        stage = subject.at(step, 100, "1:4")
        assert (stage.pruned_gradient, stage.mask, stage.sr_ste) == (pruned_gradient, mask, sr_ste)
        assert stage.outer == Pattern.dense()
    assert subject.needs_gradients is needs_gradients
    for other in ("straight-through", "decay", "masked"):
        assert recipe(name, pruned_gradient=other).at(40, 100, "1:4").pruned_gradient == other


def test_the_names() -> None:
    assert recipes() == [
        "dense", "ste", "sr-ste", "mdgf-linear", "mdgf-exponential", "sdgf-stepwise", "sdgf-geometric", "snip",
        "idp",
    ]  # fmt: skip
    assert recipe("sr-ste", sr_ste=0.01).at(5, 10, "1:4").sr_ste == 0.01


# The spec's formulas, written out once more, over every step

@pytest.mark.parametrize("total", [97, 200, 1003])
@pytest.mark.parametrize(("dense", "decay_end"), [(0.05, 0.7), (0.0, 1.0), (0.125, 0.9)])
@pytest.mark.parametrize("name", PHASED)
def test_the_formulas_at_every_step(name: str, dense: float, decay_end: float, total: int) -> None:
    subject = recipe(name, dense=dense, decay_end=decay_end)
    d, e = math.floor(dense * total + 0.5), math.floor(decay_end * total + 0.5)
    stages = {
        "sdgf-stepwise": ["15:16", "8:16", "4:16", "2:16", "1:16"],
        "idp": ["15:16", "8:16", "4:16", "2:16", "1:16"],
        "sdgf-geometric": ["16:256", "8:128", "4:64", "2:32", "1:16"],
    }.get(name, ["1:16"])
    for step in range(total + 1):
        stage = subject.at(step, total, "1:16")
        j = step - d
        if step < d:
            expected = ("dense", "dense", 1.0)
        elif step >= e:
            expected = ("fine-tune", "1:16", 0.0)
        else:
            decay = {"mdgf-linear": 1 - j / (e - d), "mdgf-exponential": 1e-3 ** (j / (e - d))}.get(name, 0.0)
            expected = ("decay", stages[math.floor(Fraction(j * len(stages), e - d))], decay)
        assert (stage.phase, str(stage.pattern)) == expected[:2], step
        assert stage.decay == pytest.approx(expected[2], rel=1e-12, abs=0.0), step


# Laws

@st.composite
def table_recipes(draw: st.DrawFn) -> tuple[Recipe, int, int, str, int | None]:
    """A recipe of the table whose d and e are whole, with T, target and axis."""
    name = draw(st.sampled_from(SPARSE))
    total = draw(st.integers(20, 300))
    d = draw(st.integers(0, total // 2))
    options: dict[str, float] = {"dense": d / total}
    if name in PHASED:
        options["decay_end"] = draw(st.integers(d + 10, total)) / total if d + 10 <= total else 1.0
    m = draw(st.integers(1, 40))
    target = f"{draw(st.integers(1, m))}:{m}"
    axis = draw(st.none() | st.integers(1, 2000))
    return recipe(name, **options), total, d, target, axis


@given(table_recipes())
@settings(max_examples=150, deadline=None)
def test_decay_and_density_never_rise_and_the_end_is_the_target(case) -> None:
    subject, total, d, target, axis = case
    stages = [subject.at(step, total, target, axis) for step in range(d, total + 1)]
    for before, after in pairwise(stages):
        assert after.decay <= before.decay
        assert Fraction(after.pattern.n, after.pattern.m) <= Fraction(before.pattern.n, before.pattern.m)
    assert (str(stages[-1].pattern), stages[-1].decay) == (str(Pattern.parse(target)), 0.0)
    assert stages[-1].phase == "fine-tune"
    assert all(0.0 <= stage.decay <= 1.0 for stage in stages)


@given(table_recipes(), st.integers(2, 50), st.data())
@settings(max_examples=150, deadline=None)
def test_time_scales(case, factor: int, data: st.DataObject) -> None:
    subject, total, _, target, axis = case
    step = data.draw(st.integers(0, total))
    assert subject.at(factor * step, factor * total, target, axis) == subject.at(step, total, target, axis)


@pytest.mark.parametrize("factor", [2, 7, 1000])
@pytest.mark.parametrize("case", [case for case in TABLES if "β" not in case and "0.333" not in case])
def test_time_scales_for_schedules_and_sequences(case: str, factor: int) -> None:
    subject, axis, _ = TABLES[case]
    for step in range(101):
        assert subject.at(factor * step, factor * 100, "1:8", axis) == subject.at(step, 100, "1:8", axis)


@pytest.mark.parametrize("case", TABLES)
def test_a_stage_does_not_depend_on_what_was_asked_before(case: str) -> None:
    subject, axis, _ = TABLES[case]
    in_order = [subject.at(step, 100, "1:8", axis) for step in range(101)]
    steps = list(range(101)) * 2
    random.Random(0).shuffle(steps)
    for step in steps:
        assert subject.at(step, 100, "1:8", axis) == in_order[step]
        subject.at(step, 500, "1:8", axis)  # another run in between


@given(table_recipes(), st.data())
@settings(max_examples=50, deadline=None)
def test_written_and_read_a_recipe_is_the_same(case, data: st.DataObject) -> None:
    subject, total, _, target, axis = case
    again = Recipe.from_dict(json.loads(json.dumps(subject.to_dict())))
    step = data.draw(st.integers(0, total))
    assert again == subject
    assert again.at(step, total, target, axis) == subject.at(step, total, target, axis)


@pytest.mark.parametrize("case", TABLES)
def test_written_and_read_schedules_and_sequences_are_the_same(case: str) -> None:
    subject = TABLES[case][0]
    written = json.loads(json.dumps(subject.to_dict()))
    assert Recipe.from_dict(written) == subject
    assert Recipe.from_dict(written).to_dict() == written


def test_what_is_written() -> None:
    assert recipe("mdgf-exponential").to_dict() == {
        "name": "mdgf-exponential", "dense": 0.05, "decay_end": 0.7, "pruned_gradient": "straight-through",
        "freeze": False, "schedule": None, "beta": None, "floor": 1e-3,
    }  # fmt: skip
    assert recipe("ste", schedule=[(0.1, "1:8")]).to_dict()["schedule"] == [[0.1, "1:8"]]
    written = sequence((recipe("ste"), 0.5, "2:4"), ("sr-ste", 1.0)).to_dict()
    assert written["name"] == "sequence"
    assert [part["until"] for part in written["parts"]] == [0.5, 1.0]
    assert [part["pattern"] for part in written["parts"]] == ["2:4", None]
    assert [part["recipe"]["name"] for part in written["parts"]] == ["ste", "sr-ste"]


# Sequences

def test_outer_is_where_the_part_before_ended() -> None:
    subject = sequence(("ste", 0.3, "8:16"), ("mdgf-linear", 0.6, "4:16"), ("mdgf-exponential", 1.0, "1:16"))
    outer = [str(subject.at(step, 100, "1:16").outer) for step in (0, 29, 30, 31, 59, 60, 61, 99, 100)]
    assert outer == ["dense", "dense", "8:16", "8:16", "8:16", "4:16", "4:16", "4:16", "4:16"]


def test_only_the_last_part_fine_tunes_and_each_keeps_its_options() -> None:
    subject = sequence(
        {"recipe": {"name": "sr-ste", "sr_ste": 0.5}, "until": 0.5},
        {"recipe": "mdgf-linear", "until": 1, "pattern": "1:4"},
    )
    stages = [subject.at(step, 200, "1:4") for step in range(201)]
    assert {stage.phase for stage in stages[:170]} == {"decay"}
    assert {stage.phase for stage in stages[170:]} == {"fine-tune"}
    assert {stage.sr_ste for stage in stages[:100]} == {0.5}
    assert {stage.sr_ste for stage in stages[100:]} == {0.0}
    assert [stage.decay for stage in stages[100:106]] == [0.0] * 5 + [1.0]


def test_mask_decay_may_come_first_and_again() -> None:
    subject = sequence((recipe("mdgf-linear", dense=0), 0.5, "4:16"), (recipe("mdgf-linear", dense=0), 1.0))
    stages = [subject.at(step, 40, "2:32") for step in (0, 7, 14, 20, 27)]
    found = [(str(stage.pattern), stage.decay) for stage in stages]
    assert found == [("4:16", 1.0), ("4:16", 0.5), ("4:16", 0.0), ("2:32", 1.0), ("2:32", 0.5)]


def test_a_sequence_asks_each_part_for_its_own_axis() -> None:
    subject = sequence(("sdgf-geometric", 0.5, "4:16"), ("ste", 1.0))
    assert str(subject.at(10, 100, "1:16", 32).pattern) == "8:32"
    assert str(subject.at(10, 100, "1:16", 48).pattern) == "4:16"
    assert subject.notes("1:16", 48) == ("part 1 (sdgf-geometric): k = 1, plain STE (2·16 does not divide 48)",)


@pytest.mark.parametrize("name", ["ste", "mdgf-linear", "sdgf-geometric"])
@given(first=st.integers(20, 80), total=st.integers(100, 400))
@settings(max_examples=30, deadline=None)
def test_the_density_of_a_sequence_never_rises(name: str, first: int, total: int) -> None:
    subject = sequence(("sdgf-stepwise", first / 100, "4:16"), (name, 1.0))
    target = "4:16" if name == "sdgf-geometric" else "1:16"
    densities = [subject.at(step, total, target).pattern.density for step in range(total + 1)]
    assert densities == sorted(densities, reverse=True)
    assert subject.at(total, total, target).decay == 0.0


# What bad input gets

@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: recipe("mdgf-exp"), 'unknown recipe "mdgf-exp"; did you mean "mdgf-exponential"'),
        (lambda: recipe("mdgf"), 'did you mean "mdgf-linear"'),
        (lambda: recipe("sequence"), 'unknown recipe "sequence"'),
        (lambda: recipe("ste", denze=0.1), 'no option "denze"; did you mean "dense"'),
        (lambda: recipe("mdgf-linear", betta=1, floor=2), 'no option "betta".*no option "floor"'),
        (lambda: recipe("dense", dense=0.1), 'recipe dense: no option "dense"'),
        (lambda: recipe("dense", pruned_gradient="none"), "pruned_gradient='none'"),
        (lambda: recipe("ste", pruned_gradient="ste"), "straight-through, decay, masked"),
        (lambda: recipe("ste", dense=-0.1), "dense=-0.1"),
        (lambda: recipe("ste", dense=1.5), "dense=1.5"),
        (lambda: recipe("ste", dense=math.nan), "dense=nan"),
        (lambda: recipe("ste", dense="0.1"), "dense='0.1'"),
        (lambda: recipe("ste", dense=True), "dense=True"),
        (lambda: recipe("mdgf-linear", decay_end=1.01), "decay_end=1.01"),
        (lambda: recipe("mdgf-linear", dense=2, decay_end=3), "dense=2: .*decay_end=3: "),
        (lambda: recipe("mdgf-linear", dense=2, beta=-1, pruned_gradient="g"), "dense=2: .*pruned.*'g'.*beta=-1"),
        (lambda: recipe("mdgf-linear", dense=0.7), "begins at 0.7 .* decay_end=0.7"),
        (lambda: recipe("ste", decay_end=0.5), "no decay phase; leave decay_end out"),
        (lambda: recipe("mdgf-linear", beta=0), "beta=0"),
        (lambda: recipe("mdgf-linear", beta=math.inf), "beta=inf"),
        (lambda: recipe("mdgf-exponential", floor=1.0), "floor=1.0"),
        (lambda: recipe("mdgf-exponential", floor=0.0), "floor=0.0"),
        (lambda: recipe("mdgf-exponential", beta=0.1, floor=0.1), "beta and floor"),
        (lambda: recipe("sr-ste", sr_ste=-1), "sr_ste=-1"),
        (lambda: recipe("ste", dense=0.1, schedule=[(0.1, "1:8")]), "leave dense out"),
        (lambda: recipe("mdgf-linear", dense=0.05, schedule=[(0.1, "1:8")]), "leave dense out"),
        (lambda: recipe("idp", decay_end=0.7, schedule=[(0.1, "1:8")]), "leave decay_end out"),
        (lambda: recipe("mdgf-linear", decay_end=0.5, schedule=[(0.1, "2:8"), (0.6, "1:8")]), "after decay_end"),
        (lambda: recipe("ste", schedule=[]), "no entry"),
        (lambda: recipe("ste", schedule="1:8"), "pairs of"),
        (lambda: recipe("ste", schedule=8), "pairs of"),
        (lambda: recipe("ste", schedule=[(0.1, "1:8", 3)]), "a pair of"),
        (lambda: recipe("ste", schedule=[("0.1", "1:8")]), "a pair of"),
        (lambda: recipe("ste", schedule=["ab"]), "a pair of"),
        (lambda: recipe("ste", schedule=[(0.1, "8:1")]), 'did you mean "1:8"'),
        (lambda: recipe("ste", schedule=[(1.1, "1:8")]), "1.1 lies outside"),
        (lambda: recipe("ste", schedule=[(0.2, "4:8"), (0.2, "1:8")]), "do not ascend"),
        (lambda: recipe("ste", schedule=[(0.1, "1:8"), (0.2, "3:16")]), "rises from 1:8 at 0.1 to 3:16"),
        (lambda: recipe("snip", schedule=[(0.1, "4:8"), (0.2, "1:8")]), "only one entry"),
        (lambda: Recipe.from_dict({"dense": 0.1}), 'a recipe needs a "name"'),
        (lambda: sequence(), "no part"),
        (lambda: sequence(("ste", 0.5)), "the last one is 1.0"),
        (lambda: sequence(("ste", 0.8), ("ste", 0.5), ("ste", 1.0)), "ascend"),
        (lambda: sequence(("ste", 0.0), ("ste", 1.0)), "above 0"),
        (lambda: sequence(("ste", "x"), ("ste", 1.0)), "above 0"),
        (lambda: sequence("ste"), "a part is"),
        (lambda: sequence({"recipe": "ste", "till": 1.0}), "keys recipe, until and pattern"),
        (lambda: sequence(("ste", 0.5), ("std", 1.0)), 'part 2: .*unknown recipe "std"'),
        (lambda: sequence(("dense", 0.5), ("ste", 1.0)), "part 1: dense cannot be a part"),
        (lambda: sequence(("ste", 0.5), ("snip", 1.0)), "part 2: snip keeps a mask of its own"),
        (lambda: sequence(("idp", 0.5), ("ste", 1.0)), "part 1: idp keeps a mask of its own"),
        (lambda: sequence((sequence(("ste", 1.0)), 1.0)), "sequence cannot be a part"),
        (lambda: sequence(("ste", 0.5, "1:8"), ("ste", 1.0, "2:8")), "density rises from 1:8 to 2:8"),
    ],
)
def test_a_recipe_that_cannot_be(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


LISTED = [
    recipe("ste", schedule=[(0.0, "8:8"), (0.1, "4:8"), (0.5, "1:8")]),
    recipe("ste", schedule=[(0.0, "8:8"), (0.1, "4:8v6"), (0.5, "1:8v6")]),
    sequence(("ste", 0.5, "4:8"), ("ste", 1.0)),
    sequence(("ste", 0.5, "4:8v6"), ("ste", 1.0, "1:8")),
]


@pytest.mark.parametrize("subject", LISTED, ids=str)
def test_listed_patterns_have_the_v_of_the_target(subject: Recipe) -> None:
    assert str(subject.at(20, 100, "1:8v6").pattern) == "4:8v6"
    last = subject.at(100, 100, "1:8v6")
    assert (str(last.pattern), last.outer.v) == ("1:8v6", 1 if last.outer.is_dense else 6)
    assert Recipe.from_dict(subject.to_dict()) == subject


def test_masks_of_one_v_nest() -> None:
    stage = sequence(("ste", 0.5, "2:4"), ("mdgf-linear", 1.0)).at(60, 100, "1:8v6")
    assert (str(stage.outer), str(stage.pattern)) == ("2:4v6", "1:8v6")
    assert stage.decay > 0


@pytest.mark.parametrize(
    ("subject", "total", "target", "message"),
    [
        (recipe("ste", schedule=[(0.0, "4:8v3"), (0.5, "1:8")]), 9, "1:8v6", "4:8v3 shares .* 3 rows.*leave v out"),
        (sequence(("ste", 0.5, "4:8v3"), ("ste", 1.0)), 9, "1:8v6", "4:8v3 shares columns among 3 rows"),
        (sequence(("ste", 0.5, "4:8v3"), ("ste", 1.0)), 9, "1:8", "4:8v3 shares columns among 3 rows.*1:8 among 1"),
        (recipe("ste", schedule=[(0.5, "1:8v3")]), 9, "1:8v6", "ends in 1:8v3, the target is 1:8v6"),
        (recipe("mdgf-linear", dense=0.5), 1, "1:4", r"too short: the decay phase \[1, 1\)"),
        (recipe("mdgf-exponential", dense=0.1, decay_end=0.11), 10, "1:4", r"\[1, 1\)"),
        (recipe("sdgf-stepwise", dense=0.0, decay_end=1.0), 3, "1:8", "4 patterns .7:8, 4:8, 2:8, 1:8."),
        (recipe("idp", dense=0.0, decay_end=1.0), 3, "1:8", "too short"),
        (recipe("sdgf-geometric", dense=0.0, decay_end=1.0), 4, "1:8", "5 patterns"),
        (recipe("ste", schedule=[(0.1, "2:8"), (0.2, "1:8")]), 100, "1:16", "ends in 1:8, the target is 1:16"),
        (recipe("ste", schedule=[(0.1, "2:8"), (0.11, "1:8")]), 10, "1:8", "begin at steps 1, 1"),
        (recipe("mdgf-linear", decay_end=0.2, schedule=[(0.19, "1:8")]), 10, "1:8", "ends at 2"),
        (sequence(("ste", 0.5, "2:8"), ("ste", 1.0, "1:8")), 100, "1:16", "ends in 1:8, the target is 1:16"),
        (sequence(("ste", 0.01, "2:8"), ("ste", 1.0)), 10, "1:8", "part 1: ste has no step of its own"),
        (sequence(("ste", 0.5, "2:8"), ("mdgf-linear", 1.0)), 1, "1:8", "part 2: .*no step"),
        (sequence(("ste", 0.5, "2:8"), ("sdgf-stepwise", 1.0)), 99, "1:8", "begins at 7:8, denser than the 2:8"),
        (sequence(("ste", 0.5, "4:16"), ("mdgf-linear", 1.0)), 99, "1:8", "4:16 to 1:8.*not nested"),
        (sequence(("ste", 0.5, "1:4"), ("mdgf-linear", 1.0)), 99, "2:16", "1:4 to 2:16.*N <= 1"),
        (sequence(("ste", 0.5, "1:8"), ("ste", 1.0)), 99, "1:4", "begins at 1:4, denser than the 1:8"),
    ],
)
def test_a_run_that_a_recipe_cannot_have(subject: Recipe, total: int, target: str, message: str) -> None:
    for step in {0, total // 2, total}:
        with pytest.raises(ValueError, match=message):
            subject.at(step, total, target)


def test_one_step_for_each_pattern_is_enough() -> None:
    subject = recipe("sdgf-stepwise", dense=0.2, decay_end=0.6)
    stages = [subject.at(step, 10, "1:8") for step in range(1, 7)]
    found = [(stage.phase, str(stage.pattern)) for stage in stages]
    decay = [("decay", pattern) for pattern in ("7:8", "4:8", "2:8", "1:8")]
    assert found == [("dense", "dense"), *decay, ("fine-tune", "1:8")]


@pytest.mark.parametrize("name", recipes())
def test_steps_outside_the_run_and_steps_that_are_none(name: str) -> None:
    subject = recipe(name)
    with pytest.raises(ValueError, match="step=101 lies beyond total_steps=100"):
        subject.at(101, 100, "1:4")
    with pytest.raises(ValueError, match="step=-1"):
        subject.at(-1, 100, "1:4")
    with pytest.raises(ValueError, match="total_steps=0"):
        subject.at(0, 0, "1:4")
    for step, total in [(1.0, 100), ("1", 100), (True, 100), (1, 100.0), (1, None)]:
        with pytest.raises(TypeError, match="is a whole number"):
            subject.at(step, total, "1:4")
    with pytest.raises(ValueError, match='did you mean "1:4"'):
        subject.at(1, 100, "4:1")
    assert subject.at(np.int64(50), np.int32(100), "1:4") == subject.at(50, 100, "1:4")


def test_an_axis_that_is_none() -> None:
    with pytest.raises(ValueError, match="axis=0"):
        recipe("sdgf-geometric").at(0, 100, "1:4", 0)
    with pytest.raises(TypeError, match="axis is a whole number"):
        recipe("sdgf-geometric").at(0, 100, "1:4", 64.0)


def test_a_name_that_is_none() -> None:
    with pytest.raises(TypeError, match="called by its name"):
        recipe(3)


def test_two_parts_that_look_alike_do_the_same_as_one_recipe() -> None:
    subject, plain = sequence(("sr-ste", 1.0)), recipe("sr-ste")
    assert [subject.at(step, 10, "1:4") for step in range(11)] == [plain.at(step, 10, "1:4") for step in range(11)]
    assert isinstance(subject.at(0, 10, "1:4"), Stage)
