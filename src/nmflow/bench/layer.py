"""One layer in detail: every contender, the rule's tiling against the tuned one, and what was chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch

from nmflow.bench import contenders
from nmflow.bench.cells import Cell
from nmflow.bench.kernels import Place, Tell, called, measure
from nmflow.bench.machine import Setup, examine, require_native
from nmflow.bench.settings import LayerSettings, Shape
from nmflow.bench.timing import computing, in_turns
from nmflow.pattern import Pattern
from nmflow.runtime.modules import PackedRows

_RULE, _TUNED = "by rule", "tuned"


@dataclass(frozen=True)
class TilingCell:
    """The same product by two tilings, for one number of tokens."""

    tokens: int
    rule: str
    tuned: str
    rule_us: float
    tuned_us: float
    gain: float
    """Time by the rule over time tuned, the median of the rounds' ratios."""
    tried: int
    """Tilings that were timed to choose."""

    def line(self) -> str:
        """For people."""
        same = self.rule == self.tuned
        tuned = "the same" if same else f"{self.tuned} {self.tuned_us:.1f} us, x{self.gain:.2f}"
        return f"{self.tokens:>6} tokens: by rule {self.rule} {self.rule_us:.1f} us; of {self.tried} tried: {tuned}"


@dataclass(frozen=True)
class LayerResult:
    """What `nmflow bench layer` answers."""

    setup: Setup
    cells: tuple[Cell, ...]
    tilings: tuple[TilingCell, ...]

    def summary(self) -> list[str]:
        """For people, after the cells: what tuning gained."""
        return ["", "tilings (algorithm, columns of a K-block, tokens x rows of a tile, what threads share out)",
                *(tiling.line() for tiling in self.tilings)]  # fmt: skip

    def markdown(self) -> str:
        """The same as a page."""
        first = self.cells[0]
        head = [f"# {first.shape[0]}x{first.shape[1]} at {first.pattern}, {first.dtype}", ""]
        lines = [*(cell.line() for cell in self.cells), *self.summary()]
        return "\n".join([*head, *(f"- {line}" for line in self.setup.lines()), "", "```", *lines, "```", ""])

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "format": "nmflow-bench-layer",
            "version": 1,
            "setup": self.setup.to_dict(),
            "cells": [cell.to_dict() for cell in self.cells],
            "tilings": [asdict(tiling) for tiling in self.tilings],
        }


def bench_layer(shape: Shape, pattern: str, settings: LayerSettings, tell: Tell) -> LayerResult:
    """Measure a layer [R, K] = `shape` at every number of tokens. Raises `ValueError` without the native library."""
    require_native()
    with computing(settings.threads), torch.inference_mode():
        setup = examine()
        for line in setup.lines():
            tell(line)
        cells, tilings = [], []
        for tokens in settings.tokens:
            tilings.append(compare_tilings(shape, pattern, tokens, settings.dtype, settings.rounds))
            cells.append(measure(Place("linear", shape, pattern, tokens, settings.dtype), settings.rounds, setup))
            tell(cells[-1].line())
    return LayerResult(setup, tuple(cells), tuple(tilings))


def compare_tilings(shape: Shape, pattern: str, tokens: int, dtype: str, rounds: int) -> TilingCell:
    """Time one layer by the tiling of the rule and by the one that tuning chooses, in turns."""
    form, kind = Pattern.parse(pattern), getattr(torch, dtype)
    layer = contenders.sparse_linear(shape, form, kind)
    by_rule, tuned = contenders.ours(layer, form), contenders.ours(layer, form)
    x = torch.randn(tokens, shape[1]).to(kind)
    rule = contenders.forget(cast(PackedRows, by_rule.weight_nm.rows[0]), tokens)
    contenders.check(layer, by_rule, x)  # its first call: from now on it keeps the tiling of the rule
    times = contenders.tune(tuned, tokens)
    contenders.check(layer, tuned, x)
    choice, _ = contenders.chosen(cast(PackedRows, tuned.weight_nm.rows[0]), tokens)
    sides: dict[str, Callable[[], object]] = {_RULE: called([by_rule], x), _TUNED: called([tuned], x)}
    timed = in_turns(sides, rounds)
    return TilingCell(
        tokens=tokens,
        rule=contenders.tiling_text(rule),
        tuned=contenders.tiling_text(choice),
        rule_us=timed.median(_RULE) * 1e6,
        tuned_us=timed.median(_TUNED) * 1e6,
        gain=timed.ratio(_TUNED, _RULE),
        tried=len(times),
    )
