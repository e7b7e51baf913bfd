"""The command that does the paper's experiments again: reproduce."""

from __future__ import annotations

from pathlib import Path

import click

from nmflow.cli.answers import answer, exit_on_failures, progress_console, teller
from nmflow.cli.group import cli
from nmflow.cli.options import json_option


@cli.command(short_help="Do the paper's tables again, beside its numbers.")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--list", "shows_list", is_flag=True, help="Show every table with its state, and do nothing.")
@click.option(
    "--scale", type=click.Choice(["cpu", "gpu", "paper"]), default="cpu", show_default=True,
    help="Minutes on two cores, minutes to an hour on one GPU, or the paper's own settings.",
)
@click.option(
    "--out", type=click.Path(file_okay=False), default="runs/reproduce", show_default=True, help="Where runs lie."
)
@click.option("--data", type=click.Path(), default="data", show_default=True, help="The folder of the data sets.")
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True, help="Runs that are done at a time.")
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), help="Stop then; the same command goes on.")
@click.option("--keep", type=click.Path(file_okay=False), help="Copy tables and runs there, without weights.")
@json_option
def reproduce(
    names: tuple[str, ...],
    shows_list: bool,
    scale: str,
    out: str,
    data: str,
    workers: int,
    minutes: float | None,
    keep: str | None,
    as_json: bool,
) -> None:
    """Do the tables NAME again (table-18, language-model, or all) and print the paper's numbers and ours side by side.

    Runs that are done are read, those that were begun go on, the others are begun; Ctrl-C stops without loss.
    Exit code 2: some run failed; the others count.
    """
    if not names and not shows_list:
        raise click.UsageError("which table? nmflow reproduce --list shows all")
    from nmflow.experiments.reproduction import Place, Several, keep_evidence, reproductions, state_lines
    from nmflow.experiments.sweep import SweepResult, sweep

    place = Place(scale, Path(out), Path(data))
    parts = reproductions(names or ["all"], place)
    if shows_list:
        states = [{"name": part.table.name, "title": part.table.title, "state": part.state} for part in parts]
        answer(state_lines(parts), {"scale": scale, "tables": states}, as_json)
        return
    unfilled = [part.table.name for part in parts if part.is_unfilled]
    if unfilled and "all" not in names:
        raise click.UsageError(f"nothing fills {' and '.join(unfilled)} at the scale {scale} yet")
    ready = [part for part in parts if not part.is_unfilled]
    trained = tuple(part.trained for part in ready if part.trained is not None)
    result = sweep(Several(trained), workers, minutes, progress_console()) if trained else SweepResult()
    if not result.stopped:
        for part in ready:
            if part.timed is not None:
                part.timed.measure(teller(as_json))
    lines: list[str] = []
    tables = []
    for part in ready:
        found = part.result()
        folder = part.write(found)
        lines += [*found.lines(), f"folder: {folder}", ""]
        tables.append({"name": part.table.name, "folder": str(folder), **found.to_dict()})
    if keep is not None:
        lines.append(f"kept: {keep_evidence(place, ready, Path(keep)):,} files in {keep}")
    lines += ["stopped; the same command goes on"] if result.stopped else []
    failed = [str(each) for each in result.failed]
    answer(lines, {"scale": scale, "tables": tables, "failed": failed, "stopped": result.stopped}, as_json)
    exit_on_failures(result.failed)
