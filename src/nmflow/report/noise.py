"""Which recipe has the noisier gradients: the paper's figure 3 in numbers, from the runs' logs alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nmflow.report.folder import RunFolder, read_metrics
from nmflow.report.plots_noise import plot_noise
from nmflow.report.side_by_side import ERRORS
from nmflow.report.tables import PlannedRun, markdown

QUANTITIES = {
    "second_moment_var_average": "Var(v), v Adam's second moment",
    "grad_abs_var_average": "Var(abs(g)), g the gradient",
}
"""The running averages in a log, and what they are of."""
PARTS = (0.5, 1.0)
"""Where they are compared: parts of the run."""


@dataclass(frozen=True)
class Ratio:
    """A quantity of one recipe over that of another, seed by seed.

        r = exp(mean log(a_s / b_s)),   told apart where abs(mean) > 2·sd / √n

    over the n seeds s that both have.
    """

    quantity: str
    part: float
    """Of the run, 0..1."""
    ratio: float
    lowest: float
    highest: float
    n: int
    told: bool


@dataclass(frozen=True)
class Noise:
    """Two recipes and the noise in the gradients of their runs."""

    title: str
    first: str
    second: str
    runs: tuple[PlannedRun, ...]
    """Each recipe at the learning rate that it chose."""
    differs: tuple[str, ...] = ()
    by_rate: Mapping[float, tuple[PlannedRun, ...]] = field(default_factory=dict)
    """Learning rate -> runs of both at it: noise depends on the rate, and each recipe may have chosen another one."""
    chosen: Mapping[str, float] = field(default_factory=dict)
    """Recipe -> the learning rate of its `runs`."""

    def ratios(self) -> list[Ratio]:
        """Every quantity of `first` over that of `second`, half-way and at the end; none where runs are missing."""
        return self._ratios(self.runs)

    def at_same_rate(self) -> dict[float, list[Ratio]]:
        """The same of every learning rate at which both were run."""
        found = {rate: self._ratios(runs) for rate, runs in self.by_rate.items()}
        return {rate: ratios for rate, ratios in found.items() if ratios}

    def _ratios(self, runs: Sequence[PlannedRun]) -> list[Ratio]:
        curves = {(run.recipe, run.seed): noise_curves(run.folder) for run in runs}
        found = []
        for quantity in QUANTITIES:
            for part in PARTS:
                logs = []
                for seed in sorted({run.seed for run in runs}):
                    pair = [curves.get((recipe, seed), {}) for recipe in (self.first, self.second)]
                    a, b = (_at(curve.get(quantity), part) for curve in pair)
                    if a and b:
                        logs.append(math.log(a / b))
                if logs:
                    found.append(_ratio(quantity, part, logs))
        return found

    def lines(self) -> list[str]:
        """For people: the table of ratios, and the verdict in words."""
        ratios = self.ratios()
        rows = [["running average of", "at", f"{self.first} / {self.second}", "lowest", "highest", "n", "told apart"]]
        for each in ratios:
            values = (f"{value:.3g}" for value in (each.ratio, each.lowest, each.highest))
            told = "yes" if each.told else "no"
            rows.append([QUANTITIES[each.quantity], f"{100 * each.part:.0f} % of the run", *values, str(each.n), told])
        table = markdown(rows) if ratios else ["no run of both recipes is done"]
        return [self.title, "", *table, "", *self.verdict(), *self._lines_at_same_rate(), *self.differs]

    def _lines_at_same_rate(self) -> list[str]:
        """For people: a learning rate a line, told apart or not at the end of the run."""
        found = self.at_same_rate()
        if not found:
            return []
        names = [f"{_short(quantity)} at {part:.0%}" for quantity in QUANTITIES for part in PARTS]
        rows = [["both at learning rate", *names, "n", "told apart at 100%"]]
        for rate, ratios in found.items():
            told = [_short(each.quantity) for each in ratios if each.told and each.part == 1.0]
            values = (f"{each.ratio:.3g}" for each in ratios)
            rows.append([f"{rate:g}", *values, str(ratios[0].n), ", ".join(told) or ("no" if ratios[0].n > 1 else "-")])
        return ["", f"{self.first} / {self.second}, both at the same learning rate:", "", *markdown(rows), ""]

    def verdict(self) -> list[str]:
        """In words; the paper says that sr-ste is the noisier one."""
        lines = []
        for each in self.ratios():
            if each.part < 1.0:
                continue
            what = _short(each.quantity)
            if not each.told:
                lines.append(f"{what} at the end: the {each.n} seeds do not tell {self.first} from {self.second}")
            else:
                higher, lower = (self.first, self.second) if each.ratio > 1 else (self.second, self.first)
                times = max(each.ratio, 1 / each.ratio)
                lines.append(f"{what} at the end: that of {higher} is {times:.3g} times that of {lower}")
        rates = [self.chosen.get(recipe, math.nan) for recipe in (self.first, self.second)]
        if lines and self.chosen and rates[0] != rates[1]:
            chose = f"{self.first} chose the learning rate {rates[0]:g}, {self.second} {rates[1]:g}"
            lines.append(f"but {chose}, on which noise depends too")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "format": 1,
            "title": self.title,
            "recipes": [self.first, self.second],
            "ratios": [asdict(each) for each in self.ratios()],
            "standard_errors": ERRORS,
            "rates": dict(self.chosen),
            "same_rate": [
                {"rate": rate, "ratios": [asdict(each) for each in ratios]}
                for rate, ratios in self.at_same_rate().items()
            ],
            "verdict": self.verdict(),
            "differs": list(self.differs),
        }

    def draw(self, path: Path) -> bool:
        """Draw the curves of the runs that are done; False where there are none."""
        done = [run for run in self.runs if noise_curves(run.folder)]
        if done:
            plot_noise(done, path)
        return bool(done)


def noise_curves(folder: Path) -> dict[str, dict[int, float]]:
    """Quantity -> step -> running average, of a run that is done and was probed; empty of others."""
    run = RunFolder(folder)
    if not run.result.exists():
        return {}
    lines = [line for line in read_metrics(run.metrics) if "grad_abs_var" in line]
    return {
        quantity: {line["step"]: line[quantity] for line in lines if line[quantity] is not None}
        for quantity in (QUANTITIES if lines else ())
    }


def _short(quantity: str) -> str:
    return QUANTITIES[quantity].partition(",")[0]


def _at(curve: Mapping[int, float] | None, part: float) -> float | None:
    """The last value up to a part of the run."""
    if not curve:
        return None
    steps = [step for step in curve if step <= part * max(curve)]
    return curve[max(steps)] if steps else None


def _ratio(quantity: str, part: float, logs: Sequence[float]) -> Ratio:
    mean = statistics.fmean(logs)
    error = statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else math.inf
    ratio, lowest, highest = (math.exp(value) for value in (mean, min(logs), max(logs)))
    return Ratio(quantity, part, ratio, lowest, highest, len(logs), abs(mean) > ERRORS * error)
