"""How fast recipes learn: the validation measure over the steps, a panel a data set (the paper's figures 6 and 7)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nmflow.report.folder import RunFolder, read_metrics, read_result
from nmflow.report.measures import MEASURES, main_measure
from nmflow.report.plots import COLOURS, DENSE
from nmflow.report.tables import PlannedRun, markdown


@dataclass(frozen=True)
class Curve:
    """The validation measure of one recipe and pattern at the steps that all its runs have."""

    recipe: str
    pattern: str
    measure: str
    n: int
    values: Mapping[int, tuple[float, ...]]
    """By step, a value a run."""

    @property
    def is_dense(self) -> bool:
        """True of the network that stays dense."""
        return self.pattern == "dense"

    @property
    def name(self) -> str:
        """`sr-ste, ff=1:8`."""
        return self.recipe if self.is_dense else f"{self.recipe}, {self.pattern}"

    def mean(self, step: int) -> float:
        """Over the runs."""
        return statistics.fmean(self.values[step])


@dataclass(frozen=True)
class Curves:
    """Recipes over the steps, by data set."""

    title: str
    runs: Mapping[str, tuple[PlannedRun, ...]]
    """By data set."""
    differs: tuple[str, ...] = ()

    def curves(self) -> dict[str, list[Curve]]:
        """Those of the runs that are done; a data set without any is left out."""
        found = {name: _curves(runs) for name, runs in self.runs.items()}
        return {name: curves for name, curves in found.items() if curves}

    def lines(self) -> list[str]:
        """For people: the mean at every step that was looked at, a table a data set."""
        lines = [self.title]
        for name, curves in self.curves().items():
            steps = sorted({step for curve in curves for step in curve.values})
            measure = MEASURES[curves[0].measure]
            rows = [["pattern", "recipe", "n", *(f"step {step:,}" for step in steps)]]
            for curve in curves:
                values = [measure.number(curve.mean(step)) if step in curve.values else "" for step in steps]
                rows.append([curve.pattern, curve.recipe, str(curve.n), *values])
            lines += ["", f"{name}, validation {measure.head}, mean over seeds", "", *markdown(rows)]
        return [*lines, *([] if len(lines) > 1 else ["", "no run is done"]), "", *self.differs]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "format": 1,
            "title": self.title,
            "curves": {
                name: [
                    {
                        "recipe": curve.recipe,
                        "pattern": curve.pattern,
                        "measure": curve.measure,
                        "n": curve.n,
                        "steps": list(curve.values),
                        "values": [list(values) for values in curve.values.values()],
                    }
                    for curve in curves
                ]
                for name, curves in self.curves().items()
            },
            "differs": list(self.differs),
        }

    def draw(self, path: Path) -> bool:
        """Draw a panel a data set: means, and bands from the lowest to the highest; False where no run is done."""
        panels = self.curves()
        if not panels:
            return False
        figure = Figure(figsize=(1.0 + 4.6 * len(panels), 4.4), layout="constrained")
        FigureCanvasAgg(figure)
        named: dict[str, Any] = {}
        sparse = dict.fromkeys(curve.name for curves in panels.values() for curve in curves if not curve.is_dense)
        colours = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(sparse)}
        for axes, (name, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
            measure = MEASURES[curves[0].measure]
            scale = 100 if measure.fraction else 1
            for curve in curves:
                colour = colours.get(curve.name, DENSE)
                steps = list(curve.values)
                low, high = ([scale * pick(curve.values[step]) for step in steps] for pick in (min, max))
                axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
                means = [scale * curve.mean(step) for step in steps]
                [named[curve.name]] = axes.plot(steps, means, color=colour, linewidth=1.6, marker=".")
            axes.set(title=name, xlabel="optimizer step", ylabel=f"validation {measure.head}")
            axes.grid(axis="y", color="0.85", linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
        figure.legend(named.values(), named.keys(), loc="outside upper center", frameon=False, ncols=3)
        figure.savefig(path, dpi=150, format="png")
        return True


def _curves(runs: Sequence[PlannedRun]) -> list[Curve]:
    groups: dict[tuple[str, str], list[PlannedRun]] = {}
    for run in runs:
        if read_result(run.folder) is not None:
            groups.setdefault((run.recipe, run.pattern), []).append(run)
    return [_curve(recipe, pattern, group) for (recipe, pattern), group in groups.items()]


def _curve(recipe: str, pattern: str, runs: Sequence[PlannedRun]) -> Curve:
    results = [read_result(run.folder) for run in runs]
    measure = next(main_measure(result) for result in results if result is not None)
    key = f"val_{measure}"
    logs = [
        {line["step"]: float(line[key]) for line in read_metrics(RunFolder(run.folder).metrics) if key in line}
        for run in runs
    ]
    steps = sorted(set.intersection(*map(set, logs)))
    return Curve(recipe, pattern, measure, len(runs), {step: tuple(log[step] for log in logs) for step in steps})
