"""Every file of examples/configs loads, and runs for a few steps on a stand-in for its data with a smaller network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from image_folders import write_imagenet, write_packed, write_tiny_imagenet

from nmflow.train import load_config, train

FOLDER = Path(__file__).parents[2] / "examples" / "configs"


@dataclass(frozen=True)
class Case:
    """How a file is tried out: what writes its stand-in into a folder, and the settings that make it small.

    `write` returns the path to give as data.path; `needs` is the optional package without which it is skipped.
    """

    write: Callable[[Path], Path]
    settings: tuple[str, ...]
    needs: str | None = None


SMALL = ("steps=3", "batch=8", "eval_every=3", "checkpoint_every=3", "log_every=1", "baseline=false", "precision=no")
"""For all of them; Accelerate knows one precision a process, and other tests have chosen it."""

CASES = {
    "cifar10.yaml": Case(
        lambda folder: write_packed(folder, "cifar10", {"train": 40, "test": 10}),
        ("model.width=32", "model.depth=1", "model.heads=2"),
    ),
    "tiny-imagenet.yaml": Case(
        lambda folder: write_tiny_imagenet(folder, train=10, val=2),
        ("model.width=32", "model.depth=1", "model.heads=2", "model.patch=16"),
        needs="timm",
    ),
    "imagenet-1k.yaml": Case(
        lambda folder: write_imagenet(folder, classes=7, train=10, val=2),
        ("data.image_size=32", "model.width=32", "model.depth=1", "model.heads=2"),
        needs="timm",
    ),
}
"""A row for every file that takes images; those for text have tests of their own."""


def test_every_file_is_tried_somewhere():
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert set(CASES) <= {path.name for path in FOLDER.iterdir()}
    assert [path.name for path in FOLDER.iterdir() if path.stem not in tests] == []


@pytest.mark.parametrize("name", CASES)
def test_it_loads_and_its_data_lie_below_the_folder_one_stands_in(name):
    config = load_config(FOLDER / name)
    assert config.data.path is None or not Path(config.data.path).is_absolute()
    assert config.out is None


@pytest.mark.parametrize("name", CASES)
def test_it_runs_on_a_stand_in(tmp_path, name):
    case = CASES[name]
    if case.needs:
        pytest.importorskip(case.needs, reason=f"{name} needs the optional package {case.needs}")
    path = case.write(tmp_path / "data")
    config = load_config(FOLDER / name, [f"data.path={path}", f"out={tmp_path / 'run'}", *SMALL, *case.settings])
    result = train(config)
    assert any(line.startswith("verified: ") for line in result.lines())
