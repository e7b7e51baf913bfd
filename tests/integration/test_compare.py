"""A comparison is its runs: each is the run that `train` does, and the table is their arithmetic."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from small_runs import MODEL, SETTINGS, assert_same_bits, one_run, small

from nmflow.experiments import compare, resume_compare
from nmflow.experiments.comparison import plan_runs
from nmflow.report.folder import CompareFolder, RunFolder
from nmflow.train import resume
from nmflow.train.config import CompareConfig, load_compare_config


def compared(**changes):
    """Settings of a small comparison."""
    settings = {name: value for name, value in SETTINGS.items() if name not in ("baseline", "pattern")}
    return CompareConfig(**{**settings, "pattern": ("1:4", "1:8"), "steps": 10, **changes})


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Three recipes, two patterns, three seeds; dense is one of them."""
    path = tmp_path_factory.mktemp("runs") / "comparison"
    return compare(compared(recipes=("ste", "dense", "mdgf-linear"), seeds=(0, 1, 5), out=str(path)))


@pytest.fixture
def copied(done, tmp_path):
    """The same comparison in a folder that a test may spoil."""
    shutil.copytree(done.folder.path, tmp_path / "copy")
    return tmp_path / "copy"


def test_what_is_run(done):
    """Dense once a seed, all else once a seed and pattern."""
    names = {path.name for path in done.folder.runs.iterdir()}
    sparse = {f"{recipe}-1-{m}-s{s}" for recipe in ("ste", "mdgf-linear") for m in (4, 8) for s in (0, 1, 5)}
    assert names == sparse | {"dense-s0", "dense-s1", "dense-s5"}
    assert not list(done.folder.runs.glob("*/checkpoint*"))  # nobody goes on with a run that is done
    assert load_compare_config(done.folder.config) == compared(
        recipes=("ste", "dense", "mdgf-linear"), seeds=(0, 1, 5), out=str(done.folder.path)
    )


def test_a_run_is_the_one_that_train_does(done, tmp_path):
    alone = one_run(small(recipe="mdgf-linear", pattern="1:4", seed=5, steps=10), tmp_path)
    cell = RunFolder(done.folder.runs / "mdgf-linear-1-4-s5")
    assert_same_bits(alone.model, cell.model)
    assert alone.metrics.read_bytes() == cell.metrics.read_bytes()
    one, two = (json.loads(folder.result.read_text()) for folder in (alone, cell))
    assert one.pop("seconds") >= 0 <= two.pop("seconds")
    assert one == two


def test_table_is_the_arithmetic_of_the_runs(done):
    table = json.loads(done.folder.table.read_text())
    text = done.folder.text.read_text()
    order = [("ste", "1:4"), ("dense", "dense"), ("mdgf-linear", "1:4"), ("ste", "1:8"), ("mdgf-linear", "1:8")]
    assert [(cell["recipe"], cell["pattern"]) for cell in table["cells"]] == order
    dense = None
    for cell in sorted(table["cells"], key=lambda cell: cell["recipe"] != "dense"):
        name = cell["recipe"] if cell["pattern"] == "dense" else f"{cell['recipe']}-{cell['pattern'].replace(':', '-')}"
        files = [done.folder.runs / f"{name}-s{seed}" / "result.json" for seed in (0, 1, 5)]
        values = np.array([json.loads(file.read_text())["test"]["accuracy"] for file in files])
        assert cell["values"] == values.tolist()
        assert (cell["n"], cell["min"], cell["max"]) == (3, values.min(), values.max())
        assert cell["mean"] == pytest.approx(np.mean(values), abs=1e-12)
        assert cell["sd"] == pytest.approx(np.std(values, ddof=1), abs=1e-12)
        dense = values if dense is None else dense
        rows = (line for line in text.splitlines() if f" {cell['recipe']} " in line)
        [row] = [line for line in rows if line.startswith(f"| {cell['pattern']} ")]
        assert f"{100 * np.mean(values):.2f} ± {100 * np.std(values, ddof=1):.2f}" in row
        if cell["recipe"] != "dense":
            assert f"{100 * (np.mean(values) - np.mean(dense)):+.2f}" in row


def test_last_lines(done):
    text = "\n".join(done.lines())
    assert done.folder.text.read_text() in text + "\n"
    assert str(done.folder.plot) in text
    assert done.folder.plot.read_bytes().startswith(b"\x89PNG")
    facts = json.loads(json.dumps(done.to_dict()))
    assert facts["folder"] == str(done.folder.path)
    assert len(facts["cells"]) == 5


def test_what_is_done_is_not_done_again(copied):
    shutil.rmtree(copied / "runs" / "ste-1-8-s1")
    before = {path: path.stat().st_mtime_ns for path in (copied / "runs").rglob("*") if path.is_file()}
    original = (copied / "table.json").read_text()
    result = resume_compare(copied)
    after = {path: path.stat().st_mtime_ns for path in before}
    assert before == after
    assert (copied / "runs" / "ste-1-8-s1" / "result.json").exists()
    assert (copied / "table.json").read_text() == original
    assert not result.failed


def test_a_run_that_diverges_is_missing_and_the_others_go_on(tmp_path):
    """λ so large that the masks' term explodes; dense does not know of it."""
    wild = {"name": "sr-ste", "sr_ste": 1e38}
    result = compare(compared(recipes=(wild, "dense"), pattern="1:8", seeds=2, out=str(tmp_path / "c")))
    [sparse, dense] = json.loads((tmp_path / "c" / "table.json").read_text())["cells"]
    assert (sparse["n"], sparse["mean"], sparse["sd"], sparse["missing"]) == (0, None, None, [0, 1])
    assert dense["n"] == 2
    assert len(result.failed) == 2
    text = "\n".join(result.lines())
    assert "missing" in text
    assert "0 of 2" in text
    assert all("NaN or inf" in each.reason for each in result.failed)
    assert "NaN or inf" in result.to_dict()["failed"][1]


def test_recipes_with_options_have_folders_and_names_of_their_own(tmp_path):
    one, two = ({"name": "mdgf-linear", "dense": part} for part in (0.1, 0.2))
    runs = plan_runs(compared(recipes=(one, two), pattern="1:8", seeds=1), CompareFolder(tmp_path))
    assert len({run.folder.path for run in runs}) == 2
    assert [run.label.recipe for run in runs] == ["mdgf-linear (dense=0.1)", "mdgf-linear (dense=0.2)"]
    assert all(not run.config.baseline for run in runs)


def test_targets_in_place_of_patterns(tmp_path):
    config = CompareConfig(recipes=("dense", "ste"), targets={"ff": "1:8", "head": None}, seeds=1)
    labels = [(run.label.recipe, run.label.pattern) for run in plan_runs(config, CompareFolder(tmp_path))]
    assert labels == [("dense", "dense"), ("ste", "ff=1:8 + head=dense")]


# -- what is refused ---------------------------------------------------------------------------------------------


def test_what_cannot_run_is_told_at_once(tmp_path):
    config = compared(recipes=("dense", "sdgf-stepwise"), pattern="1:8,1:24", steps=4, out=str(tmp_path / "c"))
    with pytest.raises(ValueError, match=r"(?s)too short.*24 does not divide") as caught:
        compare(config)
    assert "sdgf-stepwise, 1:8" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_folders_that_hold_something_else(done, copied, tmp_path):
    with pytest.raises(FileExistsError, match=r"nmflow compare resume="):
        compare(compared(out=str(copied)))
    with pytest.raises(FileNotFoundError, match="no comparison"):
        resume_compare(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"nmflow compare resume="):
        resume(copied)
    with pytest.raises(ValueError, match=r"nmflow train resume="):
        resume_compare(copied / "runs" / "dense-s0")


def test_a_run_that_was_done_otherwise(copied):
    text = (copied / "config.yaml").read_text()
    (copied / "config.yaml").write_text(text.replace("batch: 16", "batch: 32"))
    with pytest.raises(ValueError, match="done with another batch"):
        resume_compare(copied)
    assert MODEL["width"] == 32
