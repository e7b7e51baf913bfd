"""The command that shows what a recipe does: schedule."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from nmflow.cli.answers import print_json, print_rich
from nmflow.cli.group import cli
from nmflow.cli.options import json_option, read_recipe

if TYPE_CHECKING:
    from nmflow.schedules import Segment


@cli.command(short_help="Show what a recipe does at which step.")
@click.argument("recipe")
@click.argument("pattern")
@click.argument("options", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--steps", default=10_000, show_default=True, help="Optimizer steps of the run, T.")
@click.option("--axis", "axes", type=int, multiple=True, help="Length of a reduction axis; may be repeated.")
@click.option("--plot", type=click.Path(dir_okay=False), metavar="FILE.png", help="Draw D(j) and density.")
@json_option
def schedule(
    recipe: str,
    pattern: str,
    options: tuple[str, ...],
    steps: int,
    axes: tuple[int, ...],
    plot: str | None,
    as_json: bool,
) -> None:
    """Show what a RECIPE does at which step of a run that ends in PATTERN (N:M, N weights kept of every M).

    RECIPE is a name (nmflow schedule sdgf-stepwise 1:16 dense=0.1), or a sequence as in a config:
    "[{recipe: sdgf-stepwise, until: 0.5, pattern: 4:16}, {recipe: mdgf-linear, until: 1.0}]". The stages of
    sdgf-geometric depend on the axis: --axis 768 --axis 3072 shows a plan for each.
    """
    from nmflow.schedules import plan

    made = read_recipe(recipe, options)
    title = f"{made.label} to {pattern}"
    plans: list[_Plan] = []
    for axis in axes or (None,):
        segments, notes = plan(made, steps, pattern, axis), made.notes(pattern, axis)
        same = next((known for known in plans if known.segments == segments), None)
        if same is None:
            plans.append(same := _Plan(segments))
        same.axes += [] if axis is None else [axis]
        same.notes += [note for note in notes if note not in same.notes]
    if plot is not None:
        from nmflow.report.plots_schedule import curve, plot_schedule

        curves = [curve(made, steps, pattern, next(iter(one.axes), None), one.label) for one in plans]
        plot_schedule(curves, plot, f"{title}, {steps:,} steps")
    if as_json:
        facts = {"recipe": made.to_dict(), "pattern": pattern, "total_steps": steps, "plot": plot}
        facts["plans"] = [
            {"axes": one.axes, "notes": one.notes, "segments": _segments_to_json(one.segments)} for one in plans
        ]
        print_json(facts)
        return
    from nmflow.report.terminal import plan_lines, plan_table

    for one in plans:
        click.echo(f"{title} (N of every M kept), {steps:,} steps{', ' if one.label else ''}{one.label}")
        print_rich(plan_table(one.segments))
        for line in (*one.notes, *plan_lines(one.segments, made)):
            click.echo(line)
    if plot is not None:
        click.echo(f"plot: {plot}")


@dataclass
class _Plan:
    """A plan, and the axes that share it."""

    segments: list[Segment]
    axes: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        known = ", ".join(map(str, self.axes))
        return f"{'axis' if len(self.axes) == 1 else 'axes'} {known}" if known else ""


def _segments_to_json(segments: Iterable[Segment]) -> list[dict[str, Any]]:
    return [
        {
            "start": segment.start,
            "end": segment.end,
            "phase": segment.first.phase,
            "pattern": str(segment.first.pattern),
            "density": segment.first.pattern.density,
            "decay": [segment.first.decay, segment.last.decay],
            "pruned_gradient": segment.first.pruned_gradient,
            "sr_ste": segment.first.sr_ste,
            "mask": segment.first.mask,
            "outer": str(segment.first.outer),
        }
        for segment in segments
    ]
