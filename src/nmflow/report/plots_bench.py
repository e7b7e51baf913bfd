"""How speed looks: the speed-up of every pattern over the tokens, goals and ceilings beside it, from results.json."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from nmflow.report.plots import DENSE

_COLOURS = ("#0b6bb3", "#d1495b", "#2e8b57", "#b8860b", "#7b52ab", "#d2691e", "#1f9e9e", "#8b5a6b", "#556b2f")

Cells = Sequence[dict[str, Any]]


def plot_kernels(results: dict[str, Any], path: str | Path) -> None:
    """Draw `kernels_figure` to a PNG. Raises `ValueError` where nothing was measured."""
    kernels_figure(results).savefig(path, dpi=150, format="png")


def kernels_figure(results: dict[str, Any]) -> Figure:
    """A panel for each part that was measured, of the content of results.json (`nmflow bench kernels out=DIR`).

    Products: over the tokens, the speed-up over `nn.Linear` of the shape that gains least; a goal is a flat mark, the
    ceiling (every kept weight at the machine's measured peak) is dotted. Where there is one number of tokens, and for
    masks, a bar a pattern. Convolutions: layers side by side. Raises `ValueError` where nothing was measured.
    """
    cells, convolutions, masks = results["cells"], results["convolutions"], results["masks"]
    parts = list(dict.fromkeys((cell["part"], cell["dtype"]) for cell in cells))
    draws: list[Callable[[Axes], None]] = []
    for part, dtype in parts:
        mine = _worst([cell for cell in cells if (cell["part"], cell["dtype"]) == (part, dtype)])
        draws.append(lambda axes, mine=mine: _draw_products(axes, mine))  # type: ignore[misc]  # bound early
    if convolutions:
        draws.append(lambda axes: _draw_convolutions(axes, convolutions))
    if masks:
        draws.append(lambda axes: _draw_masks(axes, masks))
    if not draws:
        raise ValueError("nothing was measured, so there is nothing to draw")
    figure = Figure(figsize=(8.0, 0.6 + 3.4 * len(draws)), layout="constrained")
    FigureCanvasAgg(figure)
    column = figure.subplots(len(draws), 1, squeeze=False)[:, 0]
    for axes, draw in zip(column, draws, strict=True):
        draw(axes)
        axes.grid(axis="y", color="0.85", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    machine = results["setup"]["machine"]
    figure.suptitle(f"{machine['cpu']}, {machine['threads']} threads, {machine['isa']}", fontsize=10)
    return figure


def _worst(cells: Cells) -> list[dict[str, Any]]:
    """Of every pattern and number of tokens the shape that gains least."""
    least: dict[tuple[str, int], dict[str, Any]] = {}
    for cell in cells:
        place = (cell["pattern"], cell["tokens"])
        if place not in least or _speed_up(cell) < _speed_up(least[place]):
            least[place] = cell
    return list(least.values())


def _speed_up(cell: dict[str, Any]) -> float:
    return float(cell["over"]["F.linear"])


def _draw_products(axes: Axes, cells: Cells) -> None:
    tokens = sorted({cell["tokens"] for cell in cells})
    if len(tokens) > 1:
        _draw_lines(axes, cells, tokens)
    else:
        patterns = [cell["pattern"] for cell in cells]
        _draw_bars(axes, patterns, [_speed_up(cell) for cell in cells], [cell["goal"] for cell in cells])
        axes.set_xlabel("pattern N:M (N kept of every M)")
    layers = f", {cells[0]['layers']} layers in turn" if cells[0]["layers"] > 1 else ""
    count = f", {tokens[0]} token{'s' * (tokens[0] > 1)}" if len(tokens) == 1 else ""
    axes.set_title(f"{cells[0]['dtype']}{count}{layers}: worst shape", fontsize=10)
    axes.set_ylabel("times nn.Linear")
    _log_scale(axes, [_speed_up(cell) for cell in cells] + [cell["goal"] for cell in cells if cell["goal"]])


def _draw_lines(axes: Axes, cells: Cells, tokens: list[int]) -> None:
    for number, pattern in enumerate(dict.fromkeys(cell["pattern"] for cell in cells)):
        mine = sorted((cell for cell in cells if cell["pattern"] == pattern), key=lambda cell: cell["tokens"])
        places = [tokens.index(cell["tokens"]) for cell in mine]
        colour = _COLOURS[number % len(_COLOURS)]
        axes.plot(
            places, [_speed_up(cell) for cell in mine], color=colour, marker="o", markersize=4, linewidth=1.8,
            label=pattern,
        )  # fmt: skip
        ceilings = [_speed_up(cell) / cell["of_peak"] for cell in mine]
        axes.plot(places, ceilings, color=colour, linewidth=0.9, linestyle=":")
        for place, cell in zip(places, mine, strict=True):
            if cell["goal"]:
                axes.hlines(cell["goal"], place - 0.12, place + 0.12, color=colour, linewidth=2.5, alpha=0.45)
    if any(cell["goal"] for cell in cells):
        axes.plot([], [], color="0.4", linewidth=2.5, alpha=0.45, label="goal")
    axes.plot([], [], color="0.4", linewidth=0.9, linestyle=":", label="at peak")
    axes.axhline(1.0, color=DENSE, linewidth=1.0)
    axes.set_xticks(range(len(tokens)), [f"{count:,}" for count in tokens])
    axes.set(xlabel="tokens", xlim=(-0.3, len(tokens) - 0.7))
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _draw_convolutions(axes: Axes, cells: Cells) -> None:
    layers = list(dict.fromkeys(tuple(cell["layer"]) for cell in cells))
    for number, pattern in enumerate(dict.fromkeys(cell["pattern"] for cell in cells)):
        mine = [cell for cell in cells if cell["pattern"] == pattern]
        places = [layers.index(tuple(cell["layer"])) for cell in mine]
        values = [_over_convolution(cell) for cell in mine]
        colour = _COLOURS[number % len(_COLOURS)]
        axes.plot(places, values, color=colour, marker="o", markersize=4, linewidth=0.0, label=pattern)
        unused = [(x, y) for x, y, cell in zip(places, values, mine, strict=True) if not cell["product"]]
        axes.plot(*zip(*unused, strict=True), "x", color="0.2", markersize=7) if unused else None
    axes.plot([], [], "x", color="0.2", markersize=7, label="not taken")
    axes.axhline(1.0, color=DENSE, linewidth=1.0)
    names = [f"{k}x{k}{f'/{s}' if s > 1 else ''}\n{i}-{o}\n{side}²" for i, o, k, s, side in layers]
    axes.set_xticks(range(len(layers)), names)
    axes.tick_params(axis="x", labelsize=7)
    axes.set_title("convolutions of one image as products (layers of ResNet-50)", fontsize=10)
    axes.set_ylabel("times torch's faster one")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _log_scale(axes, [_over_convolution(cell) for cell in cells])


def _over_convolution(cell: dict[str, Any]) -> float:
    return float(min(cell["over"].values()))


def _draw_masks(axes: Axes, masks: Cells) -> None:
    names = [f"{cell['pattern']}\n{cell['shape'][0]} x\n{cell['shape'][1]}" for cell in masks]
    values = [cell["over_argsort"] for cell in masks]
    goals = [cell["goal_over_argsort"] for cell in masks]
    _draw_bars(axes, names, values, goals, [f"{cell['of_copy']:.0%}" for cell in masks])
    axes.tick_params(axis="x", labelsize=7)
    axes.set_title("masks and W~ in one pass (above: part of the speed of a copy)", fontsize=10)
    axes.set_ylabel("times argsort and scatter")
    _log_scale(axes, values + [goal for goal in goals if goal])


def _draw_bars(
    axes: Axes,
    names: Sequence[str],
    values: Sequence[float],
    goals: Sequence[float | None],
    texts: Sequence[str] | None = None,
) -> None:
    """Bars in order; a goal is a line across its bar."""
    axes.bar(range(len(names)), values, width=0.6, color=_COLOURS[0], alpha=0.85)
    for place, (value, goal) in enumerate(zip(values, goals, strict=True)):
        text = texts[place] if texts else f"{value:.1f}"
        axes.annotate(
            text, (place, value), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=8, color="0.25"
        )
        if goal:
            axes.hlines(goal, place - 0.4, place + 0.4, color=_COLOURS[1], linewidth=2.0)
    if any(goals):
        axes.plot([], [], color=_COLOURS[1], linewidth=2.0, label="goal")
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.set_xticks(range(len(names)), names)
    axes.set_xlim(-0.6, max(len(names), 5) - 0.4)


def _log_scale(axes: Axes, values: Sequence[float]) -> None:
    """From below the least value (or 1, dense speed) to above the largest; ceilings further up are cut."""
    axes.set_yscale("log", base=2)
    axes.set_ylim(min(*values, 1.0) / 1.3, max(*values, 1.0) * 2.2)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
