"""The command line: the only place that prints for people and exits (0 done, 1 the answer is no, 2 wrong input).

What costs time to import (torch, numpy, pydantic, matplotlib, rich) is imported by the command that needs it.
"""

from __future__ import annotations

from nmflow.cli import experiments, files, machine, networks, plans, runs
from nmflow.cli.group import cli

__all__ = ["cli", "experiments", "files", "machine", "main", "networks", "plans", "runs"]


def main() -> None:
    """Entry point of the console script and of `python -m nmflow`."""
    cli(prog_name="nmflow")
