"""What the native product costs against the two dense ones of torch: interleaved pairs, medians, goals beside them.

    python benchmarks/kernels.py                       the whole table, float32
    python benchmarks/kernels.py --tokens 196 --patterns 2:4 1:8 --json kernels.json
    python benchmarks/kernels.py --cold                one token, 24 layers in turn
    python benchmarks/kernels.py --dtype bfloat16 --tokens 196

Every round times dense, packed dense and native once after the other, so that a burst of other work on the machine
touches all of them, and rounds in which the process lost a core are done again; a cell's ratio is the median of the
rounds' ratios. With --threads 1 the clock is the thread's own, which stands still meanwhile. Each side is called as a
module would call it.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from nmflow.ops import native
from nmflow.pattern import Pattern

SHAPES = ((3072, 768), (768, 3072), (4096, 1024), (1024, 4096))
PATTERNS = ("2:4", "1:4", "1:8", "1:16", "1:32", "1:128")
TOKENS = (1, 16, 196, 1576)
GOALS = {  # over F.linear, the worst of the shapes, 2 threads
    "float32": {
        "2:4": (3.5, 2.3, 1.75, 1.6),
        "1:4": (5.5, 4.3, 3.2, 2.9),
        "1:8": (9.0, 7.5, 5.6, 5.3),
        "1:16": (12.0, 13.0, 10.0, 9.0),
        "1:32": (13.5, 18.0, 15.5, 14.5),
        "1:128": (12.0, 25.0, 34.0, 34.0),
    },
    "bfloat16": {"2:4": (None, None, 1.3, None), "1:8": (None, None, 4.9, None), "1:16": (None, None, 8.5, None)},
}
TRIES, FEWEST = 8, 3
"""A round in which another process took a core is done again, up to TRIES times as many; FEWEST are kept anyway."""
COLD_GOALS = {"2:4": 5.0, "1:8": 13.0, "1:32": 30.0}


@dataclass(frozen=True)
class Cell:
    """One measurement: medians in microseconds, ratios of the pairs, multiplications per second over the peak."""

    shape: tuple[int, int]
    pattern: str
    tokens: int
    dtype: str
    cold: bool
    native_us: float
    dense_us: float
    packed_us: float | None
    over_dense: float
    over_packed: float | None
    of_peak: float
    goal: float | None
    tiling: str


def random_weight(rows: int, axis: int, pattern: Pattern, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Values, offsets and the dense weight; `axis` is a multiple of m."""
    n, m = pattern.n, pattern.m
    blocks = axis // m
    offsets = torch.rand(rows, blocks, m).argsort(-1)[..., :n].sort(-1).values
    values = torch.randn(rows, blocks, n).to(dtype)
    dense = torch.zeros(rows, blocks, m, dtype=dtype).scatter_(-1, offsets, values).reshape(rows, axis)
    return values.reshape(rows, -1), offsets.reshape(rows, -1).to(torch.uint8 if m <= 256 else torch.uint16), dense


def packed_dense(dense: Tensor, bias: Tensor, tokens: int) -> Callable[[Tensor], Tensor] | None:
    """oneDNN's product with a weight it laid out itself: the best dense one a torch user can get."""
    try:
        weight = torch.ops.mkldnn._reorder_linear_weight(dense, tokens)
    except (RuntimeError, AttributeError):
        return None
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Mean time of one of `repeats` calls in a row."""
    clock = native.clock()
    start = clock()
    for _ in range(repeats):
        run()
    return (clock() - start) / repeats


def in_turn(runs: list[Callable[[], object]], rounds: int, target: float) -> list[list[float]]:
    """Times of every run, `rounds` each, one after the other; `target` seconds of calls at a time."""
    repeats = []
    for run in runs:
        run()
        repeats.append(max(1, min(200, int(target / max(seconds(run, 1), 1e-7)))))
    times: list[list[float]] = [[] for _ in runs]
    for attempt in range(TRIES * rounds):
        spoiled = False
        found = []
        for run, count in zip(runs, repeats, strict=True):
            run()
            before = interrupted()
            found.append(seconds(run, count))
            spoiled = spoiled or interrupted() > before
        if not spoiled or attempt >= TRIES * rounds - FEWEST + len(times[0]):
            for kept, each in zip(times, found, strict=True):
                kept.append(each)
        if len(times[0]) == rounds:
            break
    return times


def interrupted() -> int:
    """How often this process lost a core to another one so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def peak_gflops() -> float:
    """What the machine's multiply-adds reach here: a large dense product, the best of several."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    weight = packed_dense(b, torch.zeros(2048), 2048)
    run = (lambda: weight(a)) if weight else (lambda: a @ b)
    return 2 * 2048**3 / min(seconds(run, 1) for _ in range(8)) / 1e9


def measure(
    shape: tuple[int, int], pattern: str, tokens: int, dtype: torch.dtype, rounds: int, peak: float, cold: bool
) -> Cell:
    form = Pattern.parse(pattern)
    layers = 24 if cold else 1
    weights = [random_weight(*shape, form, dtype) for _ in range(layers)]
    biases = [torch.randn(shape[0]).to(dtype) for _ in weights]
    sparse = [native.prepare(v, o, *shape, form.n, form.m) for v, o, _ in weights]
    x = torch.randn(tokens, shape[1]).to(dtype)
    timed = native.tune(sparse[0], tokens)
    packed = [packed_dense(w, b, tokens) for (_, _, w), b in zip(weights, biases, strict=True)]

    def run_native() -> None:
        for weight, bias in zip(sparse, biases, strict=True):
            native.linear(x, weight, bias)

    def run_dense() -> None:
        for (_, _, weight), bias in zip(weights, biases, strict=True):
            F.linear(x, weight, bias)

    def run_packed() -> None:
        for call in packed:
            assert call is not None
            call(x)

    runs: list[Callable[[], object]] = [run_native, run_dense]
    if packed[0] is not None and not cold:
        runs.append(run_packed)
    with torch.no_grad():
        times = in_turn(runs, rounds, 0.01)
    median = [statistics.median(each) / layers for each in times]
    ratio = [statistics.median(other / own for own, other in zip(times[0], each, strict=True)) for each in times]
    goals = GOALS[str(dtype).removeprefix("torch.")].get(pattern)
    goal = COLD_GOALS.get(pattern) if cold else goals[TOKENS.index(tokens)] if goals and tokens in TOKENS else None
    best = min(timed, key=lambda each: timed[each])
    flops = 2 * tokens * shape[0] * form.kept(shape[1])
    return Cell(
        shape=shape,
        pattern=pattern,
        tokens=tokens,
        dtype=str(dtype).removeprefix("torch."),
        cold=cold,
        native_us=median[0] * 1e6,
        dense_us=median[1] * 1e6,
        packed_us=median[2] * 1e6 if len(median) > 2 else None,
        over_dense=ratio[1],
        over_packed=ratio[2] if len(ratio) > 2 else None,
        of_peak=flops / median[0] / 1e9 / peak,
        goal=goal,
        tiling=f"{best.algorithm} {best.chunk} {best.tile_tokens}x{best.tile_rows} {best.split}",
    )


def line(cell: Cell) -> str:
    verdict = "" if cell.goal is None else f"goal {cell.goal:5.2f} {'yes' if cell.over_dense >= cell.goal else 'NO '}"
    over_packed = "     -" if cell.over_packed is None else f"{cell.over_packed:6.2f}"
    return (
        f"{cell.shape[0]:5}x{cell.shape[1]:<5}{cell.pattern:>6}{cell.tokens:6}  {cell.native_us:9.1f} us  "
        f"dense {cell.dense_us:9.1f} us  x{cell.over_dense:6.2f}  packed x{over_packed}  {cell.of_peak:5.0%} of peak  "
        f"{verdict}  {cell.tiling}"
    )


def worst(cells: list[Cell]) -> list[str]:
    """The goal table: a row a pattern, a column a token count, the worst shape's ratio and the goal."""
    tokens = sorted({cell.tokens for cell in cells})
    lines = ["pattern " + "".join(f"{count:>20}" for count in tokens)]
    for pattern in dict.fromkeys(cell.pattern for cell in cells):
        row = f"{pattern:8}"
        for count in tokens:
            found = [cell for cell in cells if (cell.pattern, cell.tokens) == (pattern, count)]
            low = min(found, key=lambda cell: cell.over_dense)
            mark = "" if low.goal is None else f" / {low.goal:g}{' ' if low.over_dense >= low.goal else '!'}"
            row += f"{low.over_dense:>10.2f}{mark:<10}"
        lines.append(row)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=[f"{r}x{k}" for r, k in SHAPES])
    parser.add_argument("--patterns", nargs="+", default=list(PATTERNS))
    parser.add_argument("--tokens", nargs="+", type=int)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cold", action="store_true", help="24 layers in turn, so that no weight is in a cache")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    peak = peak_gflops()
    print(f"torch {torch.__version__}, {native.describe()}, {given.threads} threads, peak {peak:.0f} GFLOP/s (float32)")
    cells = []
    for pattern in given.patterns:
        for tokens in given.tokens or ([1] if given.cold else list(TOKENS)):
            for text in given.shapes:
                rows, axis = (int(each) for each in text.split("x"))
                dtype = getattr(torch, given.dtype)
                cells.append(measure((rows, axis), pattern, tokens, dtype, given.rounds, peak, given.cold))
                print(line(cells[-1]), flush=True)
    print("\nworst of the shapes, over F.linear / goal (! below)")
    print("\n".join(worst(cells)))
    if given.json:
        setup = {"torch": torch.__version__, "machine": platform.processor() or platform.machine(),
                 "threads": given.threads, "peak_gflops": peak, "rounds": given.rounds}
        given.json.write_text(json.dumps({"setup": setup, "cells": [asdict(cell) for cell in cells]}, indent=1))


if __name__ == "__main__":
    main()
