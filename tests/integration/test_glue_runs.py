"""Tasks of GLUE from their files to figures that other libraries find as well, and from runs to GLUE's table."""

from __future__ import annotations

import csv
import gzip
import json
import re
import statistics
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from language import HEADS, bert_folder, glue_folder
from safetensors.torch import load_file
from scipy import stats
from sklearn import metrics
from small_runs import one_run

from nmflow.cli import cli
from nmflow.experiments import compare
from nmflow.report.folder import RunFolder
from nmflow.report.page import write_page
from nmflow.report.plots import plot_training
from nmflow.report.tables import result_lines
from nmflow.train.config import CompareConfig, TrainConfig
from nmflow.train.data import load_data

pytest.importorskip("transformers", reason="the encoder comes from transformers, which is an extra")

CLASSES: dict[str, tuple[str, ...]] = {
    "MNLI": ("entailment", "neutral", "contradiction"), "QNLI": ("entailment", "not_entailment"),
    "RTE": ("entailment", "not_entailment"), "STS-B": (),
}  # fmt: skip
COLUMNS = {
    "CoLA": ("sentence", "label"), "SST-2": ("sentence", "label"), "MRPC": ("#1 String", "#2 String", "Quality"),
    "STS-B": ("sentence1", "sentence2", "score"), "QQP": ("question1", "question2", "is_duplicate"),
    "MNLI": ("sentence1", "sentence2", "gold_label"), "QNLI": ("question", "sentence", "label"),
    "RTE": ("sentence1", "sentence2", "label"), "WNLI": ("sentence1", "sentence2", "label"),
}  # fmt: skip


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bert_folder(tmp_path_factory.mktemp("models") / "bert")


def config(folder: Path, bert: Path, **changes: Any) -> TrainConfig:
    return TrainConfig(
        **{
            "data": {"name": "glue", "path": str(folder), "context": 48}, "model": f"transformers:{bert}",
            "pattern": "1:4", "steps": 8, "batch": 16, "optim": {"lr": 1e-4}, "eval_every": 4, "baseline": False,
            **changes,
        }
    )  # fmt: skip


def rows_of(file: Path, task: str) -> Iterator[dict[str, str]]:
    """The lines of an official file, read by the csv module."""
    content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    names = None if HEADS[task] else ["source", "label", "star", "sentence"]
    return csv.DictReader(content.decode("utf-8-sig").split("\n")[:-1], names, delimiter="\t", quoting=csv.QUOTE_NONE)  # type: ignore[return-value]  # dictionaries


def judged(folder: RunFolder, bert: Path, file: Path, task: str) -> dict[str, float]:
    """What scikit-learn and scipy say of the saved model, one item at a time through transformers alone."""
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    tokenizer, classes = AutoTokenizer.from_pretrained(bert), CLASSES.get(task, ("0", "1"))
    settings = AutoConfig.from_pretrained(bert, num_labels=max(1, len(classes)))
    model = AutoModelForSequenceClassification.from_config(settings).eval()
    model.load_state_dict(load_file(folder.model))
    given, expected = [], []
    for row in rows_of(file, task):
        *texts, label = (row[name] for name in COLUMNS[task])
        with torch.no_grad():
            logits = model(**tokenizer(*texts, truncation=True, max_length=48, return_tensors="pt")).logits[0]
        given.append(int(logits.argmax()) if classes else float(logits))
        expected.append(classes.index(label) if classes else float(label))
    assert len(set(given)) > 1, "a constant tells measures apart from nothing"
    if task == "STS-B":
        found = {"pearson": stats.pearsonr(given, expected)[0], "spearman": stats.spearmanr(given, expected)[0]}
    else:
        found = {"accuracy": metrics.accuracy_score(expected, given)}
        if task in ("MRPC", "QQP"):
            found["f1"] = metrics.f1_score(expected, given)
        if task == "CoLA":
            found["matthews"] = metrics.matthews_corrcoef(expected, given)
    return {**found, "items": len(given)}


def assert_judged_alike(score: dict[str, float], expected: dict[str, float]) -> None:
    assert {name: score[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    if "score" in score:
        pair = [value for name, value in expected.items() if name != "items"]
        assert score["score"] == pytest.approx(sum(pair) / 2, abs=1e-6)


def run_task(folder: Path, bert: Path, out: Path, **changes: Any) -> RunFolder:
    settings = config(folder, bert, **changes)
    return one_run(settings, out, load_data(settings.data, settings.tokenizer()))


def assert_figures(tmp_path: Path, bert: Path, task: str) -> dict[str, Any]:
    """Train a little on the files of tmp_path/task, and judge again; returns the result."""
    done = run_task(tmp_path / task, bert, tmp_path / "run")
    result: dict[str, Any] = json.loads(done.result.read_text())
    [file] = (tmp_path / task).glob("dev_matched.tsv*" if task == "MNLI" else "dev.tsv*")
    assert_judged_alike(result["test"], judged(done, bert, file, task))
    return result


@pytest.mark.parametrize("task", [task for task in HEADS if task != "MNLI"])
def test_figures_are_those_of_other_libraries(tmp_path: Path, bert: Path, task: str) -> None:
    glue_folder(tmp_path, task, train=60, test=45)
    result = assert_figures(tmp_path, bert, task)
    assert result["test"]["items"] == 45
    assert "mismatched" not in result["test"]


def test_mnli_is_judged_on_both_its_dev_sets(tmp_path: Path, bert: Path) -> None:
    """By the finalized model and by the compressed file; in result.json, at the end of the command, on the page."""
    folder = glue_folder(tmp_path, "MNLI", train=60, test=45)
    result = assert_figures(tmp_path, bert, "MNLI")
    done = RunFolder(tmp_path / "run")
    assert list(result["test"]) == ["loss", "accuracy", "items", "mismatched"]
    assert (result["test"]["items"], result["test"]["mismatched"]["items"]) == (45, 46)
    expected = judged(done, bert, folder / "dev_mismatched.tsv", "MNLI")
    assert_judged_alike(result["test"]["mismatched"], expected)
    assert_judged_alike(result["compressed"]["test"]["mismatched"], expected)
    right = round(46 * expected["accuracy"])
    ending = f", mismatched {100 * expected['accuracy']:.1f} % ({right} of 46)"
    assert [ending in line for line in result_lines(done)[:2]] == [True, True]
    plot_training(done.path, done.plot)
    write_page(done.path, done.page, "nmflow train")
    assert f"<td>sparse, finalized, mismatched</td><td class=number>{100 * expected['accuracy']:.2f} %" in (
        done.page.read_text()
    )


def test_a_missing_mismatched_set_is_said(tmp_path: Path, bert: Path) -> None:
    folder = glue_folder(tmp_path, "MNLI", train=60, test=45)
    (folder / "dev_mismatched.tsv").unlink()
    result = assert_figures(tmp_path, bert, "MNLI")
    done = RunFolder(tmp_path / "run")
    assert result["test"]["mismatched"] is None
    assert result["data"].endswith("; mismatched is missing")
    assert [", mismatched missing" in line for line in result_lines(done)[:2]] == [True, True]
    plot_training(done.path, done.plot)
    write_page(done.path, done.page, "nmflow train")
    assert "<td>sparse, finalized, mismatched</td><td class=number>missing</td>" in done.page.read_text()


@pytest.mark.parametrize("task", ["SST-2", "MRPC", "STS-B", "WNLI", "QNLI", "QQP", "MNLI"])
def test_figures_on_the_real_files(tmp_path: Path, shared_data: Path, task: str) -> None:
    """The first lines of each, with a vocabulary of their most frequent words."""
    source = shared_data / "glue" / task
    if not source.is_dir():
        pytest.skip(f"no {task} at {source.parent}")
    (tmp_path / task).mkdir()
    for file in source.glob("*.tsv.gz"):
        lines = gzip.decompress(file.read_bytes()).splitlines(keepends=True)[: 401 if "train" in file.name else 121]
        (tmp_path / task / file.stem).write_bytes(b"".join(lines))
    words = Counter(re.findall(r"[a-z]+|[^\sa-z]", (tmp_path / task / "train.tsv").read_text().lower()))
    bert = bert_folder(tmp_path / "bert", words=[word for word, _ in words.most_common(600)], spread=1.0)
    result = assert_figures(tmp_path, bert, task)
    assert result["test"]["items"] == (71 if task == "WNLI" else 120)


def test_comparisons_of_several_tasks_make_its_table(tmp_path: Path, bert: Path) -> None:
    """What `nmflow report` prints is the arithmetic of the runs; GLUE's averages need tasks that are not there."""
    figures: dict[str, list[float]] = {}
    for task in ("MRPC", "MNLI"):
        settings = config(glue_folder(tmp_path, task, train=60, test=45), bert, steps=4).model_dump(
            exclude={"pattern", "targets", "recipe", "seed", "baseline"}
        )
        out = tmp_path / "runs" / task
        done = compare(CompareConfig(**{**settings, "recipes": "ste", "pattern": "1:4", "seeds": 2, "out": str(out)}))
        tests = [json.loads((out / "runs" / f"ste-1-4-s{seed}" / "result.json").read_text())["test"] for seed in (0, 1)]
        assert not done.failed
        figures[task] = [test["score" if task == "MRPC" else "accuracy"] for test in tests]
        if task == "MNLI":
            figures["MNLI-mm"] = [test["mismatched"]["accuracy"] for test in tests]
    mean = [(mrpc + (m + mm) / 2) / 2 for mrpc, m, mm in zip(*figures.values(), strict=True)]
    folders = [str(tmp_path / "runs" / task) for task in ("MRPC", "MNLI")]
    asked = CliRunner().invoke(cli, ["report", *folders, "--tasks", "MRPC,MNLI"])
    assert asked.exit_code == 0, asked.output
    cells = [cell.strip() for cell in asked.output.splitlines()[2].strip("|").split("|")]
    assert cells[:3] == ["1:4", "ste", "2"]
    assert cells[3] == f"{50 * sum(mean):.1f} ± {100 * abs(mean[0] - mean[1]) / 2**0.5:.1f}"
    assert cells[4] == f"{50 * sum(figures['MNLI']):.1f} ± {100 * statistics.stdev(figures['MNLI']):.1f}"
    whole = json.loads(CliRunner().invoke(cli, ["report", *folders, "--json"]).output)["glue"]["rows"][0]
    assert whole["averages"]["overall"]["mean"] is whole["averages"]["leaderboard"]["mean"] is None
    assert whole["columns"]["MNLI-mm"]["values"] == figures["MNLI-mm"]
    refused = CliRunner().invoke(cli, ["report", str(tmp_path)])
    assert refused.exit_code == 2
    assert "neither a run nor a comparison" in refused.output
