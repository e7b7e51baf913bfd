"""`nmflow report`: runs and comparisons of several folders in one table a data set, GLUE's tasks all in one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nmflow.experiments.comparison import plan_runs
from nmflow.report.folder import CompareFolder, RunFolder, read_result
from nmflow.report.glue import AVERAGES, Average, GlueRow, by_task, glue_lines, glue_rows, glue_to_json
from nmflow.report.tables import Cell, PlannedRun, read_cells, recipe_label, table_lines, table_to_json
from nmflow.train.config import TrainConfig, load_compare_config, load_config
from nmflow.train.data.glue_tasks import task_name
from nmflow.train.run import targets_text

FREE = ("recipe", "pattern", "targets", "seed", "baseline", "out", "tensorboard", "log_every", "eval_every",
        "checkpoint_every", "probe_every")  # fmt: skip
"""Settings in which runs of one table may differ: its rows and seeds, and what does not change a figure."""


@dataclass(frozen=True)
class Found:
    """A run, done or not, and what it was trained on."""

    data: str
    config: TrainConfig
    label: PlannedRun

    @property
    def is_glue(self) -> bool:
        return self.config.data.name == "glue"


@dataclass(frozen=True)
class Collection:
    """The tables of some runs."""

    cells: dict[str, list[Cell]]
    """By data set."""
    glue: list[GlueRow] = field(default_factory=list)
    averages: dict[str, Average] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """For people: a table after the other."""
        lines = glue_lines(self.glue, self.averages) if self.glue else []
        for data, cells in self.cells.items():
            lines += [*([""] if lines else []), f"{data}:", *table_lines(cells)]
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        tables = {data: table_to_json(cells) for data, cells in self.cells.items()}
        return {"glue": glue_to_json(self.glue, self.averages) if self.glue else None, "data": tables}


def collect(paths: Iterable[str | Path], tasks: Sequence[str] = ()) -> Collection:
    """The tables of the runs and comparisons at `paths`; a run brings its dense baseline along.

    GLUE's averages are those of `nmflow.report.glue.AVERAGES`, or the mean of just the `tasks` that are named.
    Raises `FileNotFoundError` where a path holds neither, and one `ValueError` where runs that would share a row were
    trained by different settings (other than by task), or one cell has two different results.
    """
    found = _once([run for path in paths for run in find_runs(Path(path))])
    _check_alike(found)
    names = [task_name(task) for task in tasks]
    averages = {f"mean of {len(names)}": by_task(names)} if names else AVERAGES
    runs = [(run.data, run.label) for run in found if run.is_glue and run.data in (names or [run.data])]
    if names and not runs:
        raise ValueError(f"none of these runs is of {', '.join(names)}")
    cells: dict[str, list[PlannedRun]] = {}
    for run in found:
        if not run.is_glue:
            cells.setdefault(run.data, []).append(run.label)
    tables = {data: read_cells(labels) for data, labels in cells.items()}
    return Collection(tables, glue_rows(runs, averages), averages)


def find_runs(path: Path) -> list[Found]:
    """The runs of a comparison, those it still lacks among them, or a single run and its baseline."""
    folder = CompareFolder(path)
    if not folder.config.is_file():
        raise FileNotFoundError(f"{path}: neither a run nor a comparison lies here, for there is no config.yaml")
    if folder.runs.is_dir():
        planned = plan_runs(load_compare_config(folder.config), folder)
        return [Found(_data_name(run.config), run.config, run.label) for run in planned]
    config = load_config(folder.config)
    single = _found(config, path)
    if not config.baseline or single.label.pattern == "dense":
        return [single]
    dense = config.model_copy(update={"recipe": "dense", "baseline": False})
    return [_found(dense, RunFolder(path).dense.path), single]


def _found(config: TrainConfig, path: Path) -> Found:
    is_dense = config.build_recipe().name == "dense"
    pattern = "dense" if is_dense else targets_text(config, config.pattern)
    return Found(_data_name(config), config, PlannedRun(recipe_label(config.recipe), pattern, config.seed, path))


def _data_name(config: TrainConfig) -> str:
    """What a run was trained on: a task of GLUE, or a data set and the last part of its path."""
    last = Path(config.data.path or "").name
    return task_name(last) if config.data.name == "glue" else f"{config.data.name} {last}".rstrip()


def _once(found: Sequence[Found]) -> list[Found]:
    """Every cell and seed once: baselines of several runs are one run done again. One that is done goes first."""
    kept: dict[tuple[str, str, str, int], Found] = {}
    problems = []
    for run in found:
        key = (run.data, run.label.recipe, run.label.pattern, run.label.seed)
        first = kept.setdefault(key, run)
        one, other = (read_result(each.label.folder) for each in (first, run))
        if one is None:
            kept[key] = run
        elif other is not None and one["test"] != other["test"]:
            cell = f"{' '.join(key[:3])} seed {key[3]}"
            problems.append(
                f"{run.label.folder}: {cell} is also in {first.label.folder}, with another result; give one of the two"
            )
    if problems:
        raise ValueError("\n".join(problems))
    return list(kept.values())


def _check_alike(found: Sequence[Found]) -> None:
    """Runs of one data set differ in nothing but recipe, pattern and seed, those of GLUE's tasks in no network."""
    first: dict[str, Found] = {}
    problems: list[str] = []
    for run in found:
        scopes = {run.data: _settings(run.config)}
        if run.is_glue:
            scopes["GLUE"] = {"model": scopes[run.data]["model"]}
        for scope, settings in scopes.items():
            other = first.setdefault(scope, run)
            theirs = _settings(other.config)
            keys = [key for key in settings if settings[key] != theirs[key]]
            if keys:
                problems.append(
                    f"{run.label.folder}: trained on {scope} with another {', '.join(keys)} than {other.label.folder}; "
                    "report them apart"
                )
    if problems:
        raise ValueError("\n".join(problems))


def _settings(config: TrainConfig) -> dict[str, Any]:
    """What a figure depends on besides row and seed; of paths the last part, for folders move."""
    settings = config.model_dump(mode="json", exclude=set(FREE))
    settings["data"]["path"] = _data_name(config)
    settings["model"]["name"] = settings["model"]["name"].rpartition("/")[2]
    return settings
