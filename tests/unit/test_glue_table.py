"""GLUE's table against rows that were published, and what it does where something is missing."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from nmflow.report.glue import AVERAGES, COLUMNS, GlueRow, by_task, glue_lines, glue_rows, glue_to_json
from nmflow.report.tables import PlannedRun

PAIRS = {"MRPC": ("f1", "accuracy"), "QQP": ("f1", "accuracy"), "STS-B": ("pearson", "spearman")}
ORDER = ("CoLA", "MNLI-m", "MNLI-mm", "MRPC", "QNLI", "QQP", "RTE", "SST-2", "STS-B", "WNLI")
Figures = dict[str, float | tuple[float, float]]


def row(*values: float | tuple[float, float]) -> Figures:
    return dict(zip(ORDER, values, strict=False))


# The paper's table 12 (T5X-Base on GLUE's dev sets): overall, then its nine columns.
PAPER = {
    "Dense": (86.2, row(58.9, 87.2, 87, (92.4, 89.2), 93.6, (92.0, 89.2), 82.3, 95, (90.1, 90.0))),
    "SR-STE, 1:4": (84.1, row(48.1, 85.7, 85.6, (92.4, 89.5), 92.1, (91.8, 89.0), 82.7, 93.6, (87.9, 87.7))),
    "SR-STE, 1:32": (77.1, row(19, 81.3, 81.3, (90.9, 87.0), 86.9, (90.6, 87.4), 71.1, 89.9, (86.7, 86.8))),
    "SdGf-Stepwise, 1:32": (80.9, row(38.3, 83.6, 83.7, (92.5, 89.7), 90.5, (91.5, 88.5), 74.4, 91.2, (85.2, 85.0))),
    "SdGf-Geometric, 1:8": (76.8, row(22.3, 80.7, 80.9, (89.8, 85.8), 86.3, (90.5, 87.4), 70, 91.1, (83.7, 83.4))),
}
# The leaderboard of GLUE (its test sets): score, then all ten columns.
LEADERBOARD = {
    "BERT large": (80.5, row(60.5, 86.7, 85.9, (89.3, 85.4), 92.7, (72.1, 89.3), 70.1, 94.9, (87.6, 86.5), 65.1)),
    "MT-DNN, not fine-tuned": (
        81.7, row(58.9, 86.5, 85.8, (90.1, 86.4), 93.1, (72.7, 89.6), 79.1, 94.6, (89.5, 88.8), 65.1)
    ),
}  # fmt: skip


def write(root: Path, figures: Figures, recipe: str = "ste", seed: int = 0) -> list[tuple[str, PlannedRun]]:
    """Runs with these figures (percent) in their result.json, as single.py leaves them."""
    tests: dict[str, dict[str, object]] = {}
    for name, value in figures.items():
        task, measures = name.partition("-m")[0] if name.startswith("MNLI") else name, PAIRS.get(name)
        values = value if isinstance(value, tuple) else (value,)
        names = measures or (("matthews",) if name == "CoLA" else ("accuracy",))
        score = {"loss": 1.0, **{each: figure / 100 for each, figure in zip(names, values, strict=True)}, "items": 9}
        if name == "CoLA":
            score["accuracy"] = 0.5  # is no figure of GLUE's
        if name == "MNLI-mm":
            tests["MNLI"]["mismatched"] = score
        else:
            tests[task] = score
    if "MNLI-m" in figures and "MNLI-mm" not in figures:
        tests["MNLI"]["mismatched"] = None
    runs = []
    for task, test in tests.items():
        folder = root / f"{recipe}-{task}-{seed}"
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps({"test": test}))
        runs.append((task, PlannedRun(recipe, "1:8", seed, folder)))
    return runs


def one_row(runs: list[tuple[str, PlannedRun]]) -> GlueRow:
    [found] = glue_rows(runs)
    return found


@pytest.mark.parametrize("name", PAPER)
def test_overall_is_the_papers(tmp_path: Path, name: str) -> None:
    """Printed figures are rounded to a tenth, and so is their mean."""
    overall, figures = PAPER[name]
    found = one_row(write(tmp_path, figures))
    assert found.averages["overall"].mean == pytest.approx(overall / 100, abs=0.001)
    assert found.averages["leaderboard"].mean is None  # there is no WNLI


@pytest.mark.parametrize("name", LEADERBOARD)
def test_the_leaderboards_score_has_wnli_and_mnli_once(tmp_path: Path, name: str) -> None:
    score, figures = LEADERBOARD[name]
    found = one_row(write(tmp_path, figures))
    assert found.averages["leaderboard"].mean == pytest.approx(score / 100, abs=0.0006)
    assert abs(found.averages["overall"].mean - score / 100) > 0.005  # type: ignore[operator]  # another average


def test_every_task_has_its_own_measures() -> None:
    """Those that training judges the task by."""
    from nmflow.train.data.glue_tasks import TASKS

    assert {column.task for column in COLUMNS.values()} == set(TASKS)
    for column in COLUMNS.values():
        judged = [measure for measure in TASKS[column.task].measures if measure != "score"]
        assert set(column.measures) == set(judged) - ({"accuracy"} if column.task == "CoLA" else set())
        assert column.part is None or column.part in TASKS[column.task].further


def test_seeds_are_averaged_and_spread_is_theirs(tmp_path: Path) -> None:
    """Three seeds, by hand: MRPC 90, 80, 70; MNLI's two 60, 62, 70 and 62, 64, 66."""
    runs = []
    for seed, (f1, m, mm) in enumerate(((92.0, 60, 62), (84.0, 62, 64), (70.0, 70, 66))):
        accuracy = (180 - 20 * seed) - f1
        runs += write(tmp_path, {"MRPC": (f1, accuracy), "MNLI-m": m, "MNLI-mm": mm}, seed=seed)
    [found] = glue_rows(runs, {"two": by_task(["MRPC", "MNLI"])})
    assert list(found.columns) == ["MNLI-m", "MNLI-mm", "MRPC"]
    mrpc = found.columns["MRPC"]
    assert mrpc.values == pytest.approx((0.9, 0.8, 0.7))
    assert (mrpc.n, mrpc.mean, mrpc.sd) == (3, pytest.approx(0.8), pytest.approx(0.1))
    assert found.measures["MRPC"]["f1"].mean == pytest.approx((92 + 84 + 70) / 300)
    each = [(90 + 61) / 2, (80 + 63) / 2, (70 + 68) / 2]
    mean = sum(each) / 3
    sd = math.sqrt(sum((value - mean) ** 2 for value in each) / 2)
    assert found.averages["two"].values == pytest.approx([value / 100 for value in each])
    assert found.averages["two"].sd == pytest.approx(sd / 100)
    head, _, line, *_ = glue_lines([found], {"two": by_task(["MRPC", "MNLI"])})
    assert [cell.strip() for cell in head.strip("|").split("|")] == [
        "pattern", "recipe", "n", "two", "MNLI-m", "MNLI-mm", "MRPC",
    ]  # fmt: skip
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        "1:8", "ste", "3", f"{mean:.1f} ± {sd:.1f}", "64.0 ± 5.3", "64.0 ± 2.0", "82.0 / 78.0 (80.0 ± 10.0)",
    ]  # fmt: skip


def test_a_missing_task_is_missing_and_so_is_the_mean(tmp_path: Path) -> None:
    figures = dict(LEADERBOARD["BERT large"][1])
    for absent in ("CoLA", "MNLI-mm", "STS-B", "WNLI"):
        left = {name: value for name, value in figures.items() if name != absent}
        found = one_row(write(tmp_path / absent, left))
        assert (found.columns[absent].mean, found.columns[absent].text()) == (None, "missing")
        assert (found.averages["overall"].mean is None) == (absent != "WNLI")
        assert found.averages["leaderboard"].mean is None
        assert f" {'missing':7} " in glue_lines([found])[2]


def test_a_seed_counts_where_it_has_every_task(tmp_path: Path) -> None:
    """Seed 1 lacks MRPC: no mean of what is left, and the table says which."""
    figures = dict(PAPER["Dense"][1])
    runs = write(tmp_path, figures, seed=0) + write(tmp_path, figures, seed=2)
    lacking = {name: value for name, value in figures.items() if name != "MRPC"}
    runs += write(tmp_path, lacking, seed=1)
    found = one_row(runs)
    assert found.averages["overall"].seeds == (0, 1, 2)
    assert found.averages["overall"].missing == (1,)
    assert (found.averages["overall"].n, found.columns["MRPC"].n, found.columns["CoLA"].n, found.n) == (2, 2, 3, 3)
    lines = glue_lines([found])
    assert "missing of 1:8 ste: MRPC seed 1" in lines
    assert "86.2 ± 0.0, n 2" in lines[2]
    assert "92.4 / 89.2 (90.8 ± 0.0), n 2" in lines[2]
    assert not any("WNLI seed" in line for line in lines)


def test_a_run_that_is_not_done_is_missing(tmp_path: Path) -> None:
    runs = write(tmp_path, dict(PAPER["Dense"][1]))
    (tmp_path / "ste-RTE-0" / "result.json").unlink()
    found = one_row(runs)
    assert found.columns["RTE"].text() == found.averages["overall"].text() == "missing"


def test_what_the_figures_are_stands_below(tmp_path: Path) -> None:
    text = "\n".join(glue_lines(glue_rows(write(tmp_path, dict(PAPER["Dense"][1])))))
    assert "Matthews correlation of CoLA" in text
    assert "accuracy of MNLI-m, MNLI-mm, QNLI, RTE, SST-2, WNLI" in text
    assert "F1 / accuracy of MRPC, QQP" in text
    assert "Pearson correlation / Spearman correlation of STS-B" in text
    assert "overall: mean of CoLA, MNLI-m, MNLI-mm, MRPC, QNLI, QQP, RTE, SST-2, STS-B; " in text
    assert "leaderboard: mean of CoLA, (MNLI-m + MNLI-mm)/2, MRPC, QNLI, QQP, RTE, SST-2, STS-B, WNLI; " in text


def test_as_data(tmp_path: Path) -> None:
    rows = glue_rows(write(tmp_path, dict(PAPER["Dense"][1])) + write(tmp_path, {"CoLA": 10.0}, recipe="dense"))
    table = json.loads(json.dumps(glue_to_json(rows)))
    assert table["averages"]["leaderboard"][1] == ["MNLI-m", "MNLI-mm"]
    assert [line["recipe"] for line in table["rows"]] == ["ste", "dense"]
    one = table["rows"][0]
    assert one["columns"]["STS-B"]["mean"] == pytest.approx(0.9005)
    assert one["columns"]["STS-B"]["measures"]["spearman"]["mean"] == pytest.approx(0.9)
    assert one["averages"]["overall"]["values"] == [pytest.approx(0.8616, abs=1e-3)]
    assert table["rows"][1]["averages"]["overall"]["missing"] == [0]
    assert list(AVERAGES) == list(one["averages"])
