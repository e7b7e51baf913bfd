"""Commands that make runs, collect them and let them speak: train, compare, report, generate."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import click

from nmflow.cli.answers import answer, exit_on_failures, print_json, progress_console
from nmflow.cli.group import cli
from nmflow.cli.options import json_option, read_settings, settings_option


@cli.command(short_help="Train a network to N:M, next to a dense run.")
@click.argument("settings", nargs=-1, metavar="[CONFIG.yaml] [KEY=VALUE]...")
@settings_option("TrainConfig")
@json_option
def train(settings: tuple[str, ...], as_json: bool) -> None:
    """Train a network to N:M, next to a dense run of the same budget.

    Without arguments: the paper's ViT-tiny on scikit-learn's digits, FF layers at 1:16 (one of every sixteen
    weights is kept), by mdgf-exponential. `pattern=1:8` alone means the FF layers; `targets.ff=1:16
    targets.qk=1:4` says it by role. `resume=DIR` continues a run that was stopped.
    """
    path, overrides, resume = read_settings(settings)
    import nmflow.train as training

    if resume is not None:
        result = training.resume(resume, console=progress_console())
    else:
        config = training.load_config(path, overrides)  # before torch is imported
        result = training.train(config, console=progress_console())
    answer(result.lines(), result.to_dict(), as_json)
    _leave_the_others()


def _leave_the_others() -> None:
    """End what connects the processes of a run, whose threads might abort this one if it ended with them at work."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


@cli.command(short_help="Train recipes x patterns x seeds into one table.")
@click.argument("settings", nargs=-1, metavar="[CONFIG.yaml] [KEY=VALUE]...")
@settings_option("CompareConfig")
@json_option
def compare(settings: tuple[str, ...], as_json: bool) -> None:
    """Train recipes x patterns x seeds; one table with mean and spread, one plot.

    For instance recipes=dense,sr-ste,mdgf-exponential pattern=1:8,1:16 seeds=3. `resume=DIR` continues a
    comparison that was stopped. Exit code 2: some run diverged; the others are in the table.
    """
    path, overrides, resume = read_settings(settings)
    if resume is not None:
        from nmflow.experiments import resume_compare

        result = resume_compare(resume, console=progress_console())
    else:
        from nmflow.train import load_compare_config

        config = load_compare_config(path, overrides)  # before torch is imported
        from nmflow.experiments import compare

        result = compare(config, console=progress_console())
    answer(result.lines(), result.to_dict(), as_json)
    exit_on_failures(result.failed)


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
    answer(found.lines(), found.to_dict(), as_json)


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
        print_json({"run": run, "answers": answers})
