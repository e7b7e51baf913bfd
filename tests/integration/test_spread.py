"""Several processes train what one does: each with a copy of the network (DDP), or with a part of it (FSDP2)."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from language import bert_folder, glue_folder
from processes import on
from small_runs import GENTLE, one_run, small, weights

from nmflow.report.folder import RunFolder, read_metrics
from nmflow.runtime import verify
from nmflow.train.checkpoint import remove_checkpoint
from nmflow.train.config import TrainConfig, load_config
from nmflow.train.data import load_data, share

HERE = Path(__file__).parent
CHECKS = (
    "recipes", "masks", "groups", "accumulation", "memory", "convolutions", "columns", "resume", "afterwards",
    "anew", "accelerate", "bf16", "probes", "refusals",
)  # fmt: skip
CHECKS = tuple(check for check in CHECKS if check != "columns" or find_spec("transformers"))  # GPT-2's layers


# -- the sparsifier ----------------------------------------------------------------------------------------------


SLOW = pytest.mark.slow


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=SLOW), pytest.param(4, marks=SLOW)])
def test_a_spread_model_is_what_one_process_has(processes: int) -> None:
    """Losses, norms, masks, reports, weights; three processes hold parts of different height."""
    status, out, err = on(processes, HERE / "spread_runs.py", *CHECKS)
    assert status == 0, err
    lines = [line for line in out.splitlines() if not line.startswith("[Gloo]")]  # which older versions of torch print
    assert " ".join(lines).split() == [word for check in CHECKS for word in (check, "agrees")]


# -- the loop ----------------------------------------------------------------------------------------------------


def train_on(processes: int, config: TrainConfig, folder: Path, dies: int | None = None) -> RunFolder:
    """Train in a folder, from wherever it is; with `dies` a process is killed before that step is done."""
    settings = folder.with_suffix(".yaml")
    settings.write_text(config.model_copy(update={"out": str(folder)}).to_yaml())
    status, _, err = on(processes, HERE / "spread_train.py", str(settings), *([] if dies is None else [str(dies)]))
    assert (status != 0) == (dies is not None), err
    assert RunFolder(folder).result.exists() == (dies is None)
    return RunFolder(folder)


def assert_same_curve(found: RunFolder, expected: RunFolder, tolerance: float = 1e-6) -> None:
    """The logs of two runs, line by line, and the finalized weights."""
    lines, others = read_metrics(found.metrics), read_metrics(expected.metrics)
    assert [line["step"] for line in lines] == [line["step"] for line in others]
    for line, other in zip(lines, others, strict=True):
        assert line.keys() == other.keys()
        for key in {"loss", "grad_norm", "val_loss"} & line.keys():
            assert line[key] == pytest.approx(other[key], rel=tolerance, abs=tolerance), (key, line["step"])
        for key in {"density", "flips", "phase", "pattern", "decay"} & line.keys():
            assert line[key] == other[key], (key, line["step"])
    for name, tensor in weights(expected.model).items():
        torch.testing.assert_close(weights(found.model)[name], tensor, rtol=0, atol=10 * tolerance)


@pytest.mark.parametrize("settings", [{"recipe": "mdgf-exponential"}, {"recipe": "ste", "mask_every": 3}], ids=str)
def test_a_spread_run_goes_on_on_any_number_of_processes(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Killed at step 8 of 12, on two; its checkpoint of step 5 goes on on one, two and four."""
    config = small(optim=GENTLE, shard=True, **settings)
    whole = one_run(config, tmp_path / "whole")
    killed = train_on(2, config, tmp_path / "killed", dies=8)
    assert json.loads(killed.shards.read_text())["step"] == 5
    assert len(list(killed.shards.parent.glob("step-00000005/*.safetensors"))) == 2
    for processes in (1, 2, 4) if "mask_every" not in settings else (2,):
        folder = tmp_path / f"on-{processes}"
        shutil.copytree(killed.path, folder)
        resumed = train_on(processes, config, folder)
        assert_same_curve(resumed, whole)
        assert verify(resumed.path).ok
        [kept] = (path for path in resumed.shards.parent.iterdir() if path.is_dir())
        assert kept.name == "step-00000012"
        remove_checkpoint(resumed.shards)
        assert (resumed.shards.parent.exists(), resumed.model.exists()) == (False, True)


def test_a_run_of_two_copies_is_killed_and_goes_on_alone(tmp_path: Path) -> None:
    config = small(optim=GENTLE)
    whole = one_run(config, tmp_path / "whole")
    train_on(2, config, tmp_path / "killed", dies=8)
    assert_same_curve(train_on(1, config, tmp_path / "killed"), whole)


@pytest.mark.parametrize(("shard", "like_lengths"), [(False, None), (True, None), (True, True)])
def test_two_processes_share_sentences(tmp_path: Path, shard: bool, like_lengths: bool | None) -> None:
    """GLUE: the sentences of a batch differ in length, and neither 18 nor a class parts evenly."""
    pytest.importorskip("transformers", reason="the networks come from transformers, which is an extra")
    glue, bert = glue_folder(tmp_path / "glue", "MRPC"), bert_folder(tmp_path / "bert")
    config = small(
        data={"name": "glue", "path": str(glue), "like_lengths": like_lengths},
        model={"name": f"transformers:{bert}", "dropout": 0.0}, optim=GENTLE, steps=6, shard=shard, pattern="1:4",
    )  # fmt: skip
    data = load_data(config.data, config.tokenizer())
    whole = one_run(config.model_copy(update={"shard": False}), tmp_path / "whole", data)
    assert_same_curve(train_on(2, config, tmp_path / "two"), whole, 2e-6)


@pytest.mark.parametrize("shard", [False, True])
def test_two_processes_share_text(tmp_path: Path, shard: bool) -> None:
    """A causal language model, in two micro-batches a step."""
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    model = {"name": "lm-tiny", "width": 32, "depth": 2, "heads": 2}
    config = small(
        data={"name": "text", "path": str(text), "context": 16}, model=model, optim=GENTLE, accumulate=2, shard=shard,
        recipe="sr-ste",
    )  # fmt: skip
    whole = one_run(config.model_copy(update={"shard": False}), tmp_path / "whole")
    assert_same_curve(train_on(2, config, tmp_path / "two"), whole, 2e-6)


def test_bf16_is_gathered_in_bf16(tmp_path: Path) -> None:
    """Weights stay float32, and the masks exact."""
    run = train_on(2, small(optim=GENTLE, shard=True, precision="bf16"), tmp_path / "run")
    assert {tensor.dtype for tensor in weights(run.model).values()} == {torch.float32}
    assert verify(run.path).ok


def test_the_configuration_for_64_gpus(tmp_path: Path) -> None:
    """Its batch parts over 64 processes; a few steps of it on two, with a small network and text."""
    path = Path(__file__).parents[2] / "examples" / "configs" / "llama-64-gpus.yaml"
    config = load_config(path)
    assert len({share(config.batch, process, 64, 0, config.accumulate).start for process in range(64)}) == 64
    assert config.shard
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    small_one = load_config(
        path,
        [f"data.path={text}", "data.context=16", "model=lm-tiny", "model.width=32", "model.depth=2", "model.heads=2",
         "batch=16", "accumulate=2", "steps=6", "eval_every=6", "checkpoint_every=4"],
    )  # fmt: skip
    run = train_on(2, small_one, tmp_path / "run")
    assert verify(run.path).ok


# -- what is refused ---------------------------------------------------------------------------------------------


def test_half_precision_with_a_loss_scale_is_refused() -> None:
    with pytest.raises(ValueError, match="use bf16"):
        small(shard=True, precision="fp16")


def test_shards_that_are_missing_or_cut_short(tmp_path: Path) -> None:
    """Said by name, before anything is changed."""
    config = small(shard=True, steps=6)
    run = one_run(config, tmp_path / "run")
    run.result.unlink()
    [shard] = run.shards.parent.glob("step-*/*.safetensors")
    content = shard.read_bytes()
    shard.write_bytes(content[:-10])
    with pytest.raises(ValueError, match=rf"{shard.name}: {len(content) - 10} bytes, written with {len(content)}"):
        one_run(config, run.path)
    shard.unlink()
    with pytest.raises(ValueError, match=rf"{shard.name}: missing"):
        one_run(config, run.path)
    found = json.loads(run.shards.read_text())
    run.shards.write_text(json.dumps({**found, "folder": "../elsewhere"}))
    with pytest.raises(ValueError, match="does not say where its tensors lie"):
        one_run(config, run.path)
    shard.write_bytes(content)
    run.shards.write_text(json.dumps(found))
    with pytest.raises(ValueError, match=r"optim\.lr"):
        one_run(small(shard=True, steps=6, optim={"lr": 0.5}), run.path)
    one_run(config, run.path)
