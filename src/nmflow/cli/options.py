"""What several commands are told, and how it is read."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from nmflow.schedules import Recipe

_Command = TypeVar("_Command", bound=Callable[..., Any])
_SETTING = re.compile(r"[A-Za-z_][\w.]*=")

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


def settings_option(config: str) -> Callable[[_Command], _Command]:
    """`--settings`: every key of a class of `nmflow.train.config`, and nothing is done."""

    def show(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
        if not asked:
            return
        from nmflow.train import config as configs
        from nmflow.train.config_help import settings_lines

        click.echo("\n".join(settings_lines(getattr(configs, config))))
        ctx.exit()

    return click.option(
        "--settings", "shows_settings", is_flag=True, is_eager=True, expose_value=False, callback=show,
        help="List every KEY with its default and meaning, and do nothing.",
    )  # fmt: skip


def read_settings(settings: Iterable[str]) -> tuple[str | None, list[str], str | None]:
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


def read_targets(rules: Iterable[str]) -> dict[str, str | None] | None:
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


def read_recipe(text: str, options: Iterable[str]) -> Recipe:
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
        from nmflow.train.config_fields import build_recipe

        return build_recipe(parse_value(text))
    return recipe(text, **given)
