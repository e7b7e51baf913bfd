"""What a scale trains: networks and data in place of the paper's, and the runs that a table's cells ask of them."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from nmflow.experiments.cells import Setup, setup
from nmflow.report.folder import RunFolder, read_json, read_result
from nmflow.report.measures import MEASURES, main_measure
from nmflow.report.tables import Cell, PlannedRun, read_cells
from nmflow.train.config import TrainConfig, as_stored_now
from nmflow.train.files import write_json
from nmflow.train.run import slug

SCALES = ("cpu", "gpu", "paper")
"""Minutes on two cores; minutes to an hour on one GPU; the paper's own settings."""

_FREE = ("baseline", "tensorboard", "log_every", "eval_every", "checkpoint_every", "probe_every")
"""Settings that change no figure of a run."""


@dataclass(frozen=True)
class Study:
    """One network on one data set: runs that differ in recipe, targets, learning rate and seed alone."""

    scale: str
    name: str
    title: str
    differs: str
    """What is not the paper's."""
    seeds: int
    tuned: str
    """The targets at which learning rates are tried."""
    rates: tuple[float, ...]
    """Learning rates that every recipe tries; a single one is not tried but taken."""
    settings: Mapping[str, Any]

    @property
    def tuned_targets(self) -> tuple[tuple[str, str], ...]:
        return setup(f"ste {self.tuned}").targets

    def config(self, cell: Setup, rate: float, seed: int, data: Path) -> TrainConfig:
        """The run of a cell; a dense one has the targets of the tuning, which say what its probes look at."""
        values = _placed(self.settings, data)
        values["optim"] = {**values.get("optim", {}), "lr": rate}
        targets: dict[str, str | None] = dict(cell.targets or self.tuned_targets)
        return TrainConfig(**values, recipe=cell.value, targets=targets, seed=seed, baseline=False)


@functools.cache
def studies(scale: str) -> dict[str, Study]:
    """The studies of a scale, by name. Raises `ValueError` for a scale that there is not."""
    if scale not in SCALES:
        raise ValueError(f'no scale "{scale}"; there are {", ".join(SCALES)}')
    file = resources.files(__package__) / "scales" / f"{scale}.yaml"
    entries = yaml.safe_load(file.read_text(encoding="utf-8"))
    return {name: Study(scale, name, rates=tuple(entry.pop("rates")), **entry) for name, entry in entries.items()}


def _placed(value: Any, data: Path) -> Any:
    """Settings with the folder of the data in the place of {data}."""
    if isinstance(value, Mapping):
        return {key: _placed(inner, data) for key, inner in value.items()}
    return value.replace("{data}", str(data)) if isinstance(value, str) else value


@dataclass(frozen=True)
class Run:
    """One run of a study, done or not."""

    config: TrainConfig
    folder: RunFolder
    label: str

    @property
    def is_done(self) -> bool:
        """True where there is a result, or where there will be none: the same settings diverge again."""
        return self.folder.result.exists() or self.diverged.exists()

    @property
    def diverged(self) -> Path:
        """What a run that diverged said."""
        return self.folder.path / "diverged.json"

    def give_up(self, why: str) -> None:
        """Note that the run diverged."""
        write_json(self.diverged, {"config": self.config.stored(), "error": why})

    def result(self) -> dict[str, Any] | None:
        """Every figure of the run, None where there is none.

        Raises `ValueError` where what lies there was done with other settings, which no table may mix.
        """
        result = read_result(self.folder.path)
        stored = result or (read_json(self.diverged) if self.diverged.exists() else None)
        if stored is not None:
            found, asked = _that_matter(as_stored_now(stored["config"])), _that_matter(self.config.stored())
            if found["remainder"] == "error":  # it came to an end, so M divides every axis: no policy was needed
                found["remainder"] = asked["remainder"]
            other = [key for key in asked if found.get(key) != asked[key]]
            if other:
                raise ValueError(
                    f"{self.folder.path}: this run was done with another {', '.join(other)} than the study has now; "
                    "remove it, or take another folder (--out)"
                )
        return result


def _that_matter(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that a figure depends on; of paths the last part, for folders move."""
    kept = {key: value for key, value in stored.items() if key not in _FREE}
    return {
        **kept,
        "data": {**kept["data"], "path": Path(kept["data"]["path"] or "").name},
        "model": {**kept["model"], "name": kept["model"]["name"].rpartition("/")[2]},
    }


@dataclass(frozen=True)
class StudyFolder:
    """The runs of a study in a folder: which there are, which rate a recipe has, what a cell came to."""

    study: Study
    path: Path
    data: Path

    def run(self, cell: Setup, rate: float, seed: int) -> Run:
        """One run; its folder is named by all in which it differs from its neighbours."""
        name = "-".join(slug(part) for part in (cell.text, f"lr {rate:g}", f"s{seed}"))
        label = f"{self.study.name} {cell.text} lr {rate:g} seed {seed}"
        return Run(self.study.config(cell, rate, seed, self.data), RunFolder(self.path / name), label)

    def tries(self, cell: Setup) -> list[Run]:
        """The runs among which the learning rate of a cell's recipe, whatever its options, is chosen."""
        if len(self.study.rates) == 1:
            return []
        tried = self._tried(cell)
        return [self.run(tried, rate, 0) for rate in self.study.rates]

    def _tried(self, cell: Setup) -> Setup:
        return Setup(cell.recipe, (), self.study.tuned_targets if cell.targets else ())

    def rate(self, cell: Setup) -> float | None:
        """The learning rate of the best try on validation, the smaller of equals; None while a try is missing.

        A try that diverged has lost; where all have, the first rate shows it in the cells as well.
        """
        tries = self.tries(cell)
        if not tries:
            return self.study.rates[0]
        scores = {}
        for rate, run in zip(self.study.rates, tries, strict=True):
            result = run.result()
            if result is None and not run.is_done:
                return None
            if result is None:  # it diverged
                continue
            measure = main_measure(result)
            sign = -1 if MEASURES[measure].higher_is_better else 1
            scores[rate] = sign * result["val"][measure]
        return min(scores, key=lambda rate: (scores[rate], rate)) if scores else self.study.rates[0]

    def runs(self, cell: Setup) -> list[Run] | None:
        """The runs of a cell, a seed each; None while its rate is not known. Raises as `Run.result` does."""
        rate = self.rate(cell)
        if rate is None:
            return None
        runs = [self.run(cell, rate, seed) for seed in range(self.study.seeds)]
        for run in runs:
            run.result()  # refuses what was done with other settings
        return runs

    def open_runs(self, cells: Sequence[Setup]) -> list[Run]:
        """What can be begun now: tries first, for other runs wait for them, then the seeds of all cells in turn."""
        known = [runs for cell in cells for runs in [self.runs(cell)] if runs is not None]
        wanted = [run for cell in cells for run in self.tries(cell)]
        wanted += [run for wave in zip(*known, strict=True) for run in wave]
        return list({run.folder.path: run for run in wanted if not run.is_done}.values())

    def count(self, cells: Sequence[Setup]) -> tuple[int, int]:
        """(done, all) runs of these cells, tries among them."""
        tries = {run.folder.path: run.is_done for cell in cells for run in self.tries(cell)}
        done, every = sum(tries.values()), len(tries)
        for cell in cells:
            others = [run for run in self.runs(cell) or () if run.folder.path not in tries]
            done += sum(run.is_done for run in others)
            every += self.study.seeds - (bool(tries) and cell == self._tried(cell))
        return done, every

    def results(self, cells: Sequence[Setup]) -> list[Cell]:
        """What the cells came to on the test split; runs that there are not, or not yet, are missing."""
        return [self._result(cell) for cell in cells]

    def _result(self, cell: Setup) -> Cell:
        runs = self.runs(cell)
        if runs is None:
            return Cell.of(cell.recipe_text, cell.targets_text, dict.fromkeys(range(self.study.seeds)))
        plan = [PlannedRun(cell.recipe_text, cell.targets_text, run.config.seed, run.folder.path) for run in runs]
        return read_cells(plan)[0]
