"""Runs that are probed: trained to the same bits, resumed with the same averages, alike on one process and on two."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from small_runs import GENTLE, PowerCutError, assert_goes_on, assert_same_bits, failing, one_run, small
from test_spread import train_on

from nmflow.experiments.collection import collect, find_runs
from nmflow.report.folder import RunFolder, read_metrics
from nmflow.report.plots_noise import noise_figure
from nmflow.train import train
from nmflow.train.data import load_data


def looks(folder: Path) -> list[dict[str, Any]]:
    """The lines of gradient noise in a log."""
    return [line for line in read_metrics(folder / "metrics.jsonl") if "grad_abs_var" in line]


def metadata(path: Path) -> dict[str, Any]:
    """What a checkpoint says beside its tensors."""
    content = path.read_bytes()
    [length] = struct.unpack("<Q", content[:8])
    found: dict[str, Any] = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["nmflow"])
    return found


@pytest.mark.parametrize("recipe", ["sr-ste", "mdgf-exponential"])
def test_probes_change_no_bit_of_training(tmp_path: Path, recipe: str) -> None:
    one_run(small(recipe=recipe), tmp_path / "plain")
    one_run(small(recipe=recipe, probe_every=2), tmp_path / "probed")
    for name in ("checkpoint.safetensors", "model.safetensors", "compressed.safetensors"):
        assert_same_bits(tmp_path / "plain" / name, tmp_path / "probed" / name)
    lines = read_metrics(tmp_path / "probed" / "metrics.jsonl")
    assert [line for line in lines if "grad_abs_var" not in line] == read_metrics(tmp_path / "plain" / "metrics.jsonl")
    seen = looks(tmp_path / "probed")
    assert [line["step"] for line in seen] == [2, 4, 6, 8, 10, 12]
    for line in seen:
        assert line.keys() == seen[0].keys()
        assert line["grad_abs_var"] > 0
        assert line["second_moment_var"] > 0
        assert 0 <= line["flip_rate"] <= 1


def test_gradients_are_seen_edited_and_not_yet_clipped(tmp_path: Path) -> None:
    """Of the first step: clipping shrinks what Adam sees and not what is looked at, SR-STE's term is in it."""
    first = {}
    for name, clip, strength in (("plain", None, 2e-4), ("clipped", 1e-3, 2e-4), ("strong", None, 10.0)):
        recipe = {"name": "sr-ste", "sr_ste": strength}
        config = small(recipe=recipe, optim={"lr": 0.01, "clip": clip}, probe_every=1, steps=2)
        first[name] = looks(one_run(config, tmp_path / name).path)[0]
    assert first["clipped"]["grad_abs_var"] == first["plain"]["grad_abs_var"]
    assert first["clipped"]["second_moment_var"] < 1e-3 * first["plain"]["second_moment_var"]
    assert first["strong"]["grad_abs_var"] > 2 * first["plain"]["grad_abs_var"]


@pytest.mark.parametrize("died", [[4], [6, 2, 5], [12]], ids=str)
def test_a_probed_run_goes_on_to_the_same_averages(tmp_path: Path, died: list[int]) -> None:
    config = small(recipe="sr-ste", probe_every=3, checkpoint_every=2)
    assert_goes_on(config, tmp_path, died)
    one, two = (metadata(tmp_path / name / "checkpoint.safetensors")["probe"] for name in ("whole", "cut"))
    assert one == two
    assert one["pooled"]["grad_abs_var"][1] == 4


def test_a_spread_run_goes_on_to_the_same_averages(tmp_path: Path) -> None:
    """Its checkpoint is another kind of file."""
    config = small(shard=True, probe_every=3)
    one_run(config, tmp_path / "whole")
    with pytest.raises(PowerCutError):
        one_run(config, tmp_path / "cut", failing(load_data(config.data), 8))
    one_run(config, tmp_path / "cut")
    one, two = (json.loads(RunFolder(tmp_path / name).shards.read_text())["probe"] for name in ("whole", "cut"))
    assert one == two
    assert looks(tmp_path / "whole") == looks(tmp_path / "cut")


def stopped(folder: Path, **changes: Any) -> Path:
    """A run that died after the checkpoint of step 5; its checkpoint."""
    config = small(**changes)
    with pytest.raises(PowerCutError):
        one_run(config, folder, failing(load_data(config.data), 8))
    return folder / "checkpoint.safetensors"


def rewrite(path: Path, **changes: Any) -> None:
    tensors, meta = load_file(path), metadata(path)
    save_file(tensors, path, metadata={"nmflow": json.dumps({**meta, **changes})})


def test_a_checkpoint_that_is_older_than_probes(tmp_path: Path) -> None:
    path = stopped(tmp_path)
    meta = metadata(path)
    del meta["probe"], meta["config"]["probe_every"]
    save_file(load_file(path), path, metadata={"nmflow": json.dumps(meta)})
    one_run(small(), tmp_path)
    assert looks(tmp_path) == []


def test_a_checkpoint_with_another_probe_is_refused(tmp_path: Path) -> None:
    path = stopped(tmp_path, probe_every=2)
    with pytest.raises(ValueError, match="probe_every: the checkpoint has 2, this run None"):
        one_run(small(), tmp_path)
    state = metadata(path)["probe"]
    for probe, words in (
        (None, "probe_every: only one of the checkpoint and this run has a probe"),
        ({**state, "every": 9}, "probe: every: the state has 9, this probe 2"),
        ([1, 2], "probe: not a probe's state"),
    ):
        rewrite(path, probe=probe)
        content = path.read_bytes()
        with pytest.raises(ValueError, match=words):
            one_run(small(probe_every=2), tmp_path)
        assert path.read_bytes() == content
    rewrite(path, probe=state)
    one_run(small(probe_every=2), tmp_path)
    assert len(looks(tmp_path)) == 6


def test_a_run_with_a_baseline_is_probed_twice_and_drawn(tmp_path: Path) -> None:
    """Plot and page of the run, tables with runs that are not probed, and the plot of the noise."""
    config = small(probe_every=3, baseline=True, recipe="sr-ste", out=str(tmp_path / "run"))
    assert "verified: 2 of 2 layers are N:M" in train(config).lines()
    train(small(seed=1, baseline=True, recipe="sr-ste", out=str(tmp_path / "quiet")))
    sparse, dense = looks(tmp_path / "run"), looks(tmp_path / "run" / "dense")
    assert [line["step"] for line in sparse] == [line["step"] for line in dense] == [3, 6, 9, 12]
    assert {line["flip_rate"] for line in dense} == {0.0}
    probes = [metadata(RunFolder(tmp_path / "run" / part).checkpoint)["probe"] for part in (".", "dense")]
    assert list(probes[0]["layers"]) == list(probes[1]["layers"])
    [cells] = collect([tmp_path / "run", tmp_path / "quiet"]).cells.values()
    assert [cell.n for cell in cells] == [2, 2]
    figure = noise_figure([found.label for found in find_runs(tmp_path / "run")])
    assert [line.get_label() for line in figure.axes[0].lines] == ["dense", "sr-ste"]


def test_a_probe_that_would_never_look() -> None:
    with pytest.raises(ValueError, match="13 is more than the 12 steps of the run"):
        small(probe_every=13)


@pytest.mark.parametrize("shard", [False, True])
def test_two_processes_see_what_one_sees(tmp_path: Path, shard: bool) -> None:
    """Copies of the network (DDP), and parts of it (FSDP2): the figures are those of whole weights."""
    config = small(recipe="sr-ste", probe_every=3, optim=GENTLE)
    expected = looks(one_run(config, tmp_path / "whole").path)
    config = config.model_copy(update={"shard": shard})
    found = looks(train_on(2, config, tmp_path / "two").path)
    assert [line["step"] for line in found] == [3, 6, 9, 12]
    for line, other in zip(found, expected, strict=True):
        assert line == pytest.approx(other, rel=1e-4, abs=0)
