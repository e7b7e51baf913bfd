"""The table of GLUE: every task by its own measures, a row a recipe and pattern, and means of whole sets alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from nmflow.report.folder import read_result
from nmflow.report.measures import MEASURES
from nmflow.report.tables import Cell, PlannedRun, cell_to_json, markdown


@dataclass(frozen=True)
class Column:
    """A column: the task, what it is judged by (the mean of a pair counts), and which test split."""

    task: str
    measures: tuple[str, ...] = ("accuracy",)
    part: str | None = None
    """A further test split by name; none: the test split."""


_F1 = ("f1", "accuracy")

COLUMNS: dict[str, Column] = {
    "CoLA": Column("CoLA", ("matthews",)),
    "MNLI-m": Column("MNLI"),
    "MNLI-mm": Column("MNLI", part="mismatched"),
    "MRPC": Column("MRPC", _F1),
    "QNLI": Column("QNLI"),
    "QQP": Column("QQP", _F1),
    "RTE": Column("RTE"),
    "SST-2": Column("SST-2"),
    "STS-B": Column("STS-B", ("pearson", "spearman")),
    "WNLI": Column("WNLI"),
}
"""In the order of the paper's table 12, WNLI behind."""

Average = tuple[tuple[str, ...], ...]
"""Columns by group: the mean of the groups' means."""


def by_task(tasks: Iterable[str]) -> Average:
    """Every task as one group.

    >>> by_task(["MRPC", "MNLI"])
    (('MRPC',), ('MNLI-m', 'MNLI-mm'))
    """
    return tuple(tuple(name for name, column in COLUMNS.items() if column.task == task) for task in tasks)


AVERAGES: dict[str, Average] = {
    "overall": tuple((name,) for name in COLUMNS if name != "WNLI"),
    "leaderboard": by_task(dict.fromkeys(column.task for column in COLUMNS.values())),
}
"""`overall` is that of the paper's table 12: nine columns, MNLI's two among them, no WNLI. `leaderboard` is GLUE's own
(Wang et al. 2019, §3.4): nine tasks, WNLI among them, the figures of a task averaged first, MNLI's two as well."""


@dataclass(frozen=True)
class GlueRow:
    """One recipe and pattern on all tasks. A cell holds a value a seed, None where something of it is missing."""

    recipe: str
    pattern: str
    columns: dict[str, Cell]
    """By column, of the mean of its measures."""
    measures: dict[str, dict[str, Cell]]
    """By column and measure."""
    averages: dict[str, Cell]
    """By name; a seed counts where it has every column of the average."""

    @property
    def n(self) -> int:
        """The most seeds that a column has."""
        return max(cell.n for cell in self.columns.values())


def glue_rows(runs: Iterable[tuple[str, PlannedRun]], averages: Mapping[str, Average] = AVERAGES) -> list[GlueRow]:
    """Rows of runs, each with its task, in their order; figures come from the runs' folders."""
    groups: dict[tuple[str, str], dict[str, list[PlannedRun]]] = {}
    for task, run in runs:
        groups.setdefault((run.recipe, run.pattern), {}).setdefault(task, []).append(run)
    return [_row(recipe, pattern, tasks, averages) for (recipe, pattern), tasks in groups.items()]


def _row(
    recipe: str, pattern: str, tasks: Mapping[str, Sequence[PlannedRun]], averages: Mapping[str, Average]
) -> GlueRow:
    seeds = sorted({run.seed for runs in tasks.values() for run in runs})
    results = {task: {run.seed: read_result(run.folder) for run in runs} for task, runs in tasks.items()}
    columns: dict[str, Cell] = {}
    measures: dict[str, dict[str, Cell]] = {}
    shown = {name for average in averages.values() for group in average for name in group}
    for name, column in COLUMNS.items():
        if name not in shown:
            continue
        of_task = results.get(column.task, {})
        measures[name] = parts = {
            measure: Cell.of(
                recipe, pattern, {seed: _figure(of_task.get(seed), column.part, measure) for seed in seeds}, measure
            )
            for measure in column.measures
        }
        values = dict(zip(seeds, map(_mean, zip(*(cell.values for cell in parts.values()), strict=True)), strict=True))
        columns[name] = Cell.of(recipe, pattern, values, "score" if len(parts) > 1 else column.measures[0])
    means = {
        name: Cell.of(recipe, pattern, dict(zip(seeds, _averages(average, columns), strict=True)), "score")
        for name, average in averages.items()
    }
    return GlueRow(recipe, pattern, columns, measures, means)


def _figure(result: Mapping[str, Any] | None, part: str | None, measure: str) -> float | None:
    """One figure of one run, none where it is not done or lacks that test split."""
    score = None if result is None else result["test"] if part is None else result["test"].get(part)
    return None if score is None else float(score[measure])


def _averages(average: Average, columns: Mapping[str, Cell]) -> list[float | None]:
    """Seed by seed, the mean of the means of every group."""
    groups = (map(_mean, zip(*(columns[name].values for name in group), strict=True)) for group in average)
    return [_mean(values) for values in zip(*groups, strict=True)]


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean, none where one is missing: never that of a smaller set."""
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None


def glue_to_json(rows: Sequence[GlueRow], averages: Mapping[str, Average] = AVERAGES) -> dict[str, Any]:
    """The table as plain data, with what its means are made of."""
    return {
        "format": 1,
        "measured": "GLUE's dev sets, by the finalized model",
        "sd": "sample standard deviation over seeds, n - 1 in the denominator",
        "averages": {name: [list(group) for group in average] for name, average in averages.items()},
        "rows": [
            {
                "recipe": row.recipe,
                "pattern": row.pattern,
                "averages": {name: cell_to_json(cell) for name, cell in row.averages.items()},
                "columns": {
                    name: {
                        **cell_to_json(cell),
                        "measures": {measure: cell_to_json(part) for measure, part in row.measures[name].items()},
                    }
                    for name, cell in row.columns.items()
                },
            }
            for row in rows
        ],
    }


def glue_lines(rows: Sequence[GlueRow], averages: Mapping[str, Average] = AVERAGES) -> list[str]:
    """The table as padded Markdown, in percent, and below it what its figures are and what is missing."""
    table = [["pattern", "recipe", "n", *averages, *rows[0].columns]]
    for row in rows:
        means = [_text(cell, row.n) for cell in row.averages.values()]
        cells = [_text(cell, row.n, row.measures[name].values()) for name, cell in row.columns.items()]
        table.append([row.pattern, row.recipe, str(row.n), *means, *cells])
    return [*markdown(table), *_legend(rows[0].columns, averages), *_missing(rows)]


def _text(cell: Cell, n: int, parts: Iterable[Cell] = ()) -> str:
    """`58.9 ± 1.2`; of a pair of measures `92.4 / 89.2 (90.8 ± 0.4)`; n where it is not that of the row."""
    text, shown = cell.text(1), [part.text(1).partition(" ")[0] for part in parts]
    if len(shown) > 1 and cell.n:
        text = f"{' / '.join(shown)} ({text})"
    return text if cell.n in (0, n) else f"{text}, n {cell.n}"


def _legend(names: Iterable[str], averages: Mapping[str, Average]) -> list[str]:
    judged: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        judged.setdefault(COLUMNS[name].measures, []).append(name)
    kinds = (f"{' / '.join(MEASURES[each].label for each in kind)} of {', '.join(on)}" for kind, on in judged.items())
    lines = [f"dev sets, percent, mean ± sample standard deviation over n seeds: {'; '.join(kinds)}"]
    for name, average in averages.items():
        groups = (group[0] if len(group) == 1 else f"({' + '.join(group)})/{len(group)}" for group in average)
        lines.append(f"{name}: mean of {', '.join(groups)}; missing where one is, seed by seed")
    return lines


def _missing(rows: Sequence[GlueRow]) -> list[str]:
    """Seeds that some tasks of a row have and others have not; a column without any says so itself."""
    lines = []
    for row in rows:
        lacking = {name: cell.missing for name, cell in row.columns.items() if cell.n and cell.missing}
        texts = (f"{name} seed{'s'[: len(seeds) > 1]} {', '.join(map(str, seeds))}" for name, seeds in lacking.items())
        if lacking:
            lines.append(f"missing of {row.pattern} {row.recipe}: {'; '.join(texts)}")
    return lines
