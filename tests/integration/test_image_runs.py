"""Runs on folders of images with everything random at once: they resume, and processes see what micro-batches see."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from image_folders import write_imagenet, write_packed
from processes import on
from small_runs import GENTLE, PowerCutError, assert_goes_on, assert_same_run, failing, one_run, small, weights

from nmflow.report.folder import RunFolder
from nmflow.report.tables import result_lines
from nmflow.train.data import load_data
from nmflow.train.data.augment import mix
from nmflow.train.data.order import batch_indices, step_generator
from nmflow.train.loop import prepare, take_step

HERE = Path(__file__).parent
CHANGES = {"augment": "rand-m9-mstd0.5-inc1", "erase": 0.3, "mixup": 0.4}


def restless(root, data=None, **changes):
    """RandAugment, erasing and mixup, with an average of the weights; on photographs random crops as well."""
    pytest.importorskip("timm", reason="timm is not installed")
    data = {"name": "images", "path": str(root), **CHANGES, **(data or {})}
    settings = {"steps": 8, "checkpoint_every": 3, "optim": {"lr": 0.01, "ema": 0.9}}
    return small(data=data, **{**settings, **changes})


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return write_imagenet(tmp_path_factory.mktemp("data") / "imagenet", classes=7, train=11, val=3)


@pytest.mark.parametrize("died", [[5], [2, 1, 6]], ids=str)
def test_a_run_on_photographs_goes_on_to_the_same_bits(tmp_path, photographs, died):
    config = restless(photographs, {"image_size": 16})
    assert_goes_on(config, tmp_path, died)
    whole = RunFolder(tmp_path / "whole")
    result = json.loads(whole.result.read_text())
    assert result["test"].keys() == {"loss", "accuracy", "top5", "items"}
    assert 0 < result["test"]["top5"] <= 1
    assert "verified: 2 of 2 layers are N:M" in result_lines(whole)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_binary_loss_of_blended_targets(photographs, accumulate):
    """A step against targets as probabilities: blended, spread, and a question of yes or no for every class."""
    optim = {"lr": 0.01, "loss": "bce", "label_smoothing": 0.1, "clip": None}
    config = restless(photographs, {"image_size": 16}, recipe="dense", accumulate=accumulate, optim=optim)
    data = load_data(config.data)
    run = prepare(config, data)
    indices, size, wanted = batch_indices(len(data.train), 16, 0, 0), 16 // accumulate, 0.0
    for micro in range(accumulate):
        generator = step_generator(0, 0, micro * size)
        inputs, targets = data.train.batch(indices[micro * size :][:size], generator)
        mixed, order, part = mix(inputs, 0.4, generator)
        one_hot = F.one_hot(targets, 7).double()
        wished = 0.9 * (part * one_hot + (1 - part) * one_hot[order]) + 0.1 / 7
        yes = run.state.model(mixed).detach().double().sigmoid()
        wanted -= float((wished * yes.log() + (1 - wished) * (1 - yes).log()).mean()) / accumulate
    loss, _ = take_step(run, 0)
    assert float(loss) == pytest.approx(wanted, rel=1e-5)


def processes_or_rounds(root, accumulate):
    """A run on packed images whose two shares of a batch are two processes' or two micro-batches'."""
    return restless(root, accumulate=accumulate, steps=6, checkpoint_every=6, optim={**GENTLE, "ema": 0.5})


def test_two_processes_see_what_two_micro_batches_see(tmp_path):
    """Policies draw from global streams, which every process has of its own; the images come out the same."""
    data = write_packed(tmp_path / "data", "some", {"train": 80, "val": 20}, size=16, classes=2)
    script = tmp_path / "run.py"
    script.write_text(
        f"import os, sys; sys.path[:0] = {[str(HERE), str(HERE.parent)]!r}; os.chdir({str(tmp_path)!r})\n"
        "from test_image_runs import processes_or_rounds\nfrom nmflow.train import train\n"
        f"train(processes_or_rounds({str(data)!r}, 1))\n"
    )
    one = one_run(processes_or_rounds(data, 2), tmp_path / "one")
    status, _, err = on(2, script)
    assert status == 0, err
    [two] = (RunFolder(path) for path in (tmp_path / "runs").iterdir())
    found, expected = weights(two.checkpoint), weights(one.checkpoint)
    for name in (name for name in expected if name.startswith(("model/", "average/"))):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4)


def test_the_real_half_of_tiny_imagenet(tmp_path, shared_data):
    """Trained, judged by both accuracies, stopped and resumed."""
    folder = shared_data / "tinyimagenet32_a"
    if not folder.is_dir():
        pytest.skip(f"no Tiny ImageNet at {folder}")
    config = restless(folder, model={"name": "vit-tiny", "width": 32, "depth": 1, "heads": 2, "patch": 16})
    data = load_data(config.data)
    for split, each in ((data.train, 450), (data.val, 50), (data.test, 50)):
        assert Counter(split.labels.tolist()) == dict.fromkeys(range(100), each)
    whole = one_run(config, tmp_path / "whole", data)
    with pytest.raises(PowerCutError):
        one_run(config, tmp_path / "cut", failing(data, 5))
    one_run(config, tmp_path / "cut", data)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    result = json.loads(whole.result.read_text())
    assert result["test"]["items"] == 5000
    assert result["test"]["accuracy"] < result["test"]["top5"]
