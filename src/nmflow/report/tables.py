"""What is said of results in text: figures come from the JSON of run folders, and a missing run shows as missing."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nmflow.report.columns import starred
from nmflow.report.folder import RunFolder, read_json, read_result
from nmflow.report.measures import DEFAULT, MEASURES, further_scores, main_measure


def recipe_label(recipe: str | dict[str, Any] | list[Any]) -> str:
    """A recipe, as a configuration writes it, in a few words.

    >>> recipe_label("ste"), recipe_label({"name": "mdgf-linear", "dense": 0.1})
    ('ste', 'mdgf-linear (dense=0.1)')
    >>> recipe_label([{"recipe": "sdgf-stepwise", "until": 0.5, "pattern": "4:16"}, ["mdgf-linear", 1.0]])
    'sdgf-stepwise to 4:16, mdgf-linear'
    """
    if isinstance(recipe, str):
        return recipe
    if isinstance(recipe, dict):
        options = ", ".join(f"{key}={value}" for key, value in recipe.items() if key != "name")
        return f"{recipe['name']} ({options})" if options else str(recipe["name"])
    return ", ".join(_part_label(part) for part in recipe)


def _part_label(part: dict[str, Any] | Sequence[Any]) -> str:
    if isinstance(part, dict):
        name, pattern = part["recipe"], part.get("pattern")
    else:
        name, pattern = part[0], part[2] if len(part) > 2 else None
    return recipe_label(name) + (f" to {pattern}" if pattern else "")


def run_title(result: dict[str, Any]) -> str:
    """What a finished run was, in one line, from its result.json."""
    recipe = recipe_label(result["config"]["recipe"])
    what = recipe if result["compressed"] is None else f"{result['pattern']} by {recipe}"
    library, colon, name = result["model"].rpartition(":")
    model = library + colon + Path(name).name  # of a local folder its last part
    return f"{model} on {result['data'].partition(':')[0]}, {what}, seed {result['seed']}"


# -- one run -----------------------------------------------------------------------------------------------------


def result_lines(folder: RunFolder) -> list[str]:
    """The last words of a run: accuracies, proof, bytes, and where everything lies."""
    result = read_json(folder.result)
    dense, compressed, measure = result["dense"], result["compressed"], main_measure(result)
    label = MEASURES[measure].label
    width = len(f"sparse test {label}:")
    lines = []
    if dense is not None:
        lines.append(f"{f'dense test {label}:':{width}} {_score(dense['test'], measure)}")
    kind = "dense" if compressed is None else "sparse"
    what = "" if compressed is None else f", {result['pattern']} by {recipe_label(result['config']['recipe'])}"
    lines.append(f"{f'{kind} test {label}:':{width}} {_score(result['test'], measure)}{what}")
    if result.get("raw") is not None:
        raw = _score(result["raw"]["test"], measure)
        lines.append(f"{'last weights:':{width}} {raw}; all other figures are those of the weights' average")
    if compressed is not None:
        from_file = _score(compressed["test"], measure)
        lines.append(f"{'compressed:':{width}} {from_file}, measured from the compressed file")
        lines.append(verdict(result["verify"]))
        lines.append(bytes_line(compressed["bytes_before"], compressed["bytes_after"]))
        lines += skipped_line(result.get("skipped", {}))
    lines += _bleu_line(result)
    return [*lines, f"run folder: {folder.path}", f"plot: {folder.plot}", f"report: {folder.page}"]


def _bleu_line(result: dict[str, Any]) -> list[str]:
    """`BLEU: dense 21.3, sparse 20.9, compressed 20.9 (1,000 sentences, beam 1, nrefs:1|...)`, of translation alone."""
    how = result.get("bleu")
    if how is None:
        return []
    own = "dense" if result["compressed"] is None else "sparse"
    runs = {"dense": result["dense"], own: result, "compressed": result["compressed"]}
    scores = ", ".join(f"{name} {run['test']['bleu']:.1f}" for name, run in runs.items() if run is not None)
    return [f"BLEU: {scores} ({how['sentences']:,} sentences, beam {how['beam']}, {how['signature']})"]


def verdict(proof: dict[str, Any]) -> str:
    """`verified: k of k layers are N:M`, from a verify report as JSON."""
    good = sum(not layer["broken"] for layer in proof["layers"])
    word = "verified" if proof["ok"] else "not verified"
    return f"{word}: {good} of {len(proof['layers'])} layers are N:M"


def bytes_line(before: int, after: int) -> str:
    """Bytes of the dense and of the compressed file.

    >>> bytes_line(5_000_000, 2_000_000)
    'bytes: 5,000,000 -> 2,000,000 (2.50 times smaller)'
    """
    return f"bytes: {before:,} -> {after:,} ({before / after:.2f} times smaller)"


def skipped_line(skipped: Mapping[str, str]) -> list[str]:
    """The weights that `remainder="skip"` left dense, label -> reason; no line where there are none.

    >>> skipped_line({"blocks.0.fc1.weight": "64 does not divide 48", "blocks.1.fc1.weight": "64 does not divide 48"})
    ['2 weights stay dense that targets asked for: blocks.*.fc1.weight (64 does not divide 48)']
    """
    if not skipped:
        return []
    several = len(skipped) > 1
    named = (f"{starred(label) if several else label} ({reason})" for label, reason in skipped.items())
    count = f"{len(skipped)} weights stay" if several else "1 weight stays"
    return [f"{count} dense that targets asked for: {', '.join(dict.fromkeys(named))}"]


def _score(score: Mapping[str, Any] | None, name: str) -> str:
    """`96.4 % (343 of 356)`: the count says how fine the scale is; then what further test splits gave."""
    measure = MEASURES[name]
    if score is None:
        return measure.text(None)
    text = measure.text(score[name])
    if measure.counts:
        text += f" ({round(score[name] * score['items']):,} of {score['items']:,})"
    return ", ".join([text, *(f"{part} {_score(other, name)}" for part, other in further_scores(score).items())])


# -- many runs ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlannedRun:
    """A run that a comparison asks for, done or not."""

    recipe: str
    pattern: str
    seed: int
    folder: Path


@dataclass(frozen=True)
class Cell:
    """Runs of one recipe and pattern that differ in their seed alone.

        mean = Σ a / n,    sd = √(Σ (a - mean)² / (n - 1))     over the n runs that are done

    `values` are those of `measure`, seed by seed, None for a run that is missing; `sd` is None for fewer than two.
    """

    recipe: str
    pattern: str
    seeds: tuple[int, ...]
    values: tuple[float | None, ...]
    n: int
    mean: float | None
    sd: float | None
    min: float | None
    max: float | None
    measure: str = DEFAULT

    @classmethod
    def of(cls, recipe: str, pattern: str, values: Mapping[int, float | None], measure: str = DEFAULT) -> Cell:
        """The cell of these values by seed."""
        done = [value for value in values.values() if value is not None]
        return cls(
            recipe,
            pattern,
            tuple(values),
            tuple(values.values()),
            n=len(done),
            mean=math.fsum(done) / len(done) if done else None,
            sd=statistics.stdev(done) if len(done) > 1 else None,
            min=min(done, default=None),
            max=max(done, default=None),
            measure=measure,
        )

    @property
    def missing(self) -> tuple[int, ...]:
        """Seeds without a result."""
        return tuple(seed for seed, a in zip(self.seeds, self.values, strict=True) if a is None)

    def text(self, digits: int = 2) -> str:
        """`96.43 ± 0.41`, in the unit of `measure`; n decides whether there is a spread to show."""
        if self.mean is None:
            return "missing"
        mean, sd = (MEASURES[self.measure].number(value, digits=digits) for value in (self.mean, self.sd))
        return f"{mean} ± {sd}" if sd else mean


def read_cells(planned: Iterable[PlannedRun]) -> list[Cell]:
    """Read the main test measure of planned runs from their folders, in the order of the plan."""
    groups: dict[tuple[str, str], list[PlannedRun]] = {}
    for run in planned:
        groups.setdefault((run.recipe, run.pattern), []).append(run)
    return [_cell(recipe, pattern, runs) for (recipe, pattern), runs in groups.items()]


def _cell(recipe: str, pattern: str, runs: Sequence[PlannedRun]) -> Cell:
    results = {run.seed: read_result(run.folder) for run in runs}
    measure = next((main_measure(result) for result in results.values() if result is not None), DEFAULT)
    values = {seed: None if result is None else float(result["test"][measure]) for seed, result in results.items()}
    return Cell.of(recipe, pattern, values, measure)


def _measure_of(cells: Sequence[Cell]) -> str:
    """The measure of a table; cells without a run know none."""
    return next((cell.measure for cell in cells if cell.n), DEFAULT)


def table_to_json(cells: Sequence[Cell]) -> dict[str, Any]:
    """The table as plain data, with what its columns mean."""
    return {
        "format": 2,
        "measured": f"test {MEASURES[_measure_of(cells)].label} of the finalized model",
        "sd": "sample standard deviation over seeds, n - 1 in the denominator",
        "cells": [cell_to_json(cell) for cell in cells],
    }


def cell_to_json(cell: Cell) -> dict[str, Any]:
    """A cell as plain data."""
    return {**asdict(cell), "missing": list(cell.missing)}


def table_lines(cells: Sequence[Cell]) -> list[str]:
    """The table as padded Markdown: mean ± standard deviation, n, range, and the distance to the dense runs."""
    dense = next((cell.mean for cell in cells if cell.pattern == "dense"), None)
    measure = MEASURES[_measure_of(cells)]
    rows = [["pattern", "recipe", f"test {measure.head}", "n", "min", "max", "to dense"]]
    for cell in cells:
        n = f"{cell.n}" if not cell.missing else f"{cell.n} of {len(cell.seeds)}"
        rows.append([cell.pattern, cell.recipe, cell.text(), n, measure.number(cell.min), measure.number(cell.max)])
        known = dense is not None and cell.mean is not None and cell.pattern != "dense"
        rows[-1].append(measure.number(cell.mean - dense, sign=True) if known else "")  # type: ignore[operator]  # known
    return markdown(rows)


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a padded table; the first row is its head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]
