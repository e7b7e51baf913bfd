"""The loop against a hand-written one, and everything a run leaves behind against its own files."""

from __future__ import annotations

import copy
import json
import math
import shlex
import socket
import threading
from importlib import metadata
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from processes import on
from safetensors.torch import save_file
from small_runs import GENTLE, MODEL, assert_same_bits, one_run, small, start, weights

from nmflow.models import build_model
from nmflow.report.folder import RunFolder, read_metrics
from nmflow.report.tables import result_lines
from nmflow.runtime import verify
from nmflow.schedules import recipe
from nmflow.train import load_config, train
from nmflow.train.config import TrainConfig
from nmflow.train.data import load_data
from nmflow.train.data.augment import mix
from nmflow.train.data.order import batch_indices, step_generator
from nmflow.train.flops import flops_of
from nmflow.train.loop import DivergedError, evaluate, prepare, take_step
from nmflow.train.run import reproduce_command

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One finished run with its baseline, read by many tests."""
    return train(small(baseline=True, steps=40, out=str(tmp_path_factory.mktemp("runs") / "one")))


# -- the loop ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [0.5, None])
def test_dense_loop_is_the_plain_one(tmp_path, clip):
    """Bit for bit what a page of plain torch gives: data order, augmentation, warm-up, cosine, clipping, AdamW."""
    optim = {"lr": 0.01, "warmup": 0.25, "clip": clip}
    config = small(recipe="dense", optim=optim, seed=3, data={"name": "digits", "augment": True})
    model, losses, norms = plain_run(config, clip, decay=lambda step: 1.0)
    folder = one_run(config, tmp_path)
    found = weights(folder.model)
    assert [name for name, p in model.state_dict().items() if not torch.equal(p, found[name])] == []
    lines = [line for line in read_metrics(folder.metrics) if "loss" in line]
    assert [line["loss"] for line in lines] == [losses[line["step"] - 1] for line in lines]
    assert [line["grad_norm"] for line in lines] == [norms[line["step"] - 1] for line in lines]


@pytest.mark.parametrize(
    ("recipe_config", "strength", "decay"),
    [
        ({"name": "sr-ste", "sr_ste": 0.05}, 0.05, lambda step: 0.0),
        # 12 steps: dense to step 1, D falls over steps 1 to 8
        ("mdgf-linear", 0.0, lambda step: max(0.0, min(1.0, 1 - (step - 1) / 7))),
    ],
    ids=["sr-ste", "mdgf-linear"],
)
def test_sparse_loop_is_the_plain_one(tmp_path, recipe_config, strength, decay):
    """The same page, with W~ put into the network by hand and the gradient at W~ given to W."""
    config = small(recipe=recipe_config, optim={**GENTLE, "warmup": 0.25, "clip": 0.5}, seed=3)
    model, losses, norms = plain_run(config, 0.5, decay, strength)
    folder = one_run(config, tmp_path)
    found = weights(folder.checkpoint)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[f"model/{name}"], parameter.detach(), rtol=1e-4, atol=1e-6)
    lines = [line for line in read_metrics(folder.metrics) if "loss" in line]
    assert [line["loss"] for line in lines] == pytest.approx([losses[line["step"] - 1] for line in lines], rel=1e-5)
    assert [line["grad_norm"] for line in lines] == pytest.approx([norms[line["step"] - 1] for line in lines], rel=1e-4)


def plain_run(config, clip, decay, strength=0.0):
    """(model, losses, gradient norms) of 12 steps of plain torch at seed 3; FF layers at 1:8 where D < 1."""
    data = load_data(config.data)
    torch.manual_seed(3)
    model = build_model(config.model, data)
    matrices = [p for name, p in model.named_parameters() if p.dim() > 1 and name != "position"]
    others = [p for name, p in model.named_parameters() if p.dim() == 1 or name == "position"]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, eps=config.optim.eps, fused=True)
    losses, norms = [], []
    for step in range(12):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * ((step + 1) / 4 if step < 3 else (1 + math.cos(math.pi * (step - 3) / 9)) / 2)
        generator = step_generator(3, step) if config.data.augment else None
        inputs, targets = data.train.batch(batch_indices(len(data.train), 16, 3, step), generator)
        seen, pruned = dict(model.named_parameters()), {}
        for name, weight in model.named_parameters():
            if decay(step) < 1 and name.endswith(("linear1.weight", "linear2.weight")):
                blocks = weight.detach().abs().unflatten(1, (-1, 8))
                pruned[name] = (blocks < blocks.amax(dim=2, keepdim=True)).flatten(1)
                sparse = weight.detach() * torch.where(pruned[name], decay(step), 1.0)
                seen[name] = weight - weight.detach() + sparse
        loss = F.cross_entropy(torch.func.functional_call(model, seen, inputs), targets)
        loss.backward()
        for name, mask in pruned.items():
            weight = model.get_parameter(name)
            weight.grad += strength * mask * weight.detach()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9 if clip is None else clip).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model, losses, norms


@pytest.mark.parametrize("name", ["mdgf-exponential", "sr-ste"])
def test_micro_batches_change_nothing(tmp_path, name):
    """λ of SR-STE included: it is added once an optimizer step."""
    changed = {"name": "sr-ste", "sr_ste": 0.05} if name == "sr-ste" else name
    runs = [one_run(small(recipe=changed, accumulate=k, optim=GENTLE), tmp_path / f"{k}") for k in (1, 4)]
    one, four = (weights(folder.checkpoint) for folder in runs)
    for tensor in one:
        torch.testing.assert_close(four[tensor], one[tensor], rtol=1e-3, atol=2e-5)
    losses = [[line["loss"] for line in read_metrics(folder.metrics) if "loss" in line] for folder in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_mixup_and_smoothing_in_the_loop(tmp_path):
    """A dense step of each micro-batch against targets as probabilities: blended, and spread over all classes."""
    config = small(
        recipe="dense", steps=3, accumulate=2, data={"name": "digits", "mixup": 0.4}, log_every=1,
        optim={"lr": 0.01, "label_smoothing": 0.2, "clip": None},
    )  # fmt: skip
    data = load_data(config.data)
    run = prepare(config, data)
    for step in range(3):
        model = copy.deepcopy(run.state.model)
        loss, _ = take_step(run, step)
        wanted = 0.0
        for micro in range(2):
            generator = step_generator(config.seed, step, micro * 8)
            inputs, targets = data.train.batch(batch_indices(len(data.train), 16, config.seed, step)[micro * 8 :][:8])
            mixed, order, part = mix(inputs, 0.4, generator)
            one_hot = F.one_hot(targets, 10).double()
            probability = 0.8 * (part * one_hot + (1 - part) * one_hot[order]) + 0.2 / 10
            wanted -= float((probability * model(mixed).double().log_softmax(-1)).sum()) / 8 / 2
        assert float(loss) == pytest.approx(wanted, rel=1e-5)


def test_a_step_is_a_function_of_seed_and_step():
    """Whatever was drawn or evaluated in between, dropout and augmentation included."""
    config = small(model={**MODEL, "dropout": 0.2}, data={"name": "digits", "augment": True})
    data = load_data(config.data)
    quiet, busy = prepare(config, data), prepare(config, data)
    for step in range(4):
        take_step(quiet, step)
        torch.rand(7)
        evaluate(busy.state.model, data, "val", "cpu")
        take_step(busy, step)
    for (name, a), b in zip(quiet.state.model.named_parameters(), busy.state.model.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_item_by_item(training):
    """In eval mode whatever the mode was, which stays; loss and accuracy over all items, the last batch included."""
    config = small(model={**MODEL, "dropout": 0.5})
    data = load_data(config.data)
    torch.manual_seed(0)
    model = build_model(config.model, data).train(training)
    score = evaluate(model, data, "test", "cpu")
    assert model.training is training
    assert score.items == len(data.test) > 256
    model.eval()
    losses, right = [], 0
    with torch.no_grad():
        for index in range(len(data.test)):
            inputs, targets = data.test.batch(torch.tensor([index]))
            log_probability = model(inputs)[0].double().log_softmax(0)
            losses.append(-log_probability[targets[0]].item())
            right += int(log_probability.argmax() == targets[0])
    assert score.loss == pytest.approx(math.fsum(losses) / len(losses), rel=1e-5)
    assert score.main == score.figures["accuracy"] == pytest.approx(right / len(losses), abs=0.003)


def test_seeds(tmp_path):
    first, again, other = (
        one_run(small(seed=seed), tmp_path / name) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert_same_bits(first.model, again.model)
    assert first.metrics.read_bytes() == again.metrics.read_bytes()
    assert not torch.equal(weights(first.model)["stem.weight"], weights(other.model)["stem.weight"])


def test_the_baseline_is_the_dense_run_of_the_same_settings(run, tmp_path):
    alone = train(small(recipe="dense", steps=40, out=str(tmp_path / "r")))  # has nothing to be a baseline for
    assert_same_bits(run.folder.dense.model, alone.folder.model)
    assert run.folder.dense.metrics.read_bytes() == alone.folder.metrics.read_bytes()
    dense, result = json.loads(alone.folder.result.read_text()), json.loads(run.folder.result.read_text())
    assert result["dense"]["test"] == dense["test"]
    assert dense["compressed"] is dense["verify"] is dense["dense"] is None
    assert not any("verified" in line for line in alone.lines())


# -- the log -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mdgf-linear", "sdgf-stepwise", "sr-ste"])
def test_the_log_says_what_the_recipe_does(tmp_path, name):
    folder = one_run(small(recipe=name, steps=25, log_every=7, eval_every=10), tmp_path)
    lines = read_metrics(folder.metrics)
    states = [line for line in lines if "phase" in line]
    stages = [recipe(name).at(step, 25, "1:8") for step in range(26)]
    kinds = [(stage.phase, stage.pattern) for stage in stages]
    changes = {step for step in range(1, 26) if kinds[step] != kinds[step - 1]}
    assert [line["step"] for line in states] == sorted({0, 7, 14, 21, 25} | changes)
    for line in states:
        stage = stages[line["step"]]
        assert (line["decay"], line["phase"], line["pattern"]) == (stage.decay, stage.phase, str(stage.pattern))
        assert line["density"] == pytest.approx(1.0 if stage.decay else stage.pattern.density)
    assert [line["step"] for line in lines if "val_loss" in line] == [10, 20, 25]
    assert all({"loss", "lr", "grad_norm", "flips"} <= line.keys() for line in states[1:])


def test_flips_are_the_entries_of_the_mask_that_changed(tmp_path):
    config = small(recipe="ste", log_every=1)
    run = prepare(config, load_data(config.data))
    before = None
    for step in range(4):
        take_step(run, step)
        masks = {n: m.weight != 0 for n, m in run.state.model.named_modules() if n.endswith(("linear1", "linear2"))}
        if before is not None:
            flips = sum(int((masks[name] != before[name]).sum()) for name in masks)
            assert run.state.sparsifier.report().flips == flips > 0
        before = masks


# -- what is left behind -----------------------------------------------------------------------------------------


def accuracy_of(model, split):
    """Test accuracy, one item at a time."""
    model.eval()
    right = 0
    with torch.no_grad():
        for index in range(len(split)):
            inputs, targets = split.batch(torch.tensor([index]))
            right += int(model(inputs)[0].argmax() == targets[0])
    return right / len(split)


def test_figures_agree_with_the_files(run):
    folder, config = run.folder, small(baseline=True, steps=40)
    result = json.loads(folder.result.read_text())
    data = load_data(config.data)
    model = build_model(config.model, data)
    model.load_state_dict(weights(folder.model))
    assert result["test"]["accuracy"] == pytest.approx(accuracy_of(model, data.test), abs=0.003)
    assert result["test"]["items"] == len(data.test)
    assert result["compressed"]["test"]["accuracy"] == pytest.approx(result["test"]["accuracy"], abs=0.003)
    assert result["compressed"]["bytes_before"] == folder.model.stat().st_size
    assert result["compressed"]["bytes_after"] == folder.compressed.stat().st_size < folder.model.stat().st_size
    assert result["dense"]["test"]["accuracy"] > 0.5 < result["test"]["accuracy"]
    last = read_metrics(folder.metrics)[-1]
    assert result["val"]["accuracy"] == last["val_accuracy"]
    assert result["val"]["loss"] == pytest.approx(last["val_loss"], rel=1e-5)
    assert result["parameters"] == sum(p.numel() for p in model.parameters())


def test_flops_of_the_run(run):
    """Batches of 16 images of 4 patches, width 32, hidden layer 64; sparse in the 12 steps after mask decay."""
    tokens, ff = 64, 2 * (2 * 64 * 32 * 64)
    dense = ff + 2 * tokens * (16 * 32 + 4 * 32 * 32) + 2 * (2 * 16 * 4 * 4 * 32) + 2 * 16 * 32 * 10
    flops = json.loads(run.folder.result.read_text())["flops"]
    assert flops == {
        "inputs": [16, 1, 8, 8],
        "forward": {"dense": dense, "sparse": dense - ff * 7 // 8},
        "training": {"dense": 40 * 3 * dense, "sparse": 40 * 3 * dense - 12 * 2 * ff * 7 // 8},
    }
    baseline = json.loads(run.folder.dense.result.read_text())["flops"]
    assert baseline["training"] == {"dense": 40 * 3 * dense, "sparse": 40 * 3 * dense}


def test_a_network_that_cannot_be_counted_is_no_reason_to_lose_a_run():
    config = small()
    run = prepare(config, load_data(config.data))
    run.state.model.lock = threading.Lock()  # cannot be copied
    assert "cannot pickle" in flops_of(run, run.state.model)["why_not"]


def test_weights_are_nm_in_the_file(run):
    """Counted block by block, without the package."""
    found = weights(run.folder.model)
    sparse = [name for name in found if name.endswith(("linear1.weight", "linear2.weight"))]
    assert len(sparse) == 2
    for name in sparse:
        rows, axis = found[name].shape
        for row, block in product(range(rows), range(axis // 8)):
            assert int((found[name][row, 8 * block : 8 * block + 8] != 0).sum()) <= 1
    assert (found["head.weight"] != 0).all()
    assert verify(run.folder.path).ok
    assert verify(run.folder.compressed).ok


def test_one_more_nonzero_is_found(run, tmp_path):
    found = weights(run.folder.model)
    name = "encoder.layers.0.linear1.weight"
    found[name][2, 8:16] = 1.0
    save_file(found, tmp_path / "model.safetensors")
    (tmp_path / "targets.json").write_bytes(run.folder.targets.read_bytes())
    report = verify(tmp_path)
    assert not report.ok
    assert "row 2, block 1" in "\n".join(report.lines())


def test_last_lines(run):
    text = "\n".join(run.lines())
    result = json.loads(run.folder.result.read_text())
    assert f"dense test accuracy:  {100 * result['dense']['test']['accuracy']:.1f} %" in text
    assert f"sparse test accuracy: {100 * result['test']['accuracy']:.1f} %" in text
    assert "verified: 2 of 2 layers are N:M" in text
    before, after = run.folder.model.stat().st_size, run.folder.compressed.stat().st_size
    assert f"bytes: {before:,} -> {after:,} ({before / after:.2f} times smaller)" in text
    assert str(run.folder.path) in text
    assert str(run.folder.plot) in text
    assert json.loads(json.dumps(run.to_dict()))["folder"] == str(run.folder.path)


def test_weights_that_are_left_out_are_named(tmp_path):
    changes = {"model": {**MODEL, "width": 24}, "pattern": "1:16", "remainder": "skip"}
    result = train(small(**changes, out=str(tmp_path / "run")))
    name, reason = "encoder.layers.0.linear1.weight", "16 does not divide 24"
    assert result.to_dict()["skipped"] == {name: reason}
    assert f"1 weight stays dense that targets asked for: {name} ({reason})" in result.lines()


def test_the_folder(run):
    found = {path.relative_to(run.folder.path).as_posix() for path in run.folder.path.rglob("*") if path.is_file()}
    both = {
        "config.yaml", "environment.json", "metrics.jsonl", "checkpoint.safetensors", "model.safetensors",
        "result.json",
    }  # fmt: skip
    own = {"targets.json", "compressed.safetensors", "training.png", "report.html"}
    assert found == both | own | {f"dense/{name}" for name in both}
    assert load_config(run.folder.config) == small(baseline=True, steps=40, out=str(run.folder.path))
    text = run.folder.environment.read_text()
    assert json.loads(text)["packages"]["torch"] == metadata.version("torch")
    assert [word for word in (socket.gethostname(), str(Path.home()), str(Path.cwd())) if word in text] == []


@pytest.mark.parametrize(
    "config",
    [
        small(),
        TrainConfig(),
        small(recipe={"name": "mdgf-linear", "dense": 0.1}, targets={"qk": "1:4", "head": None}),
        small(recipe=[{"recipe": "sdgf-stepwise", "until": 0.5, "pattern": "2:4"}, {"recipe": "ste", "until": 1.0}]),
        small(data="text:some 'odd' name.txt", model="lm-tiny", optim={"clip": None, "betas": (0.5, 0.25)}),
    ],
    ids=lambda config: str(config.recipe),
)
def test_the_command_trains_the_same_again(config):
    command = shlex.split(reproduce_command(config))
    assert command[:2] == ["nmflow", "train"]
    assert load_config(None, command[2:]) == config


# -- other runs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["snip", "idp", "sdgf-geometric"])
def test_recipes_of_every_mask_rule(tmp_path, name):
    folder = one_run(small(recipe=name, steps=20), tmp_path)
    assert "verified: 2 of 2 layers are N:M" in result_lines(folder)


def test_several_patterns(tmp_path):
    folder = one_run(small(targets={"ff": "1:8", "qk": "2:4"}), tmp_path)
    assert json.loads(folder.result.read_text())["pattern"] in ("1:8 + 2:4", "2:4 + 1:8")
    assert len(verify(folder.path).layers) > 2


def test_text(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    model = {"name": "lm-tiny", "width": 32, "depth": 1, "heads": 2}
    config = small(data={"name": "text", "path": str(text), "context": 16}, model=model)
    data = load_data(config.data)
    result = json.loads(one_run(config, tmp_path / "r").result.read_text())
    assert result["test"]["items"] == len(data.test) * 16
    assert result["test"]["loss"] < math.log(data.num_classes)


def test_half_precision_with_a_loss_scale_and_tensorboard(tmp_path):
    """Stopped at step 7 and resumed; the scale finds itself, and what it skips is no divergence."""
    pytest.importorskip("tensorboard", reason="TensorBoard is optional")
    process = start(str(HERE / "half_precision.py"), str(tmp_path))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    refusal, scale = out.splitlines()
    assert "Accelerate would compute in float32 on cpu" in refusal
    assert 1 < float(scale) < 2.0**26
    assert_same_bits(tmp_path / "whole" / "checkpoint.safetensors", tmp_path / "cut" / "checkpoint.safetensors")
    assert (tmp_path / "whole" / "metrics.jsonl").read_bytes() == (tmp_path / "cut" / "metrics.jsonl").read_bytes()
    norms = [line["grad_norm"] for line in read_metrics(tmp_path / "cut" / "metrics.jsonl") if "loss" in line]
    assert {norm is None for norm in norms} == {True, False}
    assert max(norm for norm in norms if norm is not None) < 100  # of the unscaled gradient
    assert {tensor.dtype for tensor in weights(tmp_path / "cut" / "model.safetensors").values()} == {torch.float32}
    assert len(list((tmp_path / "cut" / "tensorboard").glob("events*"))) == 2


ASKS = """
import sys; sys.path.insert(0, {here!r})
import torch, torch.nn.functional as F
from pathlib import Path
from small_runs import failing, one_run, small
from nmflow.train.data import load_data

query = torch.randn(1, 2, 19, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
in_float32, found = F.scaled_dot_product_attention(*[query.float()] * 3).bfloat16(), []

def ask():
    with torch.autocast("cpu", torch.bfloat16):
        found.append(torch.equal(F.scaled_dot_product_attention(query, query, query), in_float32))

config = small(precision="bf16", steps=3)
ask(); one_run(config, Path({folder!r}), failing(load_data(config.data), 2, ask)); ask()
print(found)
"""


def test_in_bf16_attention_is_computed_in_float32(tmp_path):
    """Asked in the middle of a run, where only the rule that holds there tells the two apart."""
    script = tmp_path / "asks.py"  # of its own: Accelerate has one precision a process
    script.write_text(ASKS.format(here=str(HERE), folder=str(tmp_path / "run")))
    status, out, err = on(1, script)
    assert (status, out) == (0, "[False, True, False]\n"), err


def test_two_processes_train_what_one_does(tmp_path):
    """The same batches, shared; only the main process writes. (`accelerate launch` starts processes like this.)"""
    script = tmp_path / "run.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
        f"import os; os.chdir({str(tmp_path)!r})\n"
        "from small_runs import small\nfrom nmflow.train import train\n"
        f"train(small(accumulate=2, optim={GENTLE}))\n"
    )
    process = start("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script))
    one = one_run(small(optim=GENTLE), tmp_path / "one")
    _, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    [two] = (RunFolder(path) for path in (tmp_path / "runs").iterdir())  # they agreed on one folder
    found, expected = weights(two.checkpoint), weights(one.checkpoint)
    for name in (name for name in expected if name.startswith("model/")):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4)
    lines, lines_of_one = read_metrics(two.metrics), read_metrics(one.metrics)
    assert [line["step"] for line in lines] == [line["step"] for line in lines_of_one]
    for line, other in zip(lines, lines_of_one, strict=True):
        if "loss" in line:
            assert (line["loss"], line["grad_norm"]) == pytest.approx((other["loss"], other["grad_norm"]), rel=1e-3)
        if "val_loss" in line:
            assert line["val_loss"] == pytest.approx(other["val_loss"], rel=1e-3)
            assert line["val_accuracy"] == pytest.approx(other["val_accuracy"], abs=0.012)
    assert json.loads(two.environment.read_text())["processes"] == 2


LEAVES = """
import sys
from torch import distributed
from nmflow.cli import cli

ended, end = [], distributed.destroy_process_group
distributed.destroy_process_group = lambda: (ended.append(distributed.is_initialized()), end())
cli(["train", *sys.argv[1:]], standalone_mode=False)
assert ended == [True], ended
assert not distributed.is_initialized()
"""


def test_the_command_takes_leave_of_the_other_processes(tmp_path):
    """Threads that still serve them may abort a process that ends."""
    script = tmp_path / "leaves.py"
    script.write_text(LEAVES)
    settings = ("steps=2", "eval_every=2", "baseline=false", "recipe=dense", f"out={tmp_path / 'run'}")
    process = start("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script), *settings)
    _, err = process.communicate(timeout=180)
    assert process.returncode == 0, err


def test_processes_that_do_not_find_each_other(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were started, and each finds itself alone"):
        train(small(out=str(tmp_path / "r")))
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(ValueError, match="accumulate="):
        train(small(out=str(tmp_path / "r")))
    assert not list(tmp_path.iterdir())


# -- what is refused ---------------------------------------------------------------------------------------------


def test_a_folder_that_is_taken(tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"nmflow train resume=.*out="):
        train(small(out=str(tmp_path / "r")))
    with pytest.raises(FileExistsError, match=r"out="):
        train(small(out=str(tmp_path / "r" / "thesis.txt")))
    assert [path.name for path in (tmp_path / "r").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pattern": "1:24"}, "24 does not divide it"),
        ({"batch": 1265}, "batch=1265 is more than the 1,264 items of the training split"),
        ({"targets": {"nobody": "1:4"}}, "matches nothing"),
        ({"steps": 3, "recipe": "sdgf-stepwise"}, "too short"),
        ({"model": "lm-tiny"}, "takes text"),
        ({"model": {**MODEL, "patch": 3}}, "does not divide an image"),
    ],
)
def test_what_cannot_run_leaves_no_folder(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        train(small(**changes, out=str(tmp_path / "r")))
    assert not list(tmp_path.iterdir())


def test_a_run_that_diverges_keeps_its_last_checkpoint(tmp_path):
    wild = {"lr": 1e30, "clip": None, "schedule": "constant"}
    with pytest.raises(DivergedError, match=r"step \d+: .*NaN or inf; the last checkpoint is from before; .*optim.lr"):
        train(small(optim=wild, checkpoint_every=1, out=str(tmp_path / "r")))
    found = weights(tmp_path / "r" / "checkpoint.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in found.values())
    assert not (tmp_path / "r" / "result.json").exists()
    with pytest.raises(DivergedError, match=r"val_loss NaN or inf; a smaller optim.lr"):
        train(small(optim=wild, log_every=99, checkpoint_every=99, eval_every=1, out=str(tmp_path / "s")))
