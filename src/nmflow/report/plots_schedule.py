"""How a plan looks: D(j), the density of Φ and its block length over the steps of a run, one curve a plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nmflow.pattern import Pattern
from nmflow.schedules import Recipe, Segment, Stage, plan

_POINTS = 200
_SHADES = {"dense": "0.86", "decay": "0.94", "fine-tune": "1.0"}
_STYLES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Curve:
    """A plan and its stages at the steps where they are drawn; a jump has two points at one step."""

    label: str
    segments: tuple[Segment, ...]
    steps: tuple[int, ...]
    stages: tuple[Stage, ...]

    def values(self, of: Callable[[Stage], float]) -> list[float]:
        """One number of every stage."""
        return [of(stage) for stage in self.stages]


def curve(
    recipe: Recipe, total_steps: int, target: Pattern | str, axis: int | None = None, label: str = ""
) -> Curve:
    """A plan as a curve: both ends of every segment, and enough steps between them to see a line bend.

    Raises as `Recipe.at` does.
    """
    segments = plan(recipe, total_steps, target, axis)
    steps: list[int] = []
    stages: list[Stage] = []
    for segment in segments:
        length = segment.end - segment.start
        points = min(_POINTS, length) if segment.first.decay != segment.last.decay else 1
        inner = sorted({segment.start + length * point // points for point in range(points)})
        steps += [*inner, segment.end]
        stages += [recipe.at(step, total_steps, target, axis) for step in inner] + [segment.last]
    return Curve(label, tuple(segments), tuple(steps), tuple(stages))


def plot_schedule(curves: Sequence[Curve], path: str | Path, title: str = "") -> None:
    """Draw curves of one run length to a PNG, the phases of the first one shaded behind them.

    The panel of block lengths M is there only where M changes. Raises `OSError` where the file cannot be
    written.
    """
    panels = [_draw_decay, _draw_density, *([_draw_blocks] if _blocks_change(curves) else [])]
    figure = Figure(figsize=(8.0, 1.2 + 2.2 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    column = figure.subplots(len(panels), 1, sharex=True)
    for axes, draw in zip(column, panels, strict=True):
        for phase, start, end in _phases(curves[0]):
            axes.axvspan(start, end, color=_SHADES[phase], linewidth=0, zorder=0)
        draw(axes, curves)
        axes.grid(axis="y", color="0.8", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.minorticks_off()
    column[0].set_title(title)
    column[-1].set(xlabel="optimizer step", xlim=(0, curves[0].steps[-1]))
    _name_phases(column[0], curves[0])
    if len(curves) > 1:
        column[-1].legend(frameon=False, loc="upper right")
    figure.savefig(path, dpi=150, format="png")


def _draw_decay(axes: Axes, curves: Sequence[Curve]) -> None:
    _lines(axes, curves, lambda stage: stage.decay)
    axes.set(ylabel="decay D(j)", ylim=(-0.05, 1.2), yticks=[0, 0.25, 0.5, 0.75, 1])


def _draw_density(axes: Axes, curves: Sequence[Curve]) -> None:
    _lines(axes, curves, lambda stage: stage.pattern.density)
    lowest = min(min(one.values(lambda stage: stage.pattern.density)) for one in curves)
    axes.set_yscale("log", base=2)
    axes.set(ylabel="density N/M of Φ", ylim=(lowest / 1.5, 2.4))
    powers = [power for power in range(12) if 2.0**-power >= lowest / 1.5]
    axes.set_yticks([2.0**-power for power in powers], [f"1/{2**power}" if power else "1" for power in powers])
    if len(curves) == 1:
        _name_patterns(axes, curves[0])


def _draw_blocks(axes: Axes, curves: Sequence[Curve]) -> None:
    _lines(axes, curves, lambda stage: stage.pattern.m)
    sizes = sorted({stage.pattern.m for one in curves for stage in one.stages})
    axes.set_yscale("log", base=2)
    axes.set(ylabel="block length M of Φ", ylim=(0.8, sizes[-1] * 1.8))
    axes.set_yticks(sizes, [str(size) if size > 1 else "dense" for size in sizes])


def _lines(axes: Axes, curves: Sequence[Curve], of: Callable[[Stage], float]) -> None:
    for number, one in enumerate(curves):
        axes.plot(
            one.steps,
            one.values(of),
            label=one.label,
            color=f"C{number}",
            linewidth=2.0,
            linestyle=_STYLES[number % len(_STYLES)],
        )


def _name_phases(axes: Axes, one: Curve) -> None:
    """The phase in each stretch that has room for the word, at the top, or for the word turned upright."""
    for phase, start, end in _phases(one):
        part = (end - start) / one.steps[-1]
        if part > 0.02:
            narrow = part < 0.1
            axes.text(
                (start + end) / 2,
                0.45 if narrow else 0.97,
                phase,
                rotation=90 if narrow else 0,
                transform=axes.get_xaxis_transform(),
                ha="center",
                va="center" if narrow else "top",
                color="0.35",
                fontsize=9,
            )


def _name_patterns(axes: Axes, one: Curve) -> None:
    """Each pattern but dense above its first step, turned upright where there are many."""
    starts = {segment.first.pattern: segment.start for segment in reversed(one.segments)}
    starts.pop(Pattern.dense(), None)
    for pattern, start in starts.items():
        axes.annotate(
            str(pattern),
            (start, pattern.density),
            xytext=(3, 3),
            textcoords="offset points",
            rotation=90 if len(starts) > 5 else 0,
            fontsize=8,
            color="0.25",
        )


def _phases(one: Curve) -> list[tuple[str, int, int]]:
    """(phase, first step, end) of each stretch of one phase."""
    stretches: list[tuple[str, int, int]] = []
    for segment in one.segments:
        start = segment.start
        if stretches and stretches[-1][0] == segment.first.phase:
            start = stretches.pop()[1]
        stretches.append((segment.first.phase, start, segment.end))
    return stretches


def _blocks_change(curves: Sequence[Curve]) -> bool:
    return any(len({stage.pattern.m for stage in one.stages} - {1}) > 1 for one in curves)
