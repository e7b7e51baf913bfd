"""`nmflow report` finds runs wherever they lie, and refuses to put into one row what was not trained alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nmflow.experiments import collect
from nmflow.experiments.comparison import plan_runs
from nmflow.report.folder import CompareFolder
from nmflow.train.config import CompareConfig, TrainConfig


def finish(folder: Path, task: str, value: float) -> None:
    """What a run of a task leaves that a table reads."""
    score: dict[str, Any] = {"loss": 1.0, "accuracy": value, "items": 9}
    if task == "MRPC":
        score = {"loss": 1.0, "score": value, "accuracy": value - 0.1, "f1": value + 0.1, "items": 9}
    if task == "MNLI":
        score["mismatched"] = {**score, "accuracy": value + 0.02}
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps({"measure": next(iter([*score][1:])), "test": score}))


def comparison(folder: Path, task: str, values: dict[tuple[str, int], float], **changes: Any) -> Path:
    """A comparison of dense and ste at 1:8 on a task, as far as `values` say it is done."""
    settings: dict[str, Any] = {
        "data": f"glue:glue_data/{task}", "model": "transformers:models/minilm", "recipes": ("dense", "ste"),
        "pattern": "1:8", "seeds": 2, **changes,
    }  # fmt: skip
    config = CompareConfig(**settings)
    (folder / "runs").mkdir(parents=True)
    (folder / "config.yaml").write_text(config.to_yaml())
    for run in plan_runs(config, CompareFolder(folder)):
        value = values.get((run.label.recipe, run.label.seed))
        if value is not None:
            finish(run.folder.path, task, value)
    return folder


def single(folder: Path, task: str, value: float, dense: float | None = None, **changes: Any) -> Path:
    """A run of ste at 1:8, and its baseline."""
    settings: dict[str, Any] = {
        "data": f"glue:glue_data/{task}", "model": "transformers:models/minilm", "recipe": "ste", "pattern": "1:8",
        "baseline": dense is not None, **changes,
    }  # fmt: skip
    finish(folder, task, value)
    (folder / "config.yaml").write_text(TrainConfig(**settings).to_yaml())
    if dense is not None:
        finish(folder / "dense", task, dense)
    return folder


WHOLE = {(recipe, seed): 0.8 + 0.02 * seed - (recipe == "ste") * 0.1 for recipe in ("dense", "ste") for seed in (0, 1)}


def test_comparisons_of_tasks_make_one_table(tmp_path: Path) -> None:
    """Steps and learning rate may differ from task to task; paths are told by their last part."""
    one = comparison(tmp_path / "a", "MRPC", WHOLE)
    two = comparison(tmp_path / "b", "MNLI", WHOLE, steps=900, optim={"lr": 3e-5})
    found = collect([one, two], ["MRPC", "mnli"])
    assert [(row.pattern, row.recipe) for row in found.glue] == [("dense", "dense"), ("1:8", "ste")]
    assert list(found.averages) == ["mean of 2"]
    for row, base in zip(found.glue, (0.8, 0.7), strict=True):
        assert row.columns["MRPC"].values == pytest.approx((base, base + 0.02))
        assert row.measures["MRPC"]["f1"].mean == pytest.approx(base + 0.11)
        assert row.columns["MNLI-mm"].values == pytest.approx((base + 0.02, base + 0.04))
        assert row.averages["mean of 2"].mean == pytest.approx(base + 0.01 + 0.005)
    assert found.cells == {}
    assert "mean of 2: mean of MRPC, (MNLI-m + MNLI-mm)/2" in "\n".join(found.lines())
    all_tasks = collect([one, two])
    assert list(all_tasks.averages) == ["overall", "leaderboard"]
    assert all(cell.mean is None for row in all_tasks.glue for cell in row.averages.values())
    assert json.loads(json.dumps(all_tasks.to_dict()))["glue"]["rows"][0]["columns"]["RTE"]["n"] == 0


def test_runs_that_a_comparison_lacks_are_missing(tmp_path: Path) -> None:
    part = comparison(tmp_path / "a", "MRPC", {key: value for key, value in WHOLE.items() if key != ("ste", 1)})
    found = collect([part])
    assert [row.columns["MRPC"].n for row in found.glue] == [2, 1]
    assert "missing of 1:8 ste: MRPC seed 1" in found.lines()


def test_single_runs_bring_their_baseline(tmp_path: Path) -> None:
    """The same baseline beside two runs is one."""
    one = single(tmp_path / "a", "RTE", 0.7, dense=0.8)
    two = single(tmp_path / "b", "RTE", 0.75, dense=0.8, pattern="1:4")
    other = single(tmp_path / "c", "RTE", 0.72, seed=1)
    rows = collect([one, two, other]).glue
    assert [(row.pattern, row.columns["RTE"].values) for row in rows] == [
        ("dense", (0.8,)), ("1:8", (0.7, 0.72)), ("1:4", (0.75,))
    ]  # fmt: skip
    again = collect([one, comparison(tmp_path / "d", "RTE", {("dense", 0): 0.8})]).glue
    assert [row.columns["RTE"].values for row in again] == [(0.8, None), (0.7, None)]


def test_a_run_that_is_done_goes_before_one_that_is_not(tmp_path: Path) -> None:
    unfinished = single(tmp_path / "a", "RTE", 0.7)
    (unfinished / "result.json").unlink()
    done = single(tmp_path / "b", "RTE", 0.7)
    for order in ([unfinished, done], [done, unfinished]):
        assert collect(order).glue[0].columns["RTE"].values == (0.7,)


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    base = comparison(tmp_path / "base", "MRPC", WHOLE)
    longer = single(tmp_path / "longer", "MRPC", 0.7, seed=7, steps=300, optim={"lr": 1e-4})
    with pytest.raises(ValueError, match=r"longer: trained on MRPC with another optim, steps than .*dense-s0"):
        collect([base, longer])
    larger = single(tmp_path / "larger", "RTE", 0.7, model="transformers:models/bert")
    with pytest.raises(ValueError, match=r"larger: trained on GLUE with another model than .*; report them apart"):
        collect([base, larger])
    twice = single(tmp_path / "twice", "MRPC", 0.55)
    with pytest.raises(ValueError, match=r"twice: MRPC ste 1:8 seed 0 is also in .*ste-1-8-s0, with another result"):
        collect([base, twice])
    with pytest.raises(FileNotFoundError, match="neither a run nor a comparison"):
        collect([tmp_path])
    with pytest.raises(ValueError, match=r'"MRCP", names no task of GLUE'):
        collect([base], ["MRCP"])
    with pytest.raises(ValueError, match="none of these runs is of CoLA"):
        collect([base], ["CoLA"])


def test_what_changes_no_figure_may_differ(tmp_path: Path) -> None:
    one = single(tmp_path / "a", "RTE", 0.7, eval_every=7, out="x", data="glue:elsewhere/rte")
    two = single(tmp_path / "b", "RTE", 0.72, seed=1, checkpoint_every=9, model="transformers:/opt/models/minilm")
    assert collect([one, two]).glue[0].columns["RTE"].values == (0.7, 0.72)


def test_other_data_have_tables_of_their_own(tmp_path: Path) -> None:
    digits = comparison(tmp_path / "a", "digits", WHOLE, data="digits", model="vit-tiny")
    text = comparison(tmp_path / "b", "text", WHOLE, data="text:books/plays.txt", model="lm-tiny")
    found = collect([digits, comparison(tmp_path / "c", "MRPC", WHOLE), text])
    assert list(found.cells) == ["digits", "text plays.txt"]
    assert [cell.recipe for cell in found.cells["digits"]] == ["dense", "ste"]
    assert [cell.values for cell in found.cells["digits"]] == [pytest.approx((0.8, 0.82)), pytest.approx((0.7, 0.72))]
    lines = found.lines()
    assert lines.index("digits:") < lines.index("text plays.txt:")
    assert "| dense   | dense  |" in lines[0] + lines[2]
    assert set(found.to_dict()["data"]) == {"digits", "text plays.txt"}
    assert collect([digits]).to_dict()["glue"] is None
