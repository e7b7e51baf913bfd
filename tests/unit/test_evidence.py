"""Committed tables are what their runs say: rebuilt from the runs' JSON, nothing in them was typed by hand."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest

from nmflow.experiments.catalogue import find_table
from nmflow.experiments.reproduction import Place, Reproduction
from nmflow.experiments.studies import SCALES
from nmflow.report.side_by_side import SideBySide

EVIDENCE = Path(__file__).parents[2] / "docs" / "results" / "reproduce"
TABLES = sorted(path.parent.relative_to(EVIDENCE) for path in EVIDENCE.glob("*/*/table.json"))


def same(ours: Any, theirs: Any) -> bool:
    """Equal, numbers to their last bits: Python 3.10 rounds a standard deviation otherwise than 3.11 does."""
    if isinstance(ours, float) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=1e-12)
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, list) and isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return bool(ours == theirs)


def rebuilt(folder: Path, evidence: Path) -> list[str]:
    """What differs between a committed table and the one that its runs give."""
    scale, name = folder.parts
    result = Reproduction(find_table(name), Place(scale, evidence, Path("data"))).result()
    stored = json.loads((evidence / folder / "table.json").read_text(encoding="utf-8"))
    text = (evidence / folder / "table.md").read_text(encoding="utf-8")
    fresh = json.loads(json.dumps({"name": name, **result.to_dict()}))
    different = [f"{folder}: {key}" for key in fresh if not same(fresh[key], stored.get(key))]
    return different + ([] if text == "\n".join(result.lines()) + "\n" else [f"{folder}: table.md"])


@pytest.mark.parametrize("folder", TABLES, ids=str)
def test_a_committed_table_is_what_its_runs_say(folder: Path) -> None:
    if find_table(folder.name).kind == "flops":
        pytest.importorskip("timm", reason="ViT-Base comes from timm, which is an extra")
    assert folder.parts[0] in SCALES
    assert rebuilt(folder, EVIDENCE) == []


ROOT = EVIDENCE.parents[2]
PAGES = [page for page in (ROOT / "README.md", ROOT / "docs" / "choosing-a-recipe.md") if page.exists()]


def stated(text: str) -> dict[tuple[str, str, str], str]:
    """(task, pattern, recipe) -> figure, of every table of a page that begins with a task and a pattern."""
    found: dict[tuple[str, str, str], str] = {}
    for part in text.split("\n\n"):
        if part.startswith("| task | FF at | dense |"):
            head, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines()]
            for task, pattern, *figures in lines:
                found |= {(task, pattern, name): text for name, text in zip(head[2:], figures, strict=True)}
    return found


def kept(task: str) -> dict[tuple[str, str, str], str]:
    """The same of the table that is kept of a task."""
    table = Reproduction(find_table(task.lower()), Place("cpu", EVIDENCE, Path("data"))).result()
    assert isinstance(table, SideBySide)
    assert table.dense is not None
    found = {}
    for entry in table.entries:
        pattern = entry.row.removeprefix("ff=")
        found[task, pattern, entry.column] = entry.cell.text()
        found[task, pattern, "dense"] = table.dense.text()
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_figures_on_a_page_are_those_of_the_tables(page: Path) -> None:
    """And a dash stands where a table has no such recipe, nowhere else."""
    found = stated(page.read_text(encoding="utf-8"))
    assert found
    tables = {task: kept(task) for task in dict.fromkeys(task for task, *_ in found)}
    wrong = {place: text for place, text in found.items() if text != tables[place[0]].get(place, "-")}
    assert not wrong


@pytest.mark.parametrize(
    "runs",
    [
        "characters/sdgf-geometric-ff-1-128-lr-0.004",
        "characters-long/mdgf-exponential-ff-1-16-lr-0.004",
        "characters-long/sr-ste-ff-1-16-lr-0.008",
    ],
)
def test_runs_outside_of_the_tables_are_stated_as_they_came_out(runs: str) -> None:
    page = (ROOT / "docs" / "choosing-a-recipe.md").read_text(encoding="utf-8")
    results = (EVIDENCE / "cpu" / "runs").glob(f"{runs}-s*/result.json")
    values = [json.loads(path.read_text(encoding="utf-8"))["test"]["perplexity"] for path in results]
    assert len(values) == 3
    assert f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}" in page


def test_runs_that_were_done_again_are_stated_as_they_came_out() -> None:
    text = (EVIDENCE / "README.md").read_text(encoding="utf-8")
    again = sorted((EVIDENCE / "cpu" / "attention").iterdir())
    assert len(again) == 2
    for after in again:
        before = EVIDENCE / "cpu" / "runs" / "characters" / after.name
        results = [json.loads((run / "result.json").read_text(encoding="utf-8")) for run in (before, after)]
        assert results[0]["config"] == results[1]["config"]
        figures = " | ".join(f"{result['test']['perplexity']:.2f}" for result in results)
        assert f"| {results[0]['recipe']['name']} | {figures} |" in text


def test_there_is_evidence() -> None:
    assert TABLES
