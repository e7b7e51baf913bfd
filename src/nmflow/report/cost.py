"""What accuracy costs: the test measure of recipes and patterns over FLOPs, as in the paper's figures 4 and 5."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from nmflow.report.columns import short
from nmflow.report.folder import read_result
from nmflow.report.measures import MEASURES
from nmflow.report.plots import COLOURS, DENSE
from nmflow.report.tables import Cell, PlannedRun, cell_to_json, markdown, read_cells

Axis = Literal["forward", "training"]
"""FLOPs of one forward, or of the whole training."""


@dataclass(frozen=True)
class Point:
    """One recipe at one pattern."""

    flops: int
    cell: Cell

    @property
    def value(self) -> float:
        """The mean, so that higher is better."""
        return (self.cell.mean or 0.0) * (1 if MEASURES[self.cell.measure].higher_is_better else -1)


@dataclass(frozen=True)
class Cost:
    """Recipes over FLOPs; the dense network among them."""

    title: str
    axis: Axis
    runs: tuple[PlannedRun, ...]
    differs: tuple[str, ...] = ()

    def points(self) -> list[Point]:
        """Every cell of which a run is done."""
        done = [run for run in self.runs if read_result(run.folder) is not None]
        flops = {(run.recipe, run.pattern): _flops(run.folder, self.axis) for run in done}
        return [Point(flops[cell.recipe, cell.pattern], cell) for cell in read_cells(done)]

    def front(self) -> list[Point]:
        """The points that no other one beats: none is as good at fewer FLOPs, or better at as many. Cheapest first."""
        points = self.points()
        best = [
            point
            for point in points
            if not any(
                (other.flops <= point.flops and other.value > point.value)
                or (other.flops < point.flops and other.value >= point.value)
                for other in points
            )
        ]
        return sorted(best, key=lambda point: point.flops)

    def lines(self) -> list[str]:
        """For people: every point, and which of them no other beats."""
        points = sorted(self.points(), key=lambda point: (point.flops, -point.value))
        if not points:
            return [self.title, "", "no run is done", *self.differs]
        measure, front = MEASURES[points[0].cell.measure], self.front()
        rows = [["FLOPs of " + ("a forward" if self.axis == "forward" else "the training"), "pattern", "recipe",
                 f"test {measure.head}", "n", "on the front"]]  # fmt: skip
        for point in points:
            cell = point.cell
            mark = "yes" if point in front else ""
            rows.append([short(point.flops), cell.pattern, cell.recipe, cell.text(), str(cell.n), mark])
        return [self.title, "", *markdown(rows), "", "the front: means that none of fewer FLOPs reaches", *self.differs]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        front = self.front()
        return {
            "format": 1,
            "title": self.title,
            "flops": self.axis,
            "points": [
                {"flops": each.flops, "front": each in front, "ours": cell_to_json(each.cell)} for each in self.points()
            ],
            "differs": list(self.differs),
        }

    def draw(self, path: Path) -> bool:
        """Draw a line a recipe over its patterns, means with standard deviations; False where no run is done."""
        points = self.points()
        if points:
            self._figure(points).savefig(path, dpi=150, format="png")
        return bool(points)

    def _figure(self, points: Sequence[Point]) -> Figure:
        measure = MEASURES[points[0].cell.measure]
        scale = 100 if measure.fraction else 1
        figure = Figure(figsize=(7.2, 4.8), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        recipes = [recipe for recipe in dict.fromkeys(point.cell.recipe for point in points) if recipe != "dense"]
        for recipe in ["dense", *recipes]:
            mine = sorted((point for point in points if point.cell.recipe == recipe), key=lambda point: point.flops)
            colour = DENSE if recipe == "dense" else COLOURS[recipes.index(recipe) % len(COLOURS)]
            axes.errorbar(
                [point.flops for point in mine], [scale * (point.cell.mean or 0.0) for point in mine],
                yerr=[scale * (point.cell.sd or 0.0) for point in mine], color=colour, label=recipe, marker="o",
                markersize=4, linewidth=1.4, capsize=2,
            )  # fmt: skip
        axes.set(xlabel="FLOPs of " + ("a forward" if self.axis == "forward" else "the training"))
        axes.set(ylabel=f"test {measure.head}")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda flops, _: short(round(flops))))
        falling = sorted(points, key=lambda point: point.cell.mean or 0.0, reverse=True)
        for lowest in {point.cell.pattern: point for point in falling}.values():  # of a pattern the last stays
            axes.annotate(
                lowest.cell.pattern, (lowest.flops, scale * (lowest.cell.mean or 0.0)), xytext=(6, -9),
                textcoords="offset points", fontsize=8, color="0.35",
            )  # fmt: skip
        axes.grid(axis="y", color="0.85", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside upper center", frameon=False, ncols=3)
        return figure


def _flops(folder: Path, axis: Axis) -> int:
    """What a run's result.json says of the sparse network; of a dense run both are alike."""
    result = read_result(folder)
    assert result is not None
    return int(result["flops"][axis]["sparse"])
