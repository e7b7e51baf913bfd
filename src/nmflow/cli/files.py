"""Commands on files: verify, compress."""

from __future__ import annotations

import click

from nmflow.cli.answers import answer
from nmflow.cli.group import cli
from nmflow.cli.options import json_option, read_targets, targets_option


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
    rules = read_targets(targets)
    import nmflow

    report = nmflow.verify(path, rules)
    answer(report.lines(), report.to_dict(), as_json)
    ctx.exit(0 if report.ok else 1)


@cli.command(short_help="Write values and offsets instead of zeros.")
@click.argument("source", metavar="IN", type=click.Path(exists=True))
@click.argument("destination", metavar="OUT", type=click.Path())
@targets_option
@json_option
def compress(source: str, destination: str, targets: tuple[str, ...], as_json: bool) -> None:
    """Write the N:M weights of IN (a run folder, a safetensors file) as values and offsets to OUT.

    Without --targets, what the file says of itself holds. An OUT that exists is replaced where it was compressed
    before, else refused.
    """
    rules = read_targets(targets)
    from nmflow.runtime import compress_file

    report = compress_file(source, destination, rules)
    answer(report.lines(), report.to_dict(), as_json)
