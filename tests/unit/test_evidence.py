"""Committed tables are what their runs say: rebuilt from the runs' JSON, nothing in them was typed by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nmflow.experiments.catalogue import find_table
from nmflow.experiments.reproduction import Place, Reproduction
from nmflow.experiments.studies import SCALES
from nmflow.report.side_by_side import SideBySide

EVIDENCE = Path(__file__).parents[2] / "docs" / "results" / "reproduce"
TABLES = sorted(path.parent.relative_to(EVIDENCE) for path in EVIDENCE.glob("*/*/table.json"))


def rebuilt(folder: Path, evidence: Path) -> list[str]:
    """What differs between a committed table and the one that its runs give."""
    scale, name = folder.parts
    result = Reproduction(find_table(name), Place(scale, evidence, Path("data"))).result()
    stored = json.loads((evidence / folder / "table.json").read_text(encoding="utf-8"))
    text = (evidence / folder / "table.md").read_text(encoding="utf-8")
    fresh = json.loads(json.dumps({"name": name, **result.to_dict()}))
    different = [f"{folder}: {key}" for key in fresh if fresh[key] != stored.get(key)]
    return different + ([] if text == "\n".join(result.lines()) + "\n" else [f"{folder}: table.md"])


@pytest.mark.parametrize("folder", TABLES, ids=str)
def test_a_committed_table_is_what_its_runs_say(folder: Path) -> None:
    if find_table(folder.name).kind == "flops":
        pytest.importorskip("timm", reason="ViT-Base comes from timm, which is an extra")
    assert folder.parts[0] in SCALES
    assert rebuilt(folder, EVIDENCE) == []


def test_readmes_figures_are_those_of_the_table() -> None:
    readme = (EVIDENCE.parents[2] / "README.md").read_text(encoding="utf-8")
    part = readme[readme.index("| task | FF at | dense |") :].split("\n\n")[0]
    head, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines()]
    stated, found = {}, {}
    for task, pattern, dense, *texts in lines:
        stated |= {(task, pattern, name): text for name, text in zip(head[2:], [dense, *texts], strict=True)}
    for task in dict.fromkeys(task for task, *_ in lines):
        table = Reproduction(find_table(task.lower()), Place("cpu", EVIDENCE, Path("data"))).result()
        assert isinstance(table, SideBySide)
        assert table.dense is not None
        for entry in table.entries:
            found[task, entry.row.removeprefix("ff="), entry.column] = entry.cell.text()
            found[task, entry.row.removeprefix("ff="), "dense"] = table.dense.text()
    assert stated == found


def test_there_is_evidence() -> None:
    assert TABLES
