"""Plans against a scan over every step, and against plans written by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nmflow.schedules import Recipe, plan, recipe, recipes, sequence

CASES = {
    **{name: recipe(name) for name in recipes()},
    "ste, dense start": recipe("ste", dense=0.25),
    "decay to the end": recipe("sdgf-stepwise", dense=0.0, decay_end=1.0),
    "dense to the end": recipe("ste", dense=1.0),
    "schedule": recipe("idp", schedule=[(0.0, "4:8"), (0.33, "2:16"), (0.5, "1:8"), (0.9, "2:16")]),
    "schedule, mask decay": recipe("mdgf-linear", schedule=[(0.1, "4:8"), (0.7, "2:16")]),
    "two parts": sequence(("sdgf-geometric", 0.5, "8:16"), ("mdgf-exponential", 1.0)),
    "the same twice": sequence(("ste", 0.5), ("ste", 1.0)),
    "stays, then decays anew": sequence(("ste", 0.5), ("mdgf-linear", 1.0)),
    "another gradient": sequence((recipe("ste", pruned_gradient="masked"), 0.3), ("ste", 0.6), ("ste", 1.0)),
    "three parts": sequence(("sdgf-stepwise", 0.3, "8:16"), ("mdgf-linear", 0.5, "4:16"), ("mdgf-linear", 1.0)),
}


def scan(subject: Recipe, total: int, axis: int | None) -> list[tuple]:
    """Stretches of steps that differ in nothing but a falling D, by asking every step."""
    runs: list[list] = []
    for step in range(total):
        stage = subject.at(step, total, "2:16", axis)
        rest = (stage.phase, stage.pattern, stage.pruned_gradient, stage.sr_ste, stage.mask, stage.outer)
        if not runs or runs[-1][4] != rest or stage.decay > runs[-1][3].decay:
            runs.append([step, step, stage, stage, rest])
        runs[-1][1], runs[-1][3] = step + 1, stage
    return [tuple(run[:4]) for run in runs]


@pytest.mark.parametrize("case", CASES)
@given(total=st.integers(60, 500), axis=st.sampled_from([None, 16, 48, 100, 1024]))
@settings(max_examples=15, deadline=None)
def test_a_plan_is_what_a_scan_finds(case: str, total: int, axis: int | None) -> None:
    segments = plan(CASES[case], total, "2:16", axis)
    assert [(part.start, part.end, part.first, part.last) for part in segments] == scan(CASES[case], total, axis)


def lines(subject: Recipe, total: int, target: str, axis: int | None = None) -> list[str]:
    return [
        f"{part.start}-{part.end} {part.first.phase} {part.first.pattern} {part.first.decay:g}>{part.last.decay:g}"
        for part in plan(subject, total, target, axis)
    ]


def test_plans_written_by_hand() -> None:
    assert lines(recipe("dense"), 10, "1:8") == ["0-10 dense dense 1>1"]
    assert lines(recipe("ste"), 10, "1:8") == ["0-10 fine-tune 1:8 0>0"]
    assert lines(recipe("mdgf-linear"), 100, "1:8") == [
        "0-5 dense dense 1>1",
        "5-70 decay 1:8 1>0.0153846",
        "70-100 fine-tune 1:8 0>0",
    ]
    assert lines(recipe("sdgf-stepwise"), 1000, "1:4") == [
        "0-50 dense dense 1>1",
        "50-267 decay 3:4 0>0",
        "267-484 decay 2:4 0>0",
        "484-700 decay 1:4 0>0",
        "700-1000 fine-tune 1:4 0>0",
    ]


def test_a_million_steps_ask_a_few_of_them() -> None:
    asked = []

    class Counted(type(recipe("sdgf-stepwise"))):  # type: ignore[misc]  # a class known at run time
        def at(self, step, *rest):
            asked.append(step)
            return super().at(step, *rest)

    segments = plan(Counted(), 10**6, "1:128")
    assert [part.end - part.start for part in segments] == [50_000] + [81_250] * 8 + [300_000]
    assert len(asked) <= 2 * len(segments)


def test_a_plan_raises_as_the_recipe_does() -> None:
    with pytest.raises(ValueError, match="too short"):
        plan(recipe("sdgf-stepwise"), 4, "1:8")
    with pytest.raises(TypeError, match="whole number"):
        plan(recipe("dense"), 10.0, "1:8")


@pytest.mark.parametrize(
    ("target", "axis", "note"),
    [
        ("1:8", None, ("k = 16 (the axis is not known)",)),
        ("1:8", 768, ("k = 16",)),
        ("1:96", 768, ("k = 8 (16·96 does not divide 768)",)),
        ("1:8", 24, ("k = 1, plain STE (2·8 does not divide 24)",)),
        ("1:128", 192, ("k = 1, plain STE (2·128 does not fit in 192)",)),
        ("1:8", 100, ("k = 8 (16·8 does not fit in 100)",)),
        ("1:16", 1000, ("k = 16",)),
        ("dense", 768, ()),
    ],
)
def test_what_geometric_notes(target: str, axis: int | None, note: tuple[str, ...]) -> None:
    assert recipe("sdgf-geometric").notes(target, axis) == note


def test_others_have_nothing_to_note() -> None:
    assert [name for name in recipes() if recipe(name).notes("1:8", 24)] == ["sdgf-geometric"]
    assert recipe("sdgf-geometric", schedule=[(0.1, "1:8")]).notes("1:8", 24) == ()
