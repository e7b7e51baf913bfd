"""The command itself, and how it tells errors: without a traceback, with the nearest command to an unknown one."""

from __future__ import annotations

import difflib
import traceback
from typing import Any

import click

from nmflow import __version__


class _Refused(click.ClickException):
    """What the library raised, told in a line."""

    exit_code = 2

    def show(self, file: Any = None) -> None:
        click.echo(f"error: {self.message}", err=True)


class Commands(click.Group):
    """A group that tells foreseen errors without a traceback, and names the nearest command to an unknown one."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            ctx.exit(141)  # nobody reads on: what a shell reports of SIGPIPE, and no answer of ours
        except (ValueError, TypeError, OSError) as error:
            raise _Refused(str(error)) from error
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception:  # not foreseen: with its traceback, but not with Python's own 1, which is the answer "no"
            traceback.print_exc()
            ctx.exit(2)
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


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="nmflow")
def cli() -> None:
    """Train networks to N:M sparsity, prove it, shrink them and run them.

    N:M means: N weights kept of every M (1:16 keeps one of sixteen). Settings are key=value.
    """
