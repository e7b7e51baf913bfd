"""Runs that are stopped, killed or interrupted go on to the bits of the run that never was."""

from __future__ import annotations

import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from small_runs import (
    MODEL,
    PowerCutError,
    assert_goes_on,
    assert_same_bits,
    assert_same_run,
    failing,
    one_run,
    small,
    start,
)

from nmflow.report.folder import RunFolder, read_metrics
from nmflow.train import Interrupted, resume, train
from nmflow.train.checkpoint import Position, load_checkpoint
from nmflow.train.data import load_data
from nmflow.train.loop import fit, prepare
from nmflow.train.progress import Display
from nmflow.train.recorder import Recorder
from nmflow.train.stop import how_to_resume, resumable, stop_requests

STEPS = 12
RESTLESS = {"model": {**MODEL, "dropout": 0.2}, "data": {"name": "digits", "augment": True}}
"""A run that draws random numbers in every step."""


# -- in one process ----------------------------------------------------------------------------------------------

SEQUENCE = [
    {"recipe": "sdgf-stepwise", "until": 0.5, "pattern": "4:8"},
    {"recipe": "mdgf-linear", "until": 1.0, "pattern": None},
]


@pytest.mark.parametrize(
    ("recipe", "mask_every", "died"),
    [
        ("mdgf-exponential", 1, [4]), ("mdgf-exponential", 1, [6, 2, 5]), ("mdgf-linear", 3, [8]),
        ("sdgf-stepwise", 1, [7]), ("sr-ste", 1, [1, 11]), ("snip", 1, [6, 6]), ("idp", 1, [9]), (SEQUENCE, 1, [5, 4]),
    ],
    ids=str,
)  # fmt: skip
def test_a_run_that_dies_goes_on_from_its_last_checkpoint(tmp_path, recipe, mask_every, died):
    """Dying at the given batches, once after another; a checkpoint every 2 steps."""
    settings = {"recipe": recipe, "mask_every": mask_every, "checkpoint_every": 2, "steps": STEPS}
    config = small(**RESTLESS, **settings)
    assert_goes_on(config, tmp_path, died)


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory):
    """(configuration, weights, log) of a run that was asked nothing."""
    config = small(**RESTLESS, steps=STEPS, checkpoint_every=100, eval_every=3)
    folder = RunFolder(tmp_path_factory.mktemp("never-stopped"))
    run = prepare(config, load_data(config.data))
    with Recorder(folder, Position(), Display(None)) as recorder:
        fit(run, Position(), recorder, lambda: False, "")
    return config, run.state.model.state_dict(), folder.metrics.read_bytes()


@pytest.mark.parametrize("stopped", range(1, STEPS + 1))
def test_a_run_that_is_asked_to_stop_goes_on_from_that_very_step(tmp_path, never_stopped, stopped):
    config, finished, log = never_stopped
    data, folder = load_data(config.data), RunFolder(tmp_path)
    run = prepare(config, data)
    asked = iter(range(1, STEPS + 1))
    told = pytest.raises(Interrupted, match=f"step {stopped} of 12")
    with Recorder(folder, Position(), Display(None)) as recorder, told:
        fit(run, Position(), recorder, lambda: next(asked) == stopped, "nmflow ...")
    again = prepare(config.model_copy(update={"out": "moved"}), data)
    position = load_checkpoint(folder.checkpoint, again.state)
    assert position.step == stopped
    with Recorder(folder, position, Display(None)) as recorder:
        fit(again, position, recorder, lambda: False, "nmflow ...")
    for name, tensor in again.state.model.state_dict().items():
        assert torch.equal(tensor, finished[name]), name
    assert folder.metrics.read_bytes() == log


def test_every_line_of_the_log_stands_there_once(tmp_path):
    config = small(log_every=1, eval_every=1, checkpoint_every=4)
    with pytest.raises(PowerCutError):
        one_run(config, tmp_path, failing(load_data(config.data), 8))
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")][-1] == 7
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 8, "lo')  # what a killed process leaves
    one_run(config, tmp_path)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines if "phase" in line] == list(range(STEPS + 1))
    assert [line["step"] for line in lines if "val_loss" in line] == list(range(1, STEPS + 1))


def test_a_baseline_that_was_cut_is_finished_first(tmp_path):
    config = small(baseline=True, out=str(tmp_path / "cut"))
    train(small(baseline=True, out=str(tmp_path / "whole")))
    RunFolder(tmp_path / "cut").path.mkdir()
    (tmp_path / "cut" / "config.yaml").write_text(config.to_yaml())
    dense = config.model_copy(update={"recipe": "dense", "baseline": False})
    with pytest.raises(PowerCutError):
        one_run(dense, tmp_path / "cut" / "dense", failing(load_data(config.data), 8))
    assert "verified: 2 of 2 layers are N:M" in resume(tmp_path / "cut").lines()
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    for name in ("model.safetensors", "checkpoint.safetensors"):
        assert_same_bits(tmp_path / "whole" / "dense" / name, tmp_path / "cut" / "dense" / name)


def test_a_run_that_is_done_is_only_read(tmp_path):
    result = train(small(out=str(tmp_path / "r")))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "r").iterdir()}
    assert resume(tmp_path / "r").to_dict() == result.to_dict()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "r").iterdir()} == before
    (tmp_path / "r" / "report.html").unlink()
    resume(tmp_path / "r")
    assert (tmp_path / "r" / "report.html").exists()


def test_a_run_that_died_while_it_was_proven(tmp_path):
    """Everything after the last step is done again."""
    config = small(out=str(tmp_path / "r"))
    train(config)
    shutil.copytree(tmp_path / "r", tmp_path / "whole")
    for name in ("result.json", "report.html", "training.png", "compressed.safetensors"):
        (tmp_path / "r" / name).unlink()
    for name in (".model.safetensors.0badcafe.part", ".tmp6sFVoc"):
        (tmp_path / "r" / name).write_bytes(b"half")
    resume(tmp_path / "r")
    assert_same_run(tmp_path / "whole", tmp_path / "r")


# -- from outside ------------------------------------------------------------------------------------------------

COMMAND = [
    "model.width=32", "model.depth=1", "model.heads=2", "model.patch=4", "model.mlp_ratio=2.0", "model.dropout=0.1",
    "pattern=1:8", "batch=16", "optim.lr=0.01", "steps=60", "eval_every=30", "log_every=1", "checkpoint_every=5",
]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that never stopped, with the settings of COMMAND."""
    settings = {"steps": 60, "eval_every": 30, "log_every": 1, "checkpoint_every": 5, "baseline": True}
    path = tmp_path_factory.mktemp("runs") / "whole"
    train(small(model={**MODEL, "dropout": 0.1}, **settings, out=str(path)))
    return path


def wait_for(process, log: Path, lines: int):
    """Until a run in another process has logged so much."""
    until = time.monotonic() + 120
    while not log.exists() or log.read_bytes().count(b"\n") < lines:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.005)


def test_killed_and_resumed(tmp_path, whole):
    """SIGKILL in the dense and in the sparse run; a new process every time."""
    folder = tmp_path / "killed"
    process = start("-m", "nmflow", "train", *COMMAND, f"out={folder}")
    for log, lines in ((folder / "dense" / "metrics.jsonl", 23), (folder / "metrics.jsonl", 23)):
        wait_for(process, log, lines)
        process.kill()
        process.communicate()
        process = start("-m", "nmflow", "train", f"resume={folder}")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "verified: 2 of 2 layers are N:M" in out
    assert_same_run(whole, folder)
    assert (whole / "dense" / "metrics.jsonl").read_bytes() == (folder / "dense" / "metrics.jsonl").read_bytes()
    assert_same_bits(whole / "dense" / "model.safetensors", folder / "dense" / "model.safetensors")


def test_interrupted_and_resumed(tmp_path, whole):
    """Ctrl-C: exit code 130, a checkpoint, the command that goes on; and it does."""
    folder = tmp_path / "stopped"
    process = start("-m", "nmflow", "train", *COMMAND, f"out={folder}")
    wait_for(process, folder / "metrics.jsonl", 23)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    told = re.search(r"stopped after step (\d+) of 60, with a checkpoint; go on with: nmflow train resume=(\S+)", err)
    assert told is not None, err
    assert told[2] == str(folder)
    assert read_metrics(folder / "metrics.jsonl")[-1]["step"] == int(told[1])
    resume(folder)
    assert_same_run(whole, folder)


def test_signals_are_questions_while_they_are_asked():
    before = signal.getsignal(signal.SIGTERM)
    with stop_requests() as asked:
        assert not asked()
        signal.raise_signal(signal.SIGTERM)
        assert asked()
        with pytest.raises(KeyboardInterrupt):  # impatience
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_interrupt_between_steps_says_how_to_go_on():
    with pytest.raises(Interrupted, match="go on with: nmflow x"), resumable("nmflow x"):
        raise KeyboardInterrupt
    first = how_to_resume("nmflow y", "here")
    with pytest.raises(Interrupted) as caught, resumable("nmflow x"):
        raise first
    assert caught.value is first


# -- what is refused ---------------------------------------------------------------------------------------------


@pytest.fixture
def stopped(tmp_path):
    """A folder whose run died after step 10."""
    config = small(out=str(tmp_path / "r"))
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "config.yaml").write_text(config.to_yaml())
    with pytest.raises(PowerCutError):
        one_run(config, tmp_path / "r", failing(load_data(config.data), 12))
    return tmp_path / "r"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_no_run_here(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run to resume"):
        resume(tmp_path)


def test_other_settings_than_the_checkpoint_has(stopped):
    text = (stopped / "config.yaml").read_text()
    (stopped / "config.yaml").write_text(text.replace("seed: 0", "seed: 1").replace("lr: 0.01", "lr: 0.02"))
    before = contents(stopped)
    with pytest.raises(ValueError, match=r"(?s)optim.lr: .*0.01.*0.02.*seed: .*0.*1"):
        resume(stopped)
    assert contents(stopped) == before


def test_a_checkpoint_that_was_cut_short(stopped):
    content = (stopped / "checkpoint.safetensors").read_bytes()
    (stopped / "checkpoint.safetensors").write_bytes(content[:-1])
    before = contents(stopped)
    with pytest.raises(ValueError, match="cut short"):
        resume(stopped)
    assert contents(stopped) == before


def test_a_log_that_is_gone(stopped):
    (stopped / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match=r"metrics.jsonl: 0 bytes"):
        resume(stopped)
