"""Many runs over a few processes: each as if it had been alone, and none lost."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from small_runs import MODEL, assert_same_end, one_run, small, start

from nmflow.cli import cli
from nmflow.experiments import studies as studies_module
from nmflow.experiments import sweep as sweep_module
from nmflow.experiments.catalogue import find_table
from nmflow.experiments.reproduction import Place, Reproduction
from nmflow.experiments.studies import Run, Study
from nmflow.experiments.sweep import sweep
from nmflow.report.folder import RunFolder, read_metrics


@dataclass(frozen=True)
class Listed:
    """A plan without conditions."""

    runs: tuple[Run, ...]

    def open_runs(self) -> Sequence[Run]:
        return [run for run in self.runs if not run.is_done]

    def count(self) -> tuple[int, int]:
        return sum(run.is_done for run in self.runs), len(self.runs)


def run_of(folder: Path, name: str, **changes: Any) -> Run:
    return Run(small(recipe="sr-ste", **changes), RunFolder(folder / name), name)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Runs of three seeds, each in a process that does nothing else first."""
    folder = tmp_path_factory.mktemp("alone")
    return {seed: one_run(small(recipe="sr-ste", seed=seed), folder / f"s{seed}").path for seed in (0, 1, 2)}


def test_two_processes_do_what_one_does_and_a_failure_stops_nobody(tmp_path: Path, alone: dict[int, Path]) -> None:
    runs = [run_of(tmp_path, f"s{seed}", seed=seed) for seed in (0, 1, 2)]
    no_data = run_of(tmp_path, "no data", data="cifar10:nowhere")
    diverges = run_of(tmp_path, "diverges", optim={"lr": 1e30, "clip": None})
    result = sweep(Listed((no_data, runs[0], diverges, *runs[1:])), workers=2, threads=1)
    assert (result.done, result.stopped, len(result.failed)) == (3, False, 2)
    said = "\n".join(sorted(map(str, result.failed)))
    assert "diverges: DivergedError" in said
    assert (diverges.is_done, no_data.is_done) == (True, False)  # the one will diverge again, the other may find data
    assert "no data: FileNotFoundError" in said
    for seed, run in enumerate(runs):
        assert_same_end(run.folder.path, alone[seed])
        assert not run.folder.checkpoint.exists()  # nobody goes on with a run that is done


def test_a_sweep_that_is_stopped_or_loses_its_first_process_goes_on_to_the_same_bits(
    tmp_path: Path, alone: dict[int, Path]
) -> None:
    """Stopped by SIGTERM, then with the first process killed, then by the clock: every time from where it was."""
    run = run_of(tmp_path, "run", steps=STEPS)
    for number in (signal.SIGTERM, signal.SIGKILL):
        before = _last_step(run)
        process = start(__file__, str(tmp_path))
        _wait_for(lambda at=before: _last_step(run) > at + 20)
        os.kill(process.pid, number)
        assert process.communicate(timeout=120)[0].strip() == ("True" if number == signal.SIGTERM else "")
        _wait_for(lambda: _is_quiet(run))  # the worker that was left alone has saved and ended
    assert 40 < _last_step(run) < STEPS
    assert sweep(Listed((run,)), minutes=1e-9, threads=1).stopped
    assert sweep(Listed((run,)), threads=1).done == 1
    assert_same_end(run.folder.path, one_run(small(recipe="sr-ste", steps=STEPS), tmp_path / "alone").path)


STEPS = 400


def _is_quiet(run: Run) -> bool:
    """Nobody writes any more: no step within a second."""
    before = _last_step(run)
    time.sleep(1.0)
    return _last_step(run) == before


def test_a_run_that_somebody_else_is_at_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl", reason="Windows has no such locks")
    run = tmp_path / "run"
    monkeypatch.setattr(sweep_module, "_PATIENCE", 0.0)
    with sweep_module._alone_at(run), (run / "lock").open("w") as other:
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(RuntimeError, match="run: another process is at work on it"), sweep_module._alone_at(run):
            pass
    with sweep_module._alone_at(run):
        pass


def test_a_sweep_stopped_before_its_workers_have_begun_ends_well(tmp_path: Path) -> None:
    result = sweep(Listed((run_of(tmp_path, "run"),)), minutes=1e-4, threads=1)
    assert (result.done, result.failed, result.stopped) == (0, [], True)


def _last_step(run: Run) -> int:
    lines = read_metrics(run.folder.metrics)
    return int(lines[-1]["step"]) if lines else -1


def _wait_for(holds: Any, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_reproduce_trains_what_is_missing_and_reads_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"data": "digits", "model": MODEL, "steps": 12, "batch": 8, "eval_every": 12}
    study = Study("cpu", "digits", "a small network", "small", 1, "ff=1:16", (0.001,), settings)
    monkeypatch.setattr(studies_module, "studies", lambda scale: {"digits": study})
    monkeypatch.setattr("nmflow.experiments.reproduction.studies", lambda scale: {"digits": study})
    arguments = ["reproduce", "digits", "--out", str(tmp_path), "--json"]
    first = CliRunner().invoke(cli, arguments)
    assert first.exit_code == 0, first.output
    table = json.loads(first.stdout)["tables"][0]
    results = {path: path.stat().st_mtime_ns for path in (tmp_path / "cpu").rglob("result.json")}
    assert len(results) == 9  # dense, and four recipes at two patterns
    assert table["dense"]["ours"]["n"] == 1
    assert [each["ours"]["n"] for each in table["cells"]] == [1] * 8
    folder = tmp_path / "cpu" / "digits"
    assert json.loads((folder / "table.json").read_text())["cells"] == table["cells"]
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")
    again = CliRunner().invoke(cli, [*arguments, "--keep", str(tmp_path / "kept")])
    assert json.loads(again.stdout) == json.loads(first.stdout)
    kept = {path.name for path in (tmp_path / "kept").rglob("*") if path.is_file()}
    assert kept == {"config.yaml", "environment.json", "metrics.jsonl", "result.json", "targets.json", "table.json",
                    "table.md", "plot.png"}  # fmt: skip
    copied = Reproduction(find_table("digits"), Place("cpu", tmp_path / "kept", Path("data"))).result()
    assert json.loads(json.dumps(copied.to_dict()))["cells"] == table["cells"]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cpu").rglob("result.json")} == results


def test_reproduce_without_its_data_says_so_once_and_ends_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"data": "cifar10:{data}/cifar10", "model": MODEL, "steps": 12, "batch": 8}
    study = Study("cpu", "digits", "a small network", "small", 1, "ff=1:16", (0.001, 0.002), settings)
    monkeypatch.setattr(studies_module, "studies", lambda scale: {"digits": study})
    monkeypatch.setattr("nmflow.experiments.reproduction.studies", lambda scale: {"digits": study})
    result = CliRunner().invoke(cli, ["reproduce", "digits", "--out", str(tmp_path), "--data", str(tmp_path / "no")])
    assert result.exit_code == 2
    [line] = [line for line in result.stderr.splitlines() if line.startswith("failed: ")]
    assert "10 runs, the first " in line
    assert "no/cifar10: not found" in line
    assert "folder: " in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "which table?"), (["table-99"], "no table"),
        (["digits", "--scale", "paper"], "nothing fills digits"), (["digits", "--workers", "0"], "0"),
    ],
)  # fmt: skip
def test_what_cannot_be_reproduced_is_said_at_once(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(cli, ["reproduce", *arguments])
    assert result.exit_code == 2
    assert message in result.output


if __name__ == "__main__":
    print(sweep(Listed((run_of(Path(sys.argv[1]), "run", steps=STEPS),)), threads=1).stopped)
