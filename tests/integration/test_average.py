"""An average of the weights beside a run: its equation, what is reported of it, and that it comes back."""

from __future__ import annotations

import json

import pytest
import torch
from small_runs import MODEL, PowerCutError, assert_goes_on, assert_same_bits, failing, one_run, small, weights
from torch import nn

from nmflow.models import build_model
from nmflow.report.folder import RunFolder, read_metrics
from nmflow.report.tables import result_lines
from nmflow.runtime import verify
from nmflow.train import resume, train
from nmflow.train.average import Average
from nmflow.train.data import load_data
from nmflow.train.loop import prepare, take_step

OPTIM = {"lr": 0.01, "ema": 0.6}


@pytest.mark.parametrize("decay", [0.3, 0.999])
def test_the_average_is_the_one_of_the_equation(decay):
    """Over the dense weights, in float64; the first decay is reached at the third step, the second never here."""
    config = small(recipe="ste", optim={"lr": 0.01, "ema": decay})
    run = prepare(config, load_data(config.data))
    wanted = {name: p.detach().double() for name, p in run.state.model.named_parameters()}
    for done in range(1, 9):
        take_step(run, done - 1)
        kept = min(decay, (1 + done) / (10 + done))
        for name, p in run.state.model.named_parameters():
            wanted[name] = kept * wanted[name] + (1 - kept) * p.detach().double()
        for name, average in run.state.average.model.named_parameters():
            torch.testing.assert_close(average.double(), wanted[name], rtol=1e-5, atol=1e-7)
            assert not average.requires_grad


def test_running_means_are_averaged_and_counts_copied():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    average = Average(model, 0.5)
    assert not average.model.training
    model.train()(torch.randn(8, 4) + 5)
    means = [module.running_mean.double().clone() for module in (average.model[1], model[1])]
    average.update(model, 100)
    torch.testing.assert_close(average.model[1].running_mean.double(), (means[0] + means[1]) / 2, rtol=1e-6, atol=0)
    assert int(average.model[1].num_batches_tracked) == 1


# -- what is reported --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    """A finished run with an average, and a dense one beside it."""
    folder = tmp_path_factory.mktemp("runs") / "averaged"
    train(small(optim=OPTIM, steps=30, eval_every=10, baseline=True, out=str(folder)))
    return RunFolder(folder)


def pruned(state, part):
    """Tensors of one part of a checkpoint without its prefix; linear1 and linear2 keep the largest of every 8."""
    found = {name.removeprefix(f"{part}/"): t.clone() for name, t in state.items() if name.startswith(f"{part}/")}
    for name, weight in found.items():
        if name.endswith(("linear1.weight", "linear2.weight")):
            for row in weight:
                for block in row.split(8):
                    largest = int(block.abs().argmax())
                    block[[place for place in range(8) if place != largest]] = 0
    return found


def scores_of(model, split):
    """Accuracy and loss, one item at a time."""
    right, losses = 0, []
    with torch.no_grad():
        for index in range(len(split)):
            inputs, targets = split.batch(torch.tensor([index]))
            log_probability = model(inputs)[0].double().log_softmax(0)
            right += int(log_probability.argmax() == targets[0])
            losses.append(-float(log_probability[targets[0]]))
    return right / len(split), sum(losses) / len(losses)


def test_the_average_is_what_is_proved_and_measured(averaged):
    """Both networks again, from the checkpoint, with masks made by hand."""
    result, state = json.loads(averaged.result.read_text()), weights(averaged.checkpoint)
    config = small(optim=OPTIM)
    data = load_data(config.data)
    by_hand = {part: pruned(state, part) for part in ("average", "model")}
    saved = weights(averaged.model)
    assert [name for name in saved if not torch.equal(saved[name], by_hand["average"][name])] == []
    assert not torch.equal(saved["head.weight"], by_hand["model"]["head.weight"])
    assert result["weights"] == "average"
    for part, reported in (("average", result), ("model", result["raw"])):
        model = build_model(config.model, data).eval()
        model.load_state_dict(by_hand[part])
        for name in ("val", "test"):
            accuracy, loss = scores_of(model, getattr(data, name))
            assert reported[name]["accuracy"] == pytest.approx(accuracy, abs=0.003)
            assert reported[name]["loss"] == pytest.approx(loss, rel=1e-4)
    assert abs(result["test"]["loss"] - result["raw"]["test"]["loss"]) > 1e-3
    assert result["compressed"]["test"]["accuracy"] == pytest.approx(result["test"]["accuracy"], abs=0.003)
    assert verify(averaged.path).ok
    assert verify(averaged.compressed).ok


def test_the_log_has_the_scores_of_the_average(averaged):
    result = json.loads(averaged.result.read_text())
    last = [line for line in read_metrics(averaged.metrics) if "val_loss" in line][-1]
    assert last["val_loss"] == pytest.approx(result["val"]["loss"], rel=1e-5)
    assert abs(last["val_loss"] - result["raw"]["val"]["loss"]) > 1e-3


def test_both_are_told(averaged):
    result, text = json.loads(averaged.result.read_text()), "\n".join(result_lines(averaged))
    raw = result["raw"]["test"]["accuracy"]
    assert f"last weights:         {100 * raw:.1f} %" in text
    assert "all other figures are those of the weights' average" in text
    page = averaged.page.read_text()
    assert "sparse, finalized, average of the weights" in page
    assert "sparse, finalized, the last weights" in page
    assert f"{100 * raw:.2f} %" in page
    assert result["dense"]["weights"] == "average"
    assert result["dense"]["raw"]["test"]["items"] == 355


def test_without_an_average_nothing_is_said_of_one(tmp_path):
    folder = one_run(small(), tmp_path)
    result = json.loads(folder.result.read_text())
    assert (result["weights"], result["raw"]) == ("last", None)
    assert "last weights" not in "\n".join(result_lines(folder))
    assert not [name for name in weights(folder.checkpoint) if name.startswith("average")]


# -- resuming ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "mask_every", "died"),
    [("mdgf-exponential", 1, [6, 2, 5]), ("sdgf-stepwise", 3, [8]), ("snip", 1, [6]), ("idp", 1, [9])],
    ids=str,
)
def test_a_run_with_an_average_goes_on_to_the_same_bits(tmp_path, recipe, mask_every, died):
    settings = {"recipe": recipe, "mask_every": mask_every, "checkpoint_every": 2, "eval_every": 3, "optim": OPTIM}
    config = small(**settings, model={**MODEL, "dropout": 0.2}, data={"name": "digits", "augment": True})
    assert_goes_on(config, tmp_path, died)


def test_a_dense_run_has_an_average_too(tmp_path):
    config = small(recipe="dense", optim=OPTIM, checkpoint_every=2)
    whole = one_run(config, tmp_path / "whole")
    with pytest.raises(PowerCutError):
        one_run(config, tmp_path / "cut", failing(load_data(config.data), 6))
    cut = one_run(config, tmp_path / "cut")
    assert_same_bits(whole.checkpoint, cut.checkpoint)
    saved, state = weights(cut.model), weights(cut.checkpoint)
    assert [name for name in saved if not torch.equal(saved[name], state[f"average/{name}"])] == []


def test_a_checkpoint_without_the_average_is_refused(tmp_path):
    config = small(out=str(tmp_path / "r"))
    (tmp_path / "r").mkdir()
    with pytest.raises(PowerCutError):
        one_run(config, tmp_path / "r", failing(load_data(config.data), 12))
    (tmp_path / "r" / "config.yaml").write_text(small(optim=OPTIM).to_yaml())
    with pytest.raises(ValueError, match=r"optim\.ema: the checkpoint has None, this run 0\.6") as caught:
        resume(tmp_path / "r")
    assert "average/stem.weight: the checkpoint lacks this tensor" in str(caught.value)
