"""What was counted: FLOPs of a forward by layer and by kind, and those of a run's steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from nmflow.pattern import Pattern

BLOCK_KINDS = ("Q", "K", "V", "O", "Logit", "Attend", "FF")
"""What the paper counts: the projections and products of attention, and the feed-forward layers."""

_DENSE = Pattern.dense()


@dataclass(frozen=True)
class LayerFlops:
    """The products of one weight (or of a row slice of it), or of one layer without a weight. Dense FLOPs.

        total = forward · kept(K) / K        K entries in a row, of which the pattern keeps kept(K)
    """

    layer: str
    """Name of the module; "" is the network itself."""
    kind: str
    """One of `BLOCK_KINDS`, "conv" or "other"."""
    parameter: str | None = None
    rows: tuple[int, int] | None = None
    """[start, stop) of the parameter's rows; None for all of them."""
    axis: int = 1
    """K"""
    pattern: Pattern = _DENSE
    forward: int = 0
    input_gradient: int = 0
    weight_gradient: int = 0

    @property
    def total(self) -> int:
        """FLOPs of a forward with the weight at its pattern."""
        return self.at(self.pattern, self.forward)

    def at(self, pattern: Pattern, flops: int) -> int:
        """What is left of products with the weight where it has a pattern."""
        return flops if pattern.is_dense else flops * pattern.kept(self.axis) // self.axis


@dataclass(frozen=True)
class Stretch:
    """Steps [start, end) of a run, all of the same cost: FLOPs of one step by its three kinds of products."""

    start: int
    end: int
    phase: str
    forward: int
    input_gradient: int
    weight_gradient: int

    @property
    def step(self) -> int:
        """FLOPs of one step."""
        return self.forward + self.input_gradient + self.weight_gradient

    @property
    def total(self) -> int:
        """FLOPs of all of its steps."""
        return (self.end - self.start) * self.step


def products_of_step(
    layers: Iterable[LayerFlops], patterns: Mapping[tuple[Pattern, int], Pattern]
) -> tuple[int, int, int]:
    """FLOPs of forward, input gradients and weight gradients of one training step.

        forward, input gradient · kept(K) / K,    weight gradient dense

    `patterns`: what W~ of weights of a target and an axis has in this step; those not in it are dense.
    Source: docs/flops.md.
    """
    forward = input_gradient = weight_gradient = 0
    for layer in layers:
        pattern = patterns.get((layer.pattern, layer.axis), _DENSE)
        forward += layer.at(pattern, layer.forward)
        input_gradient += layer.at(pattern, layer.input_gradient)
        weight_gradient += layer.weight_gradient
    return forward, input_gradient, weight_gradient


@dataclass(frozen=True)
class FlopsReport:
    """What `count_flops` returns. A multiply-add is two FLOPs; only products are counted."""

    layers: tuple[LayerFlops, ...]
    schedule: tuple[Stretch, ...] | None
    """The run's stretches; None where no recipe was given."""
    unknown: tuple[str, ...]
    """Operators of other libraries that no formula is known for; what they cost is missing."""

    @property
    def total(self) -> int:
        """FLOPs of a forward, all of it, with the sparse weights at their patterns."""
        return sum(layer.total for layer in self.layers)

    @property
    def blocks(self) -> int:
        """FLOPs of Q, K, V, O, Logit, Attend and FF of all blocks: what the paper counts (appendix D)."""
        return sum(layer.total for layer in self.layers if layer.kind in BLOCK_KINDS)

    @property
    def by_layer(self) -> dict[str, int]:
        """FLOPs by name of the module, in the order of the forward."""
        return self._sums((layer.layer, layer.total) for layer in self.layers)

    @property
    def by_kind(self) -> dict[str, int]:
        """FLOPs by kind: those of `BLOCK_KINDS`, "conv", "other", in this order, where there are any."""
        sums = self._sums((layer.kind, layer.total) for layer in self.layers)
        return {kind: sums[kind] for kind in (*BLOCK_KINDS, "conv", "other") if kind in sums}

    @property
    def training(self) -> int | None:
        """FLOPs of the whole run; None where no recipe was given."""
        return None if self.schedule is None else sum(stretch.total for stretch in self.schedule)

    @property
    def dense(self) -> FlopsReport:
        """The same with every weight dense, in the forward and all through the run."""
        layers = tuple(replace(layer, pattern=_DENSE) for layer in self.layers)
        if self.schedule is None:
            return replace(self, layers=layers)
        run = Stretch(0, self.schedule[-1].end, "dense", *products_of_step(layers, {}))
        return replace(self, layers=layers, schedule=(run,))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        dense = self.dense
        facts: dict[str, Any] = {
            name: {"dense": getattr(dense, name), "sparse": getattr(self, name)}
            for name in ("total", "blocks", "by_kind", "by_layer", "training")
        }
        if self.schedule is not None:
            facts["schedule"] = [{**asdict(stretch), "step": stretch.step} for stretch in self.schedule]
        return {**facts, "unknown": list(self.unknown)}

    @staticmethod
    def _sums(found: Iterable[tuple[str, int]]) -> dict[str, int]:
        sums: Counter[str] = Counter()
        for name, flops in found:
            sums[name] += flops
        return dict(sums)
