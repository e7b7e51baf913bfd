"""The command line: the only place that prints for people and exits (0 done, 1 the answer is no, 2 wrong input).

What costs time to import (torch, numpy, pydantic, matplotlib, rich) is imported by the command that needs it.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nmflow import __version__

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from nmflow.bench.output import Result as BenchResult
    from nmflow.masks import Remainder
    from nmflow.schedules import Recipe, Segment

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
            ctx.exit(141)  # nobody reads on: what a shell reports of SIGPIPE, and no answer of ours
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
    help="What is sparse, such as ff=1:16 or re:blocks.*fc1.weight=1:8; dense keeps it dense. May be repeated.",
)
remainder_option = click.option(
    "--remainder", type=click.Choice(["error", "partial", "skip"]), default="error", show_default=True,
    help="A last block shorter than M: refuse, keep min(N, r) of it, or leave the layer dense; as in train.",
)


def example_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The sizes of the input that a network is counted on."""
    for name, what in (
        ("--length", "Tokens of a text. Without it, the network's context, at most 512."),
        ("--image", "Pixels of an image's side. Without it, what the network is configured for."),
        ("--batch", "Inputs of a forward, 1 without it."),
    ):
        command = click.option(name, type=click.IntRange(min=1), help=what)(command)
    return command


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

    if resume is not None:
        result = training.resume(resume, console=_progress_console())
    else:
        config = training.load_config(path, overrides)  # before torch is imported
        result = training.train(config, console=_progress_console())
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
    if resume is not None:
        from nmflow.experiments import resume_compare

        result = resume_compare(resume, console=_progress_console())
    else:
        from nmflow.train import load_compare_config

        config = load_compare_config(path, overrides)  # before torch is imported
        from nmflow.experiments import compare

        result = compare(config, console=_progress_console())
    _answer(result.lines(), result.to_dict(), as_json)


@cli.command(short_help="Put runs of several folders into one table.")
@click.argument("folders", nargs=-1, required=True, metavar="FOLDER...", type=click.Path(exists=True))
@click.option("--tasks", metavar="TASK,...", help="Of GLUE: average over these tasks, such as MRPC,SST-2.")
@json_option
def report(folders: tuple[str, ...], tasks: str | None, as_json: bool) -> None:
    """Put the runs and comparisons at FOLDER... into one table for each data set; those of GLUE into GLUE's.

    GLUE's table has a column a task, by the task's own measures, and two averages: overall, as in the paper (nine
    columns, no WNLI), and that of GLUE's leaderboard (nine tasks, WNLI among them). An average is missing where a
    task is; --tasks names a smaller set.
    """
    from nmflow.experiments import collect

    found = collect(folders, tasks.split(",") if tasks else ())
    _answer(found.lines(), found.to_dict(), as_json)


@cli.command(short_help="Prove a file N:M, block by block.")
@click.argument("path", type=click.Path(exists=True))
@targets_option
@json_option
@click.pass_context
def verify(ctx: click.Context, path: str, targets: tuple[str, ...], as_json: bool) -> None:
    """Prove that the weights at PATH (a run folder, a safetensors file) are N:M, block by block.

    Without --targets, what the file says of itself holds. Exit code 0: they are; 1: they are not, and the blocks
    that break the pattern are named; 2: it could not be asked.
    """
    rules = _read_targets(targets)
    import nmflow

    report = nmflow.verify(path, rules)
    _answer(report.lines(), report.to_dict(), as_json)
    ctx.exit(0 if report.ok else 1)


@cli.command(short_help="Write values and offsets instead of zeros.")
@click.argument("source", metavar="IN", type=click.Path(exists=True))
@click.argument("destination", metavar="OUT", type=click.Path())
@targets_option
@json_option
def compress(source: str, destination: str, targets: tuple[str, ...], as_json: bool) -> None:
    """Write the N:M weights of IN (a run folder, a safetensors file) as values and offsets to OUT.

    Without --targets, what the file says of itself holds.
    """
    rules = _read_targets(targets)
    from nmflow.runtime import compress_file

    report = compress_file(source, destination, rules)
    _answer(report.lines(), report.to_dict(), as_json)


@cli.command(short_help="Let a run translate, or go on with a text.")
@click.argument("run", type=click.Path(exists=True, file_okay=False))
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="May be repeated; else a line of stdin each.")
@click.option("--tokens", type=click.IntRange(1), help="Most tokens of an answer.  [text: 200; else data.context]")
@click.option("--beam", type=click.IntRange(1), help="Translations that are followed at a time.  [default: 1]")
@click.option("--temperature", type=click.FloatRange(0), help="Of a text; 0 takes the likeliest token.  [default: 0]")
@click.option("--seed", type=click.IntRange(0), help="Of a text with a temperature.  [default: 0]")
@json_option
def generate(
    run: str,
    prompts: tuple[str, ...],
    tokens: int | None,
    beam: int | None,
    temperature: float | None,
    seed: int | None,
    as_json: bool,
) -> None:
    """Let the compressed network of a RUN folder translate (data=translation), or go on with a text (data=text).

    For instance runs/NAME --prompt "ROMEO: " --temperature 0.8; or runs/NAME < lines.en > lines.de.
    """
    given: Iterable[str] = prompts
    if not prompts:
        if sys.stdin.isatty():
            raise click.UsageError("nothing to go by: give --prompt TEXT, or lines on stdin")
        given = (line.rstrip("\r\n") for line in sys.stdin)
    from nmflow.train.speech import Asked, speak

    answers = []
    for prompt, text in speak(run, given, Asked(tokens, beam, temperature, seed)):
        answers.append({"prompt": prompt, "text": text})
        if not as_json:
            click.echo(text)
    if as_json:
        _print_json({"run": run, "answers": answers})


@cli.command("targets", short_help="Show what rules take of a network.")
@click.argument("model")
@targets_option
@remainder_option
@example_options
@json_option
def show_targets(
    model: str,
    targets: tuple[str, ...],
    remainder: Remainder,
    batch: int | None,
    image: int | None,
    length: int | None,
    as_json: bool,
) -> None:
    """Show what rules take of MODEL (timm:NAME, transformers:NAME, vit-tiny, lm-tiny) and what stays dense, and why.

    For instance timm:vit_base_patch16_224 --targets ff=1:16 --targets qk=1:4. Without rules: its roles. FLOPs are
    those of a forward, a multiply-add as two.
    """
    rules = _read_targets(targets)
    from nmflow.flops import count_flops
    from nmflow.models.example import example_input
    from nmflow.models.skeleton import skeleton
    from nmflow.report.coverage import Forward, report_coverage
    from nmflow.targets import Coverage, candidates, resolve

    network = skeleton(model)
    found = resolve(network, rules, remainder) if rules else Coverage(())
    forward: Forward | str
    try:
        example = example_input(network, batch or 1, image, length)
        forward = Forward(example.text, count_flops(network, example.inputs, rules, remainder=remainder))
    except ValueError as error:
        if batch or image or length:
            raise
        forward = str(error)  # nobody asked for it
    report = report_coverage(model, candidates(network), found, forward)
    _answer(report.lines(), report.to_dict(), as_json)


@cli.command(short_help="Count what a network and its training cost.")
@click.argument("model")
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
@targets_option
@remainder_option
@example_options
@json_option
def flops(
    model: str,
    settings: tuple[str, ...],
    targets: tuple[str, ...],
    remainder: Remainder,
    batch: int | None,
    image: int | None,
    length: int | None,
    as_json: bool,
) -> None:
    """Count the FLOPs of MODEL (timm:NAME, transformers:NAME, vit-tiny, lm-tiny), dense and sparse, a multiply-add as
    two.

    `pattern=1:16` alone means the FF layers; --targets says it by role or name. With `recipe=mdgf-exponential
    steps=10000` those of a training run as well, each step of which is one on a batch of the example's size.
    """
    rules, recipe, steps = _read_flops(settings, targets)
    from nmflow.flops import count_flops
    from nmflow.models.example import example_input
    from nmflow.models.skeleton import skeleton
    from nmflow.report.flops import FlopsAnswer

    network = skeleton(model)
    example = example_input(network, batch or 1, image, length)
    report = count_flops(network, example.inputs, rules, recipe, steps, remainder)
    answer = FlopsAnswer(model, example.text, report, recipe.label if recipe else None)
    _answer(answer.lines(), answer.to_dict(), as_json)


@cli.command(short_help="Work out what a process of a training run keeps in memory.")
@click.argument("model")
@targets_option
@remainder_option
@click.option("--processes", type=click.IntRange(min=1), default=1, show_default=True, help="GPUs of the run.")
@click.option("--shard", is_flag=True, help="Spread over them (FSDP2), as shard=true in train; else a copy each.")
@click.option("--bf16", is_flag=True, help="Mixed precision, as precision=bf16 in train.")
@example_options
@json_option
def memory(
    model: str,
    targets: tuple[str, ...],
    remainder: Remainder,
    processes: int,
    shard: bool,
    bf16: bool,
    batch: int | None,
    image: int | None,
    length: int | None,
    as_json: bool,
) -> None:
    """Work out what one process of a training run of MODEL keeps in memory, without allocating any of it.

    For instance transformers:llama --targets ff=1:8 --processes 64 --shard --bf16 --length 2048. The batch is that of
    one process and micro-batch. AdamW on float32 weights; activations are what autograd keeps of one forward pass, in
    bf16 throughout where that is asked for.
    """
    rules = _read_targets(targets)
    import torch

    from nmflow.memory import saved_bytes, training_memory
    from nmflow.models.example import example_input
    from nmflow.models.skeleton import skeleton
    from nmflow.report.memory import MemoryAnswer
    from nmflow.runtime.example import run
    from nmflow.targets import resolve
    from nmflow.train.spread import repeated_blocks

    network = skeleton(model)
    slots = resolve(network, rules, remainder).slots if rules else ()
    example = example_input(network, batch or 1, image, length)
    blocks = repeated_blocks(network) if shard else None
    held = training_memory(network, slots, processes, blocks, bf16)
    inputs = example.inputs
    if bf16:
        network = network.to(torch.bfloat16)
        if isinstance(inputs, torch.Tensor) and inputs.is_floating_point():
            inputs = inputs.to(torch.bfloat16)
    kept = saved_bytes(network, lambda net: run(net, inputs))
    spread = "one process" if processes == 1 else f"{processes} processes, {'FSDP2' if shard else 'DDP'}"
    what = f"{spread}, {'bf16' if bf16 else 'float32'}, {example.text}"
    answer = MemoryAnswer(model, what, replace(held, activations=kept))
    _answer(answer.lines(), answer.to_dict(), as_json)


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
        _print_json(facts)
        return
    from nmflow.report.terminal import plan_lines, plan_table

    for one in plans:
        click.echo(f"{title} (N of every M kept), {steps:,} steps{', ' if one.label else ''}{one.label}")
        _print(plan_table(one.segments))
        for line in (*one.notes, *plan_lines(one.segments, made)):
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
    from nmflow.report.terminal import doctor_tables

    for table in doctor_tables(facts):
        _print(table)
    click.echo("\n".join(["missing:", *(f"  {line}" for line in facts.missing)] if facts.missing else ["all there"]))


@cli.group(cls=_Commands, short_help="Measure speed against torch, goals beside it.")
def bench() -> None:
    """Measure how fast this machine is with N:M weights, against the best dense products torch has.

    Sides are timed in turns, and ratios are medians; what the machine reaches at most is measured first. Lines come
    as they are known, then a summary and what falls short of its goal (the exit code is 0 all the same).
    `out=DIR` writes results.json, table.md and, for kernels, plot.png.
    """


@bench.command("kernels", short_help="Products and mask steps, one by one.")
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
@json_option
def bench_kernels(settings: tuple[str, ...], as_json: bool) -> None:
    """Products with N:M weights over nn.Linear, oneDNN's packed weight and torch's CSR; the step from W to W~.

    For instance parts=linear patterns=1:8,1:16 tokens=1,16 shapes=3072x768 threads=2 rounds=15. The parts: linear,
    cold (one token, 24 layers in turn), bf16, conv (layers of ResNet-50), masks; dtype=float32 or bfloat16. Without
    settings all of it is measured, which takes long.
    """
    from nmflow.bench.settings import KernelSettings, read

    asked = read(KernelSettings, settings)  # before torch is imported
    from nmflow.bench.kernels import bench_kernels as measure

    _answer_bench(measure(asked, _teller(as_json)), asked.out, as_json)


@bench.command("layer", short_help="One layer: contenders and tilings.")
@click.argument("shape", metavar="ROWSxCOLS")
@click.argument("pattern", metavar="N:M")
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
@json_option
def bench_layer(shape: str, pattern: str, settings: tuple[str, ...], as_json: bool) -> None:
    """One layer (outputs x inputs): every contender, the rule's tiling against the tuned one, what was chosen.

    For instance 3072x768 1:16 tokens=1,196 dtype=float32 threads=2 rounds=15.
    """
    from nmflow.bench.settings import LayerSettings, read, read_shape
    from nmflow.pattern import Pattern

    asked, sizes, form = read(LayerSettings, settings), read_shape(shape), str(Pattern.parse(pattern))
    from nmflow.bench.layer import bench_layer as measure

    _answer_bench(measure(sizes, form, asked, _teller(as_json)), asked.out, as_json)


@bench.command("model", short_help="A whole network, dense and compressed.")
@click.argument("name")
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
@json_option
def bench_model(name: str, settings: tuple[str, ...], as_json: bool) -> None:
    """A network of fresh weights, dense and compressed: forwards of timm:NAME or vit-tiny, decoding of
    transformers:gpt2.

    For instance timm:vit_base_patch16_224 pattern=1:8, which means targets.ff=1:8; targets.qkv=1:16 targets.o=1:16
    batch=1 threads=2 rounds=7; for text prompt=32 new_tokens=16.
    """
    from nmflow.bench.settings import ModelSettings, read

    asked = read(ModelSettings, settings)
    from nmflow.bench.model import bench_model as measure

    _answer_bench(measure(name, asked, _teller(as_json)), asked.out, as_json)


@bench.command("train", short_help="A training step, dense and sparse.")
@click.argument("name")
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
@json_option
def bench_train(name: str, settings: tuple[str, ...], as_json: bool) -> None:
    """A training step (forward, backward, AdamW) without and with a sparsifier, and the masks' part of it.

    Names and settings are those of `nmflow bench model`; batch=4 where none is given.
    """
    from nmflow.bench.settings import ModelSettings, read

    asked = read(ModelSettings, settings, {"batch": 4})
    from nmflow.bench.training import bench_train as measure

    _answer_bench(measure(name, asked, _teller(as_json)), asked.out, as_json)


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
    from nmflow.pattern import Pattern

    targets: dict[str, str | None] = {}
    for rule in rules:
        name, sign, pattern = rule.rpartition("=")
        if not sign or not name or not pattern:
            raise click.UsageError(f'--targets "{rule}": expected RULE=N:M, such as ff=1:16')
        if name in targets:
            raise click.UsageError(f'--targets "{rule}": the rule "{name}" is given twice')
        targets[name] = str(Pattern.parse(pattern))
    return targets or None


def _read_flops(
    settings: Iterable[str], targets: Iterable[str]
) -> tuple[dict[str, str | None] | None, Recipe | None, int | None]:
    """(targets, recipe, steps) of `nmflow flops`."""
    given: dict[str, str] = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        if key not in ("pattern", "recipe", "steps") or not value:
            raise click.UsageError(f'"{setting}": expected pattern=N:M, recipe=NAME or steps=NUMBER')
        if key in given:
            raise click.UsageError(f'"{setting}": {key} is given twice')
        given[key] = value
    pattern, recipe, steps = (given.get(key) for key in ("pattern", "recipe", "steps"))
    rules = _read_targets([*([f"ff={pattern}"] if pattern else []), *targets])
    if (recipe is None) != (steps is None):
        raise click.UsageError("the FLOPs of a run need both: recipe=mdgf-exponential steps=10000")
    if steps is not None and not (steps.isdecimal() and int(steps)):
        raise click.UsageError(f'"steps={steps}": expected a number of optimizer steps')
    if recipe is None or steps is None:
        return rules, None, None
    made = _read_recipe(recipe, ())
    if rules is None and made.name != "dense":
        raise click.UsageError(f"{made.label} of which weights? pattern=1:16 means the FF layers, --targets any")
    return rules, made, int(steps)


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
        try:
            given[key] = parse_value(value)
        except ValueError as error:
            raise click.UsageError(f'"{option}": the value is no valid YAML: {error}') from error
    if text.lstrip().startswith(("[", "{")):
        if given:
            raise click.UsageError("the options of a recipe given as YAML stand in the YAML")
        from nmflow.train.config import build_recipe

        return build_recipe(parse_value(text))
    return recipe(text, **given)


# Printing


def _answer(lines: Iterable[str], facts: dict[str, Any], as_json: bool) -> None:
    if os.environ.get("RANK", "0") != "0":  # one of several processes of a launcher: the first one answers
        return
    if as_json:
        _print_json(facts)
    else:
        click.echo("\n".join(lines))


def _teller(as_json: bool) -> Callable[[str], None]:
    """Lines as they are known: to stdout, or to stderr where stdout holds JSON."""
    return lambda line: click.echo(line, err=as_json)


def _answer_bench(result: BenchResult, out: Path | None, as_json: bool) -> None:
    from nmflow.bench.output import write

    written = write(result, out) if out is not None else []
    if as_json:
        _print_json(result.to_dict())
        return
    click.echo("\n".join(result.summary()))
    for path in written:
        click.echo(f"written: {path}")


def _print_json(facts: dict[str, Any]) -> None:
    click.echo(json.dumps(facts, indent=2, ensure_ascii=False))


def _print(what: RenderableType) -> None:
    """Through click rather than rich, so that a closed pipe is handled in one place; long rows are not cut."""
    from rich.console import Console

    console = Console()
    console.width = max(console.width, 110)
    with console.capture() as capture:
        console.print(what)
    click.echo(capture.get(), nl=False)


def _progress_console() -> Console:
    """Progress goes to stderr: stdout holds the answer and nothing else."""
    from rich.console import Console

    return Console(stderr=True)


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
