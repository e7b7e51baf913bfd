"""How noisy the gradients of several runs were: the paper's figure 3, drawn from their logs alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from nmflow.report.folder import RunFolder, read_metrics
from nmflow.report.plots import COLOURS, DENSE
from nmflow.report.tables import PlannedRun

_PANELS = {
    "second_moment_var_average": "variance of the second moment, Var(v)",
    "grad_abs_var_average": "variance of abs(gradient), Var(abs(g))",
}
"""The running averages in a log, and what their panels say."""


class _Point(NamedTuple):
    """One step of one recipe: what its runs have there."""

    step: int
    middle: float
    lowest: float
    highest: float


def plot_noise(runs: Sequence[PlannedRun], path: str | Path) -> None:
    """Draw `noise_figure` to a PNG. Raises as it does."""
    noise_figure(runs).savefig(path, dpi=150, format="png")


def noise_figure(runs: Sequence[PlannedRun]) -> Figure:
    """Running averages of Var(v) and Var(abs(g)) over the steps, one line a recipe and pattern, logarithmic.

    A line is the geometric mean of the runs that differ in nothing but the seed, its band goes from the lowest to
    the highest; both end where the first of the runs does. `runs` come from `find_runs`, or say recipe, pattern,
    seed and folder by themselves: only metrics.jsonl is read. Raises one `ValueError` that names every run whose log
    has no gradient noise in it. Source: Bambhaniya et al. 2025, figure 3.
    """
    logs = [[line for line in read_metrics(RunFolder(run.folder).metrics) if "grad_abs_var" in line] for run in runs]
    problems = [
        f"{run.folder}: no gradient noise in its log; train with probe_every=10"
        for run, log in zip(runs, logs, strict=True)
        if not log
    ] or ([] if runs else ["no runs are given, so there is nothing to draw"])
    if problems:
        raise ValueError("\n".join(problems))
    groups: dict[tuple[str, str], list[list[dict[str, float | None]]]] = {}
    for run, log in zip(runs, logs, strict=True):
        groups.setdefault((run.recipe, run.pattern), []).append(log)
    patterns = {pattern for _, pattern in groups if pattern != "dense"}
    figure = Figure(figsize=(8.0, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 1, sharex=True)
    sparse = 0
    for (recipe, pattern), of_group in groups.items():
        is_dense = pattern == "dense"
        colour = DENSE if is_dense else COLOURS[sparse % len(COLOURS)]
        sparse += not is_dense
        name = recipe if is_dense or len(patterns) == 1 else f"{recipe}, {pattern}"
        label = f"{name} ({len(of_group)} seeds)" if len(of_group) > 1 else name
        for axes, key in zip(panels, _PANELS, strict=True):
            _draw(axes, _points(of_group, key), colour, label)
    for axes, said in zip(panels, _PANELS.values(), strict=True):
        axes.set_yscale("log")
        axes.set_ylabel(said)
        axes.grid(axis="y", color="0.85", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set(xlabel="optimizer step", xlim=(0, max(int(line["step"]) for log in logs for line in log)))
    panels[-1].xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", frameon=False, ncols=min(len(labels), 3))
    figure.align_ylabels(panels)
    return figure


def _points(logs: Sequence[Sequence[dict[str, float | None]]], key: str) -> list[_Point]:
    """The steps at which every run has a value that a logarithmic axis can show."""
    curves = [{int(line["step"] or 0): line[key] for line in log} for log in logs]
    points = []
    for step in sorted(set.intersection(*map(set, curves))):
        values = [value for curve in curves if (value := curve[step]) is not None and value > 0]
        if len(values) == len(curves):
            middle = math.exp(statistics.fmean(map(math.log, values)))
            points.append(_Point(step, middle, min(values), max(values)))
    return points


def _draw(axes: Axes, points: Sequence[_Point], colour: str, label: str) -> None:
    steps = [point.step for point in points]
    axes.fill_between(
        steps, [point.lowest for point in points], [point.highest for point in points],
        color=colour, alpha=0.2, linewidth=0,
    )  # fmt: skip
    axes.plot(steps, [point.middle for point in points], color=colour, linewidth=1.8, label=label)
