"""The command line: the only place that prints for people and exits (0 done, 1 the answer is no, 2 wrong input).

What costs time to import (torch, numpy, pydantic, matplotlib, rich) is imported by the command that needs it.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import click

from nmflow import __version__

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from nmflow.doctor import Facts
    from nmflow.schedules import Recipe, Segment, Stage

_SETTING = re.compile(r"[A-Za-z_][\w.]*=")


class _Refused(click.ClickException):
    """What the library raised, told in a line."""

    exit_code = 2

    def show(self, file: Any = None) -> None:
        click.echo(f"error: {self.message}", err=True)


class _Commands(click.Group):
    """A group that tells errors without a traceback, and names the nearest command to an unknown one."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            # Nobody reads on. What is left in the buffer goes nowhere, so that the exit stays quiet too.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(141)  # what the shell would report of SIGPIPE
        except (ValueError, TypeError, OSError) as error:
            raise _Refused(str(error)) from error
        except KeyboardInterrupt as stop:
            click.echo(str(stop) or "stopped", err=True)
            ctx.exit(130)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            near = difflib.get_close_matches(name, self.list_commands(ctx), n=1, cutoff=0.5)
            hint = f'; did you mean "{near[0]}"?' if near else ""
            ctx.fail(f'no command "{name}"{hint} The commands: {", ".join(self.list_commands(ctx))}.')
        return super().resolve_command(ctx, args)


def main() -> None:
    """Entry point of the console script and of `python -m nmflow`."""
    cli(prog_name="nmflow")


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="nmflow")
def cli() -> None:
    """Train networks to N:M sparsity, prove it, shrink them and run them.

    N:M means: N weights kept of every M (1:16 keeps one of sixteen). Settings are key=value.
    """


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON to stdout, and nothing else.")
targets_option = click.option(
    "--targets",
    multiple=True,
    metavar="RULE=N:M",
    help="What is sparse, such as ff=1:16 or re:blocks.*fc1.weight=1:8; dense keeps it dense. May be repeated; "
    "without it, what the file says of itself holds.",
)


@cli.command(short_help="Train a network to N:M, next to a dense run.")
@click.argument("settings", nargs=-1, metavar="[CONFIG.yaml] [KEY=VALUE]...")
@json_option
def train(settings: tuple[str, ...], as_json: bool) -> None:
    """Train a network to N:M, next to a dense run of the same budget.

    Without arguments: the paper's ViT-tiny on scikit-learn's digits, FF layers at 1:16 (one of every sixteen
    weights is kept), by mdgf-exponential. `pattern=1:8` alone means the FF layers; `targets.ff=1:16
    targets.qk=1:4` says it by role. `resume=DIR` continues a run that was stopped.
    """
    path, overrides, resume = _read_settings(settings)
    import nmflow.train as training

    console = _progress_console()
    if resume is not None:
        result = training.resume(resume, console=console)
    else:
        result = training.train(training.load_config(path, overrides), console=console)
    _answer(result.lines(), result.to_dict(), as_json)


@cli.command(short_help="Train recipes x patterns x seeds into one table.")
@click.argument("settings", nargs=-1, metavar="[CONFIG.yaml] [KEY=VALUE]...")
@json_option
def compare(settings: tuple[str, ...], as_json: bool) -> None:
    """Train recipes x patterns x seeds; one table with mean and spread, one plot.

    For instance recipes=dense,sr-ste,mdgf-exponential pattern=1:8,1:16 seeds=3. `resume=DIR` continues a
    comparison that was stopped.
    """
    path, overrides, resume = _read_settings(settings)
    import nmflow.experiments as experiments
    import nmflow.train as training

    console = _progress_console()
    if resume is not None:
        result = experiments.resume_compare(resume, console=console)
    else:
        result = experiments.compare(training.load_compare_config(path, overrides), console=console)
    _answer(result.lines(), result.to_dict(), as_json)


@cli.command(short_help="Prove a file N:M, block by block.")
@click.argument("path", type=click.Path())
@targets_option
@json_option
@click.pass_context
def verify(ctx: click.Context, path: str, targets: tuple[str, ...], as_json: bool) -> None:
    """Prove that the weights at PATH (a run folder, a safetensors file) are N:M, block by block.

    Exit code 0: they are; 1: they are not, and the blocks that break the pattern are named; 2: it could not be
    asked.
    """
    rules = _read_targets(targets)
    import nmflow

    report = nmflow.verify(path, rules)
    _answer(report.lines(), report.to_dict(), as_json)
    ctx.exit(0 if report.ok else 1)


@cli.command(short_help="Write values and offsets instead of zeros.")
@click.argument("source", metavar="IN", type=click.Path())
@click.argument("destination", metavar="OUT", type=click.Path())
@targets_option
@json_option
def compress(source: str, destination: str, targets: tuple[str, ...], as_json: bool) -> None:
    """Write the N:M weights of IN (a run folder, a safetensors file) as values and offsets to OUT."""
    rules = _read_targets(targets)
    from nmflow.runtime import compress_file

    report = compress_file(source, destination, rules)
    _answer(report.lines(), report.to_dict(), as_json)


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

    made = _read_recipe(recipe, options)
    plans: list[tuple[tuple[int | None, ...], list[Segment], tuple[str, ...]]] = []
    for axis in axes or (None,):
        segments, notes = plan(made, steps, pattern, axis), made.notes(pattern, axis)
        if plans and plans[-1][1:] == (segments, notes):
            plans[-1] = ((*plans[-1][0], axis), segments, notes)
        else:
            plans.append(((axis,), segments, notes))
    if plot is not None:
        from nmflow.report.plots_schedule import curve, plot_schedule

        curves = [curve(made, steps, pattern, shared[0], _axis_label(shared)) for shared, _, _ in plans]
        plot_schedule(curves, plot, f"{made.name} to {pattern}, {steps:,} steps")
    if as_json:
        facts = {"recipe": made.to_dict(), "pattern": pattern, "total_steps": steps, "plot": plot}
        facts["plans"] = [
            {"axes": [axis for axis in shared if axis], "notes": notes, "segments": _segments_to_json(segments)}
            for shared, segments, notes in plans
        ]
        _print_json(facts)
        return
    for shared, segments, notes in plans:
        title = f"{made.name} to {pattern} (N of every M kept), {steps:,} steps"
        _print(_plan_table(segments, ", ".join(filter(None, [title, _axis_label(shared)]))))
        for line in (*notes, *_plan_lines(segments, made)):
            click.echo(line)
    if plot is not None:
        click.echo(f"plot: {plot}")


@cli.command(short_help="Say what this machine can run, and why not.")
@json_option
def doctor(as_json: bool) -> None:
    """Say what this machine can run, and why not the rest."""
    from nmflow.doctor import examine

    facts = examine()
    if as_json:
        _print_json(facts.to_dict())
        return
    for table in _doctor_tables(facts):
        _print(table)
    click.echo("\n".join(["missing:", *(f"  {line}" for line in facts.missing)] if facts.missing else ["all there"]))


# Reading


def _read_settings(settings: Iterable[str]) -> tuple[str | None, list[str], str | None]:
    """(config file, key=value settings, run to resume) of the arguments of `train` and `compare`."""
    overrides = [setting for setting in settings if _SETTING.match(setting)]
    paths = [setting for setting in settings if not _SETTING.match(setting)]
    resumed = [setting.partition("=")[2] for setting in overrides if setting.startswith("resume=")]
    if len(paths) > 1:
        raise click.UsageError(f"one CONFIG.yaml, then key=value; got {' and '.join(paths)}")
    if resumed and (paths or len(overrides) > 1):
        raise click.UsageError("resume=DIR continues a run as it was begun; it goes with no other setting")
    if resumed and not resumed[0]:
        raise click.UsageError("resume= needs the folder of a run: resume=runs/NAME")
    return (paths[0] if paths else None), overrides, (resumed[0] if resumed else None)


def _read_targets(rules: Iterable[str]) -> dict[str, str | None] | None:
    """`--targets` as the mapping that `resolve` takes; None where none was given."""
    targets: dict[str, str | None] = {}
    for rule in rules:
        name, sign, pattern = rule.rpartition("=")
        if not sign or not name or not pattern:
            raise click.UsageError(f'--targets "{rule}": expected RULE=N:M, such as ff=1:16')
        if name in targets:
            raise click.UsageError(f'--targets "{rule}": the rule "{name}" is given twice')
        targets[name] = pattern
    return targets or None


def _read_recipe(text: str, options: Iterable[str]) -> Recipe:
    """A recipe by name and key=value options, or from the same YAML as in a config."""
    from nmflow.schedules import recipe, recipes

    if not text.lstrip().startswith(("[", "{")):
        if text not in recipes():
            return recipe(text)  # raises, naming the nearest, before anything heavy is imported
        if not options:
            return recipe(text)
    from nmflow.train.config_text import parse_value

    given: dict[str, Any] = {}
    for option in options:
        key, sign, value = option.partition("=")
        if not sign or key in given or key == "name":
            raise click.UsageError(f'"{option}": expected an option of the recipe as key=value, each key once')
        given[key] = parse_value(value)
    if text.lstrip().startswith(("[", "{")):
        if given:
            raise click.UsageError("the options of a recipe given as YAML stand in the YAML")
        from nmflow.train.config import build_recipe

        return build_recipe(parse_value(text))
    return recipe(text, **given)


# Printing


def _answer(lines: Iterable[str], facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        _print_json(facts)
    else:
        click.echo("\n".join(lines))


def _print_json(facts: dict[str, Any]) -> None:
    click.echo(json.dumps(facts, indent=2, ensure_ascii=False))


def _print(what: RenderableType) -> None:
    """Through click rather than rich, so that a closed pipe is handled in one place."""
    from rich.console import Console

    console = Console()
    with console.capture() as capture:
        console.print(what)
    click.echo(capture.get(), nl=False)


def _progress_console() -> Console:
    """Progress goes to stderr: stdout holds the answer and nothing else."""
    from rich.console import Console

    return Console(stderr=True)


def _axis_label(axes: tuple[int | None, ...]) -> str:
    known = [str(axis) for axis in axes if axis is not None]
    return f"axis {', '.join(known)}" if known else ""


def _plan_table(segments: Sequence[Segment], title: str) -> RenderableType:
    """One row a segment; what is the same in all of them goes below the table, see `_plan_lines`."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("steps", "phase", "pattern", "density", "D(j)"):
        table.add_column(heading, no_wrap=True)
    extra = [column for column in _EXTRA if _varies(segments, column)]
    for column in extra:
        table.add_column(column, no_wrap=True)
    for segment in segments:
        first, last = segment.first, segment.last
        decay = f"{first.decay:.3g}" + (f" → {last.decay:.3g}" if first.decay != last.decay else "")
        row = [f"{segment.start:,}-{segment.end - 1:,}", first.phase, str(first.pattern)]
        row += [f"{first.pattern.density:.4g}", decay, *(_EXTRA[column](first) for column in extra)]
        table.add_row(*row)
    return table


def _plan_lines(segments: Sequence[Segment], recipe: Recipe) -> list[str]:
    """What holds all through the plan, and what its masks are taken from."""
    first = segments[0].first
    lines = [f"{name}: {say(first)}" for name, say in _EXTRA.items() if not _varies(segments, name)]
    if recipe.needs_gradients:
        lines.append("the mask is chosen by gradients on a few batches (Sparsifier.calibrate)")
    if recipe.mask == "frozen":
        lines.append("the mask is taken once and kept")
    if recipe.mask == "inherit":
        lines.append("each mask is chosen among the survivors of the one before")
    return lines


_EXTRA: dict[str, Callable[[Stage], str]] = {
    "pruned gradient": lambda stage: stage.pruned_gradient,
    "λ": lambda stage: f"{stage.sr_ste:g}",
    "what fades": lambda stage: "all that is pruned" if stage.outer.is_dense else f"down from {stage.outer}",
}
"""Facts of a stage that seldom change within a run."""


def _varies(segments: Sequence[Segment], column: str) -> bool:
    return len({_EXTRA[column](segment.first) for segment in segments}) > 1


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


def _doctor_tables(facts: Facts) -> list[RenderableType]:
    from rich import box
    from rich.table import Table

    machine = Table(box=box.SIMPLE_HEAD, show_header=False)
    torch = f"{facts.torch}, {facts.threads} threads, {facts.cpu}" if facts.torch else "not installed"
    for name, value in (
        ("nmflow", facts.nmflow),
        ("python", facts.python),
        ("system", f"{facts.system}, {facts.cores} cores"),
        ("torch", torch),
        ("devices", "\n".join(facts.devices) or "none"),
        ("compiler", facts.compiler or "none"),
    ):
        machine.add_row(name, value)
    packages = Table("package", "version", "for", box=box.SIMPLE_HEAD)
    for package in facts.packages:
        purpose = "nmflow itself" if package.required else f"{package.purpose} (optional)"
        packages.add_row(package.name, package.version or "-", purpose)
    kernels = Table("kernel", "task", "here", box=box.SIMPLE_HEAD)
    for kernel in facts.kernels:
        kernels.add_row(kernel.name, kernel.task, kernel.why_not or "runs")
    return [machine, packages, kernels]
