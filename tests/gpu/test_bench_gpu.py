"""The benchmark on a GPU, at toy sizes: here on the CPU, with the kernels in the interpreter; what is told of it."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from test_product import DEVICE

from nmflow.bench.cells import DENSE, OURS
from nmflow.bench.gpu import networks, products, run
from nmflow.bench.gpu.cells import ARGSORT, BF16, COPY, CSR, EAGER, MASKS, NETWORK, TF32, GpuCell
from nmflow.bench.gpu.device import GpuSetup, ceilings
from nmflow.bench.gpu.networks import measure_network, measure_training
from nmflow.bench.gpu.places import OF_COPY, OVER_ARGSORT, OVER_DENSE, SHARE, Goal, Place, places
from nmflow.bench.gpu.products import measure_masks, measure_product, random_weight
from nmflow.bench.gpu.run import GpuResult, bench_gpu
from nmflow.bench.output import write
from nmflow.bench.settings import GPU_PARTS, GpuSettings
from nmflow.cli import cli
from nmflow.ops.gpu import available, choice, linear, measure, project
from nmflow.pattern import Pattern

SETUP = GpuSetup("A GPU", 80.0, "9.0", "2.15", "13.2", "3.9", "801", "3.11", "0.1", {"copy GB/s": 3000.0})
PRODUCT = Place("decode", "32x48", "1:16", 3, "float32", (Goal(OVER_DENSE, 1.5),))


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The interpreter's device counts as one that Triton runs on, and nothing has been measured."""
    if DEVICE == "cpu":
        monkeypatch.setattr(available, "why_not", lambda device=None: None)
    monkeypatch.setattr(linear, "plan", choice.Plan())
    return


@pytest.mark.usefixtures("kernels")
def test_a_product_is_tuned_and_timed_beside_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "candidates", lambda key: choice.candidates(key)[:1])
    cell = measure_product(PRODUCT, DEVICE, seconds=0.0)
    assert {OURS, DENSE, TF32, BF16, CSR} <= set(cell.us)
    assert all(taken > 0 for taken in cell.us.values())
    assert cell.figures == {OVER_DENSE: cell.us[DENSE] / cell.us[OURS]}
    assert cell.way == next(iter(linear.plan.choices.values())).line()
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.usefixtures("kernels")
def test_a_contender_that_fails_is_noted_and_the_others_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "candidates", lambda key: [])

    def fail(*arguments: object) -> products.Calls:
        raise RuntimeError("no cuSPARSE here\nwith a long tail")

    monkeypatch.setattr(products, "_csr_calls", fail)
    cell = measure_product(PRODUCT, DEVICE, seconds=0.0)
    assert CSR not in cell.us
    assert {OURS, DENSE} <= set(cell.us)
    assert f"{CSR}: no cuSPARSE here" in cell.notes


@pytest.mark.parametrize("pattern", ["2:4", "1:8v4"])
def test_the_weights_that_are_timed_have_their_pattern(pattern: str) -> None:
    form = Pattern.parse(pattern)
    dense = random_weight((24, 32), form, torch.float32, DEVICE).dense().cpu()
    blocks = (dense != 0).reshape(24 // form.v, form.v, -1, form.m).any(1).sum(-1)
    assert blocks.eq(form.n).all()


def test_mask_steps_are_timed_unless_they_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place("masks", "16x32", "2:4", 0, "float32")
    cell = measure_masks(place, DEVICE, seconds=0.0)
    us = cell.us
    assert cell.figures == {OF_COPY: us[COPY] / us[OURS], OVER_ARGSORT: us[ARGSORT] / us[OURS]}

    def wrong(*arguments: object) -> bool:
        warnings.warn("Triton's projection is wrong", stacklevel=1)
        return False

    monkeypatch.setattr(project, "agreement", wrong)
    assert measure_masks(place, DEVICE) == GpuCell(place, notes=("Triton's projection is wrong",))


def test_a_network_is_timed_where_its_outputs_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        monkeypatch.setattr(networks, "_compiled", lambda model: model)  # what the compiler of a CPU does, says nothing
    place = Place("network", "vit-tiny", "1:8", 2, "bfloat16")
    cell = measure_network(place, DEVICE, seconds=0.0)
    assert set(cell.us) == {EAGER, NETWORK, OURS}
    assert cell.figures == {OVER_DENSE: cell.us[NETWORK] / cell.us[OURS]}
    monkeypatch.setattr(networks, "_TOLERANCE", -1.0)
    with pytest.raises(ArithmeticError, match="outputs differ"):
        measure_network(place, DEVICE, seconds=0.0)


def test_the_masks_part_of_a_training_step() -> None:
    cell = measure_training(Place("train", "vit-tiny", "2:4", 2, "bfloat16"), DEVICE, seconds=0.0)
    assert cell.figures == {SHARE: cell.us[MASKS] / cell.us[OURS]}
    assert min(cell.us.values()) > 0


def test_tf32_is_as_it_was_afterwards() -> None:
    for before in (False, True, False):
        torch.backends.cuda.matmul.allow_tf32 = before
        with products.allowing_tf32(not before):
            assert torch.backends.cuda.matmul.allow_tf32 != before
        assert torch.backends.cuda.matmul.allow_tf32 == before


def test_ceilings_are_positive() -> None:
    found = ceilings(DEVICE, 32, 1, 0.0)
    assert list(found) == ["bfloat16 TFLOP/s", "TF32 TFLOP/s", "float32 TFLOP/s", "copy GB/s"]
    assert min(found.values()) > 0


# ------------------------------------------------------------------------------------------------ the run
def test_every_part_has_places_with_goals() -> None:
    found = list(places(GpuSettings()))
    assert {place.part for place in found} == set(GPU_PARTS)
    assert all(place.goals for place in found)
    assert len({place.name for place in found}) == len(found)
    assert {place.part for place in places(GpuSettings(parts=("masks",)))} == {"masks"}


def test_without_a_gpu_everything_is_unmeasured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(cli, ["bench", "gpu", "parts=decode,masks", f"out={tmp_path}"])
    assert done.exit_code == 0, done.output
    assert "no CUDA device: nothing was measured" in done.stdout
    result = GpuResult.from_dict(json.loads((tmp_path / "results.json").read_text()))
    assert not any(cell.us or cell.figures for cell in result.cells)
    assert "0 reached, 0 missed" in done.stdout
    table = (tmp_path / "table.md").read_text()
    assert "| 14336x4096 | 1:8 | 1 | unmeasured / 3.2 |" in table
    assert "NO" not in table


def test_a_failing_place_costs_itself_alone_and_late_ones_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 2.0, 1000.0, 1001.0])

    def product(place: Place) -> GpuCell:
        if place.pattern == "2:4":
            raise RuntimeError("out of memory")
        return GpuCell(place, {OURS: 10.0, DENSE: 20.0})

    monkeypatch.setattr(run, "examine", lambda: SETUP)
    monkeypatch.setattr(run, "measure_product", product)
    monkeypatch.setattr(run.time, "monotonic", lambda: next(clock, 2000.0))
    told: list[str] = []
    kept: list[GpuResult] = []
    found = bench_gpu(GpuSettings(parts=("decode",), minutes=1), told.append, kept.append)
    assert [sum(bool(cell.us or cell.notes) for cell in each.cells) for each in kept] == [1, 2]
    assert all(len(each.cells) == len(found.cells) for each in kept)
    assert found.cells[0].notes == ("failed: out of memory",)
    assert found.cells[1].figures == {OVER_DENSE: 2.0}
    assert all(cell.notes == ("the minutes were over",) for cell in found.cells[2:])
    assert told[:3] == SETUP.lines()
    assert len(told) == 3 + len(found.cells)


def test_figures_stand_beside_their_goals() -> None:
    good = GpuCell(PRODUCT, {OURS: 10.0, DENSE: 20.0}, "gather rows=256", ("a note",))
    bad = GpuCell(dataclasses.replace(PRODUCT, pattern="1:8"), {OURS: 10.0, DENSE: 10.0}, "dense")
    share = Place("train", "vit-tiny", "2:4", 8, "bfloat16", (Goal(SHARE, 0.02, at_most=True),))
    slow = GpuCell(share, {OURS: 100.0, DENSE: 90.0, MASKS: 3.0})
    quick = GpuCell(dataclasses.replace(share, pattern="1:8"), {OURS: 100.0, DENSE: 90.0, MASKS: 1.0})
    unknown = GpuCell(dataclasses.replace(PRODUCT, pattern="1:4"))
    result = GpuResult(SETUP, (good, bad, unknown, slow, quick))
    assert result.summary() == [
        "goals: 2 reached, 2 missed, 1 unmeasured",
        "  decode 32x48 1:8 float32, 3 tokens: 1 times dense, goal at least 1.5",
        "  train vit-tiny 2:4 bfloat16, 8 images: 0.03 part of the step, goal at most 0.02",
    ]
    table = result.markdown()
    assert "| 32x48 | 1:16 | 3 | 2 / 1.5 | gather rows=256 |" in table
    assert "| 32x48 | 1:8 | 3 | 1 / 1.5 ! | dense |" in table
    assert "| 32x48 | 1:4 | 3 | unmeasured / 1.5 |  |" in table
    assert "| vit-tiny | 2:4 | 8 | 0.03 / 0.02 ! |" in table
    assert "| vit-tiny | 1:8 | 8 | 0.01 / 0.02 |" in table
    assert "goal 1.5 yes" in good.line()
    assert f"{DENSE} 20 us x2.00" in good.line()
    assert "goal 1.5 NO" in bad.line()


def test_results_survive_json_and_other_files_are_refused(tmp_path: Path) -> None:
    result = GpuResult(SETUP, (GpuCell(PRODUCT, {OURS: 10.0, DENSE: 20.0}, "dense", ("a note",)),))
    write(result, tmp_path)
    found = json.loads((tmp_path / "results.json").read_text())
    assert GpuResult.from_dict(found) == result
    assert (tmp_path / "table.md").read_text() == result.markdown()
    with pytest.raises(ValueError, match="no results of nmflow bench gpu"):
        GpuResult.from_dict({**found, "version": 99})


def test_the_committed_table_is_that_of_its_results() -> None:
    folder = Path(__file__).parents[2] / "docs/results/bench-gpu"
    result = GpuResult.from_dict(json.loads((folder / "results.json").read_text()))
    assert (folder / "table.md").read_text() == result.markdown()
    assert {cell.place.name for cell in result.cells} == {place.name for place in places(GpuSettings())}
