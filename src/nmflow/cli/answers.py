"""How answers are given: lines for people, JSON for programs, progress beside both."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from nmflow.bench.output import Result as BenchResult
    from nmflow.experiments.failures import Failure


def answer(lines: Iterable[str], facts: dict[str, Any], as_json: bool) -> None:
    if os.environ.get("RANK", "0") != "0":  # one of several processes of a launcher: the first one answers
        return
    if as_json:
        print_json(facts)
    else:
        click.echo("\n".join(lines))


def exit_on_failures(failures: Sequence[Failure]) -> None:
    """Name the runs that failed on stderr and end with 2, once the answer of the others is given."""
    if not failures:
        return
    from nmflow.experiments.failures import failure_lines

    if os.environ.get("RANK", "0") == "0":
        click.echo("\n".join(failure_lines(failures)), err=True)
    click.get_current_context().exit(2)


def teller(as_json: bool) -> Callable[[str], None]:
    """Lines as they are known: to stdout, or to stderr where stdout holds JSON."""
    return lambda line: click.echo(line, err=as_json)


def answer_bench(result: BenchResult, out: Path | None, as_json: bool) -> None:
    from nmflow.bench.output import write

    written = write(result, out) if out is not None else []
    if as_json:
        print_json(result.to_dict())
        return
    click.echo("\n".join(result.summary()))
    for path in written:
        click.echo(f"written: {path}")


def print_json(facts: dict[str, Any]) -> None:
    click.echo(json.dumps(facts, indent=2, ensure_ascii=False))


def print_rich(what: RenderableType) -> None:
    """Through click rather than rich, so that a closed pipe is handled in one place; long rows are not cut."""
    from rich.console import Console

    console = Console()
    console.width = max(console.width, 110)
    with console.capture() as capture:
        console.print(what)
    click.echo(capture.get(), nl=False)


def progress_console() -> Console:
    """Progress goes to stderr: stdout holds the answer and nothing else."""
    from rich.console import Console

    return Console(stderr=True)
