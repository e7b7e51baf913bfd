"""How runs look: one run over its steps, and many runs side by side. Everything drawn is read from run folders."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from nmflow.report.folder import RunFolder, read_json, read_metrics
from nmflow.report.measures import DEFAULT, MEASURES, Measure
from nmflow.report.tables import Cell, run_title

SPARSE = "#0b6bb3"
DENSE = "0.55"
_SHADES = {"dense": "0.88", "decay": "0.95", "fine-tune": "1.0"}
COLOURS = ("#0b6bb3", "#d1495b", "#2e8b57", "#b8860b", "#7b52ab", "#d2691e", "#1f9e9e", "#8b5a6b", "#556b2f")

LEGEND_MARK, LEGEND_LETTER = 0.6, 0.085
"""Inches of a legend's entry: its mark and the gaps, and one letter of its name."""

Lines = list[dict[str, Any]]
Entry = tuple[str, str, Cell]
"""Of a table: row, column, and what the runs came to there."""


def plot_training(run_dir: str | Path, path: str | Path) -> None:
    """Draw `training_figure` to a PNG. Raises `ValueError` where the run has no figures yet."""
    training_figure(run_dir).savefig(path, dpi=150, format="png")


def plot_compare(cells: Sequence[Cell], path: str | Path) -> None:
    """Draw `compare_figure` to a PNG. Raises `ValueError` where no run is done."""
    compare_figure(cells).savefig(path, dpi=150, format="png")


def training_figure(run_dir: str | Path) -> Figure:
    """D(j), density, loss and main measure of a run over its steps, phases shaded, the dense run beside it in grey.

    Raises `ValueError` where the run has no figures yet.
    """
    folder = RunFolder(Path(run_dir))
    sparse, dense = read_metrics(folder.metrics), read_metrics(folder.dense.metrics)
    states = [line for line in sparse if "phase" in line]
    if not states:
        raise ValueError(f"{folder.metrics}: no figures to draw yet")
    figure = Figure(figsize=(8.0, 8.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(4, 1, sharex=True, height_ratios=(1, 1, 1.3, 1.3))
    last = max(line["step"] for line in sparse + dense)
    for axes in panels:
        _shade(axes, states, last)
        axes.grid(axis="y", color="0.8", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    _draw_decay(panels[0], states)
    _draw_density(panels[1], states)
    _draw_loss(panels[2], sparse, dense)
    _draw_measure(panels[3], sparse, dense)
    _name_phases(panels[0], states, last)
    panels[-1].set(xlabel="optimizer step", xlim=(0, last))
    panels[-1].xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    figure.align_ylabels(panels)
    if folder.result.exists():
        figure.suptitle(run_title(read_json(folder.result)), fontsize=11)
    return figure


def plot_table(entries: Sequence[Entry], dense: Cell | None, path: str | Path) -> None:
    """Draw `table_figure` to a PNG. Raises `ValueError` where no run is done."""
    table_figure(entries, dense).savefig(path, dpi=150, format="png")


def compare_figure(cells: Sequence[Cell]) -> Figure:
    """The test measure by pattern and recipe: every run a dot, the mean a bar, the dense runs a grey band.

    Raises `ValueError` where no run is done.
    """
    sparse = [(cell.pattern, cell.recipe, cell) for cell in cells if cell.pattern != "dense"]
    dense = [cell for cell in cells if cell.pattern == "dense"]
    alone = [(cell.pattern, cell.recipe, cell) for cell in dense]
    figure = table_figure(sparse or alone, dense[0] if sparse and dense else None)
    figure.axes[0].set_xlabel("pattern N:M (N kept of every M)")
    return figure


def table_figure(entries: Sequence[Entry], dense: Cell | None) -> Figure:
    """A table of (row, column, cell), a place for every row and a colour for every column.

    Every run is a dot, the mean a bar, the dense runs a grey band. Raises `ValueError` where no run is done.
    """
    done = [cell for _, _, cell in entries if cell.mean is not None]
    band = dense if dense is not None and dense.mean is not None else None
    if not done and band is None:
        raise ValueError("no run is done, so there is nothing to draw")
    rows = list(dict.fromkeys(row for row, _, _ in entries))
    columns = list(dict.fromkeys(column for _, column, _ in entries))
    width = min(max(6.4, 2.0 + 1.1 * len(rows) * len(columns) ** 0.5), 12.0)
    figure = Figure(figsize=(width, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    if band is not None:
        _draw_dense_band(axes, band)
    for row, column, cell in entries:
        if cell.mean is not None:
            number = columns.index(column)
            place = rows.index(row) + _offset(number, len(columns))
            _draw_cell(axes, cell, column, place, COLOURS[number % len(COLOURS)], 0.3 / len(columns))
    first: dict[str, Any] = {}
    for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
        first.setdefault(label, handle)
    room = int(width / max(LEGEND_MARK + LEGEND_LETTER * len(label) for label in first))
    figure.legend(
        list(first.values()), list(first), loc="outside upper center", frameon=False, ncols=max(1, min(room, 3))
    )
    axes.set_xticks(range(len(rows)), [row.replace(" ", "\n") for row in rows])
    measure = MEASURES[(done[0] if done else cast(Cell, band)).measure]
    axes.set(ylabel=f"test {measure.label}", xlim=(-0.6, len(rows) - 0.4))
    _write_values(axes, measure)
    axes.margins(y=0.1)
    axes.grid(axis="y", color="0.85", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


# -- the panels of one run ---------------------------------------------------------------------------------------


def _draw_decay(axes: Axes, states: Lines) -> None:
    _draw_state(axes, states, "decay")
    axes.set(ylabel="decay D(j)", ylim=(-0.05, 1.25), yticks=[0, 0.5, 1])


def _draw_density(axes: Axes, states: Lines) -> None:
    _draw_state(axes, states, "density")
    lowest = min(line["density"] for line in states)
    axes.set_yscale("log", base=2)
    axes.set(ylabel="density of W~", ylim=(lowest / 1.6, 2.2))
    powers = [power for power in range(12) if 2.0**-power >= lowest / 1.6]
    axes.set_yticks([2.0**-power for power in powers], [f"1/{2**power}" if power else "1" for power in powers])
    axes.minorticks_off()
    room = 0.06 * states[-1]["step"]
    named = -room
    for before, line in pairwise(states):
        if line["density"] < 0.99 * before["density"] and _is_change(before, line) and line["step"] - named >= room:
            place = (line["step"], line["density"])
            axes.annotate(
                line["pattern"], place, xytext=(4, 4), textcoords="offset points", fontsize=8, color="0.25"
            )
            named = line["step"]


def _draw_loss(axes: Axes, sparse: Lines, dense: Lines) -> None:
    for lines, colour, name in ((dense, DENSE, "dense"), (sparse, SPARSE, "sparse")):
        _line(axes, lines, "loss", colour, alpha=0.45, linewidth=0.9, label=f"{name}, training batch")
        _line(axes, lines, "val_loss", colour, linewidth=1.8, label=f"{name}, validation")
    values = [line[key] for line in sparse + dense for key in ("loss", "val_loss") if key in line]
    axes.set(ylabel="loss")
    if values and min(values) > 0 and max(values) / min(values) > 20:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8, loc="best", ncols=2 if dense else 1)


def _draw_measure(axes: Axes, sparse: Lines, dense: Lines) -> None:
    """The first measure that the log has beside the loss: the one that the run is judged by."""
    keys = (key for line in sparse for key in line if key.removeprefix("val_") in MEASURES)
    name = next(keys, f"val_{DEFAULT}").removeprefix("val_")
    measure = MEASURES[name]
    for lines, colour, label in ((dense, DENSE, "dense"), (sparse, SPARSE, "sparse")):
        _line(axes, lines, f"val_{name}", colour, linewidth=1.8, marker="o", markersize=3, label=label)
    axes.set(ylabel=f"validation {measure.label}")
    _write_values(axes, measure)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10)))
    if axes.lines:
        axes.legend(frameon=False, fontsize=8, loc="best")


def _write_values(axes: Axes, measure: Measure) -> None:
    if measure.fraction:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))


def _draw_state(axes: Axes, states: Lines, key: str) -> None:
    """A quantity that moves within a stretch and jumps where phase or pattern change."""
    points = [(states[0]["step"], states[0][key])]
    for before, line in pairwise(states):
        if _is_change(before, line):
            points.append((line["step"], before[key]))
        points.append((line["step"], line[key]))
    axes.plot(*zip(*points, strict=True), color=SPARSE, linewidth=1.8)


def _is_change(before: dict[str, Any], line: dict[str, Any]) -> bool:
    """Every change of phase or pattern has a line of its own in the log."""
    return (before["phase"], before["pattern"]) != (line["phase"], line["pattern"])


def _line(axes: Axes, lines: Lines, key: str, colour: str, **style: Any) -> None:
    found = [line for line in lines if key in line]
    if found:
        axes.plot([line["step"] for line in found], [line[key] for line in found], color=colour, **style)


def _phases(states: Lines, last: int) -> list[tuple[str, int, int]]:
    """(phase, first step, end) of each stretch of one phase."""
    starts = [states[0], *(line for before, line in pairwise(states) if line["phase"] != before["phase"])]
    ends = [*(line["step"] for line in starts[1:]), last]
    return [(line["phase"], line["step"], end) for line, end in zip(starts, ends, strict=True) if end > line["step"]]


def _shade(axes: Axes, states: Lines, last: int) -> None:
    for phase, start, end in _phases(states, last):
        axes.axvspan(start, end, color=_SHADES[phase], linewidth=0, zorder=0)


def _name_phases(axes: Axes, states: Lines, last: int) -> None:
    """The phase at the top of each stretch that has room for the word, else turned upright in its middle."""
    for phase, start, end in _phases(states, last):
        part = (end - start) / last
        if part > 0.02:
            narrow = part < 0.1
            axes.text(
                (start + end) / 2, 0.42 if narrow else 0.97, phase, rotation=90 if narrow else 0,
                transform=axes.get_xaxis_transform(), ha="center", va="center" if narrow else "top",
                color="0.35", fontsize=9,
            )  # fmt: skip


# -- the marks of many runs --------------------------------------------------------------------------------------


def _offset(number: int, count: int) -> float:
    """Where the column of this number stands around its row's tick."""
    return 0.8 * ((number + 0.5) / count - 0.5)


def _draw_cell(axes: Axes, cell: Cell, name: str, place: float, colour: str, half: float) -> None:
    done = [value for value in cell.values if value is not None]
    assert cell.mean is not None
    spread = [(number - (len(done) - 1) / 2) * half * 0.6 for number in range(len(done))]
    axes.hlines(cell.mean, place - half, place + half, color=colour, linewidth=2.5, label=name)
    axes.plot([place + shift for shift in spread], done, "o", color=colour, markersize=5, alpha=0.6)


def _draw_dense_band(axes: Axes, cell: Cell) -> None:
    assert cell.mean is not None
    assert cell.min is not None
    assert cell.max is not None
    axes.axhspan(cell.min, cell.max, color=DENSE, alpha=0.2, linewidth=0)
    axes.axhline(cell.mean, color=DENSE, linewidth=1.5, label=f"{cell.recipe} (mean and range of {cell.n})")
