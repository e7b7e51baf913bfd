"""Commands about this machine: doctor, bench."""

from __future__ import annotations

import click

from nmflow.cli.answers import answer_bench, print_json, print_rich, teller
from nmflow.cli.group import Commands, cli
from nmflow.cli.options import json_option


@cli.command(short_help="Say what this machine can run, and why not.")
@click.option("--plan", type=click.Path(exists=True, dir_okay=False), help="Say what nmflow.tune chose, and why.")
@json_option
def doctor(plan: str | None, as_json: bool) -> None:
    """Say what this machine can run, and why not the rest."""
    from nmflow.doctor import examine

    facts = examine(plan)
    if as_json:
        print_json(facts.to_dict())
        return
    from nmflow.report.terminal import doctor_tables

    for table in doctor_tables(facts):
        print_rich(table)
    click.echo("\n".join(["missing:", *(f"  {line}" for line in facts.missing)] if facts.missing else ["all there"]))
    if plan is not None:
        click.echo("\n".join(["", f"chosen in {plan}:", *(f"  {line}" for line in facts.choices)]))


@cli.group(cls=Commands, short_help="Measure speed against torch, goals beside it.")
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

    answer_bench(measure(asked, teller(as_json)), asked.out, as_json)


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

    answer_bench(measure(sizes, form, asked, teller(as_json)), asked.out, as_json)


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

    answer_bench(measure(name, asked, teller(as_json)), asked.out, as_json)


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

    answer_bench(measure(name, asked, teller(as_json)), asked.out, as_json)


@bench.command("gpu", short_help="Masks, products and networks on a GPU.")
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
@json_option
def bench_gpu(settings: tuple[str, ...], as_json: bool) -> None:
    """Products, mask steps, a training step and a network on a CUDA device, over torch's ways, goals beside them.

    For instance parts=decode,masks minutes=8. The parts: decode (few tokens), masks, many, shared (rows that share
    their columns), float32, train, network. What there is no device or no time for is shown as unmeasured.
    """
    from nmflow.bench.settings import GpuSettings, read

    asked = read(GpuSettings, settings)  # before torch is imported
    from nmflow.bench.gpu.run import bench_gpu as measure
    from nmflow.bench.output import write

    out = asked.out
    keep = None if out is None else lambda result: write(result, out)
    answer_bench(measure(asked, teller(as_json), keep), out, as_json)
