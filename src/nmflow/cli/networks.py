"""Commands that look at a network without its weights: targets, flops, memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import click

from nmflow.cli.answers import answer
from nmflow.cli.group import cli
from nmflow.cli.options import json_option, read_recipe, read_targets, remainder_option, targets_option

if TYPE_CHECKING:
    from torch import nn

    from nmflow.masks import Remainder
    from nmflow.models.example import ExampleInput
    from nmflow.schedules import Recipe


@dataclass(frozen=True)
class _Network:
    """A network that is looked at, what of it is sparse, and the sizes of the input that it is counted on."""

    model: str
    targets: tuple[str, ...]
    remainder: Remainder
    batch: int | None
    image: int | None
    length: int | None

    def built(self) -> nn.Module:
        """Without weights."""
        from nmflow.models.skeleton import skeleton

        return skeleton(self.model)

    def example(self, network: nn.Module) -> ExampleInput:
        from nmflow.models.example import example_input

        return example_input(network, self.batch or 1, self.image, self.length)


def _looks_at_network(command: Callable[..., None]) -> Callable[..., None]:
    """MODEL and the options of every command here; the command gets them as one `_Network`."""

    @functools.wraps(command)
    def gathered(
        model: str,
        targets: tuple[str, ...],
        remainder: Remainder,
        batch: int | None,
        image: int | None,
        length: int | None,
        **others: Any,
    ) -> None:
        command(_Network(model, targets, remainder, batch, image, length), **others)

    sizes = {
        "--length": "Tokens of a text. Without it, the network's context, at most 512.",
        "--image": "Pixels of an image's side. Without it, what the network is configured for.",
        "--batch": "Inputs of a forward, 1 without it.",
    }
    options = [json_option]
    options += [click.option(name, type=click.IntRange(min=1), help=what) for name, what in sizes.items()]
    for option in (*options, remainder_option, targets_option, click.argument("model")):
        gathered = option(gathered)
    return gathered


@cli.command("targets", short_help="Show what rules take of a network.")
@_looks_at_network
def show_targets(asked: _Network, as_json: bool) -> None:
    """Show what rules take of MODEL (timm:NAME, transformers:NAME, vit-tiny, lm-tiny) and what stays dense, and why.

    For instance timm:vit_base_patch16_224 --targets ff=1:16 --targets qk=1:4. Without rules: its roles. FLOPs are
    those of a forward, a multiply-add as two.
    """
    rules = read_targets(asked.targets)
    from nmflow.flops import count_flops
    from nmflow.report.coverage import Forward, report_coverage
    from nmflow.targets import Coverage, candidates, resolve

    network = asked.built()
    found = resolve(network, rules, asked.remainder) if rules else Coverage(())
    forward: Forward | str
    try:
        example = asked.example(network)
        forward = Forward(example.text, count_flops(network, example.inputs, rules, remainder=asked.remainder))
    except ValueError as error:
        if asked.batch or asked.image or asked.length:
            raise
        forward = str(error)  # nobody asked for it
    report = report_coverage(asked.model, candidates(network), found, forward)
    answer(report.lines(), report.to_dict(), as_json)


@cli.command(short_help="Count what a network and its training cost.")
@_looks_at_network
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
def flops(asked: _Network, settings: tuple[str, ...], as_json: bool) -> None:
    """Count the FLOPs of MODEL (timm:NAME, transformers:NAME, vit-tiny, lm-tiny), dense and sparse, a multiply-add as
    two.

    `pattern=1:16` alone means the FF layers; --targets says it by role or name. With `recipe=mdgf-exponential
    steps=10000` those of a training run as well, each step of which is one on a batch of the example's size.
    """
    rules, recipe, steps = _read_flops(settings, asked.targets)
    from nmflow.flops import count_flops
    from nmflow.report.flops import FlopsAnswer

    network = asked.built()
    example = asked.example(network)
    report = count_flops(network, example.inputs, rules, recipe, steps, asked.remainder)
    counted = FlopsAnswer(asked.model, example.text, report, recipe.label if recipe else None)
    answer(counted.lines(), counted.to_dict(), as_json)


@cli.command(short_help="Work out what a process of a training run keeps in memory.")
@_looks_at_network
@click.option("--processes", type=click.IntRange(min=1), default=1, show_default=True, help="GPUs of the run.")
@click.option("--shard", is_flag=True, help="Spread over them (FSDP2), as shard=true in train; else a copy each.")
@click.option("--bf16", is_flag=True, help="Mixed precision, as precision=bf16 in train.")
def memory(asked: _Network, processes: int, shard: bool, bf16: bool, as_json: bool) -> None:
    """Work out what one process of a training run of MODEL keeps in memory, without allocating any of it.

    For instance transformers:llama --targets ff=1:8 --processes 64 --shard --bf16 --length 2048. The batch is that of
    one process and micro-batch. AdamW on float32 weights; activations are what autograd keeps of one forward pass, in
    bf16 throughout where that is asked for.
    """
    rules = read_targets(asked.targets)
    import torch

    from nmflow.memory import saved_bytes, training_memory
    from nmflow.report.memory import MemoryAnswer
    from nmflow.runtime.example import run
    from nmflow.targets import resolve
    from nmflow.train.spread import repeated_blocks

    network = asked.built()
    slots = resolve(network, rules, asked.remainder).slots if rules else ()
    example = asked.example(network)
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
    worked_out = MemoryAnswer(asked.model, what, replace(held, activations=kept))
    answer(worked_out.lines(), worked_out.to_dict(), as_json)


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
    rules = read_targets([*([f"ff={pattern}"] if pattern else []), *targets])
    if (recipe is None) != (steps is None):
        raise click.UsageError("the FLOPs of a run need both: recipe=mdgf-exponential steps=10000")
    if steps is not None and not (steps.isdecimal() and int(steps)):
        raise click.UsageError(f'"steps={steps}": expected a number of optimizer steps')
    if recipe is None or steps is None:
        return rules, None, None
    made = read_recipe(recipe, ())
    if rules is None and made.name != "dense":
        raise click.UsageError(f"{made.label} of which weights? pattern=1:16 means the FF layers, --targets any")
    return rules, made, int(steps)
