"""`nmflow compare`: recipes x patterns x seeds, each a run like any other, in one table and one plot."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from rich.console import Console

from nmflow.atomic import replacing
from nmflow.experiments.failures import Failure
from nmflow.report.folder import CompareFolder, RunFolder, read_json
from nmflow.report.plots import plot_compare
from nmflow.report.tables import Cell, PlannedRun, read_cells, recipe_label, table_lines, table_to_json
from nmflow.train.config import CompareConfig, TrainConfig, as_stored_now, load_compare_config
from nmflow.train.data import Data, load_data
from nmflow.train.files import check_new, write_json, write_text
from nmflow.train.loop import DivergedError, connect
from nmflow.train.progress import Display
from nmflow.train.run import agree_on, check_runnable, create, slug, stamp, targets_text
from nmflow.train.single import run_single
from nmflow.train.stop import resumable


@dataclass(frozen=True)
class Planned:
    """One run of a comparison: what it is told, and what the table calls it."""

    config: TrainConfig
    label: PlannedRun

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.label.folder)


@dataclass(frozen=True)
class CompareResult:
    """A comparison that is done, and the runs that came to nothing."""

    folder: CompareFolder
    cells: tuple[Cell, ...]
    failed: tuple[Failure, ...] = ()
    """The runs that diverged."""

    def lines(self) -> list[str]:
        """For people: the table, and where everything lies; `failed` says why a run is missing."""
        plot = [f"plot: {self.folder.plot}"] if self.folder.plot.exists() else []
        return [
            *table_lines(self.cells),
            "mean ± sample standard deviation over n seeds, finalized models on the test split",
            f"folder: {self.folder.path}",
            f"table: {self.folder.text}",
            *plot,
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON: the table, the folder and the failures."""
        failed = [str(each) for each in self.failed]
        return {"folder": str(self.folder.path), **table_to_json(self.cells), "failed": failed}


def plan_runs(config: CompareConfig, folder: CompareFolder) -> list[Planned]:
    """Every run of a comparison, in order: seeds within recipes within patterns; dense ones first, once a seed."""
    return [Planned(single, label) for single, label in _runs(config, folder)]


def _runs(config: CompareConfig, folder: CompareFolder) -> Iterator[tuple[TrainConfig, PlannedRun]]:
    patterns: tuple[str | None, ...] = config.pattern or (None,)
    for place, pattern in enumerate(patterns):
        for recipe in config.recipes:
            first = config.single(recipe, pattern, config.seeds[0])
            is_dense = first.build_recipe().name == "dense"
            if is_dense and place > 0:
                continue
            named = "dense" if is_dense else targets_text(config, pattern)
            for seed in config.seeds:
                parts = [_recipe_slug(recipe), *([] if is_dense else [slug(named)]), f"s{seed}"]
                path = folder.runs / "-".join(parts)
                yield config.single(recipe, pattern, seed), PlannedRun(recipe_label(recipe), named, seed, path)


def _recipe_slug(recipe: Any) -> str:
    """A recipe in a folder's name; options, of which there may be many, as six letters."""
    if isinstance(recipe, str):
        return slug(recipe)
    name = recipe["name"] if isinstance(recipe, dict) else "sequence"
    digest = hashlib.blake2b(json.dumps(recipe, sort_keys=True).encode(), digest_size=3).hexdigest()
    return f"{slug(name)}-{digest}"


def compare(config: CompareConfig, console: Console | None = None) -> CompareResult:
    """Do every run of a comparison; what they reach on the test split makes one table (table.md, table.json), one plot.

    A run that diverges is missing in the table, and the others go on. Raises, before anything is written, where any
    of the runs could not begin (see `train`); `Interrupted` where it was stopped.
    """
    main = connect(config.precision).is_main_process
    name = Path("runs") / f"compare-{config.data.name}-{stamp()}"
    folder = CompareFolder(Path(config.out) if config.out else agree_on(name))
    check_new(folder.path, "compare")
    data = load_data(config.data, config.tokenizer())
    _check_all(config, folder, data)
    create(folder.path, folder.config, config)
    return _go_on(config, folder, data, console if main else None)


def resume_compare(path: str | Path, console: Console | None = None) -> CompareResult:
    """Go on with a comparison that was stopped or killed: runs that are done stay, a run that was not goes on.

    Raises `FileNotFoundError` where `path` holds no comparison, else as `compare` does.
    """
    folder = CompareFolder(Path(path))
    if not folder.config.is_file():
        raise FileNotFoundError(f"{folder.path}: no comparison to resume here, for there is no {folder.config.name}")
    if RunFolder(folder.path).metrics.exists():
        raise ValueError(f"{folder.path}: this is a single run; go on with: nmflow train resume={folder.path}")
    config = load_compare_config(folder.config)
    main = connect(config.precision).is_main_process
    return _go_on(config, folder, load_data(config.data, config.tokenizer()), console if main else None)


def _check_all(config: CompareConfig, folder: CompareFolder, data: Data) -> None:
    """Every recipe and pattern once; the seeds differ in nothing that could be refused."""
    problems = []
    for planned in plan_runs(config, folder):
        if planned.config.seed == config.seeds[0]:
            try:
                check_runnable(planned.config, data)
            except ValueError as error:
                problems.append(f"{planned.label.recipe}, {planned.label.pattern}: {error}")
    if problems:
        raise ValueError("\n".join(problems))


def _go_on(config: CompareConfig, folder: CompareFolder, data: Data, console: Console | None) -> CompareResult:
    runs = plan_runs(config, folder)
    again = f"nmflow compare resume={shlex.quote(str(folder.path))}"
    failed: list[Failure] = []
    with resumable(again), Display(console, config.steps * len(runs)) as display:
        for run in runs:
            name = " ".join(dict.fromkeys((run.label.recipe, run.label.pattern, f"seed {run.label.seed}")))
            if run.folder.result.exists():
                _check_same(run)
                display.begin(name, config.steps, config.steps)
                continue
            try:
                run_single(run.config, run.folder, data, display, again, name, keep_checkpoint=False)
            except DivergedError as error:
                failed.append(Failure(name, str(error)))
    cells = tuple(read_cells(run.label for run in runs))
    if PartialState().is_main_process:
        write_text(folder.text, "\n".join(table_lines(cells)) + "\n")
        write_json(folder.table, table_to_json(cells))
        if any(cell.mean is not None for cell in cells):
            with replacing(folder.plot) as partial:
                plot_compare(cells, partial)
    PartialState().wait_for_everyone()
    return CompareResult(folder, cells, tuple(failed))


def _check_same(run: Planned) -> None:
    """A run that is done must be the one that is asked for."""
    found = as_stored_now(read_json(run.folder.result)["config"])
    asked = run.config.stored()
    other = [key for key in asked if found.get(key) != asked[key]]
    if other:
        raise ValueError(
            f"{run.folder.path}: this run was done with another {', '.join(other)}; take another folder (out=...)"
        )
