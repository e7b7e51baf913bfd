"""What the suite believes: masks by sorting blocks one at a time, and copies of a model pruned by hand.

Shares no code with nmflow: a weight is a list of numbers, a block is a list of places in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Part:
    """N of every M kept in some output rows of a weight. `axis`: where the inputs of one output lie."""

    n: int
    m: int
    rows: tuple[int, int] | None = None
    axis: str = "last"                                            # "last" [out, in], "first" [in, out], "conv"


Parts = Mapping[str, tuple[Part, ...]]                            # by parameter name


def blocks(shape: Sequence[int], part: Part) -> Iterator[list[int]]:
    """Every block of a part: the flat indices of its entries, in order; a short last block of a row included."""
    places = torch.arange(torch.Size(shape).numel()).reshape(tuple(shape))
    if part.axis == "first":
        places = places.T
    elif part.axis == "conv":                                     # input channels innermost
        places = places.permute(0, 2, 3, 1).flatten(1)
    first, last = part.rows or (0, len(places))
    for row in places[first:last].tolist():
        for start in range(0, len(row), part.m):
            yield row[start : start + part.m]


def mask_of(weight: Tensor, parts: Sequence[Part], scores: Tensor | None = None) -> Tensor:
    """True where a weight survives. Equal magnitudes: the earlier one does."""
    size = (weight if scores is None else scores).detach().double().abs().flatten().tolist()
    keep = torch.ones(weight.numel(), dtype=torch.bool)
    for part in parts:
        for block in blocks(weight.shape, part):
            ranked = sorted(block, key=lambda place: -size[place])            # Python's sort is stable
            keep[ranked[part.n :]] = False
    return keep.reshape(weight.shape)


def effective_of(weight: Tensor, parts: Sequence[Part], decay: float, outer: Sequence[Part] = ()) -> Tensor:
    """W~ = W ⊙ [Φ + D·(Φ_outer - Φ)] of a dense weight; Φ_outer all ones without outer parts."""
    mask, outer_mask = (mask_of(weight, p).to(weight.dtype) for p in (parts, outer))
    return weight.detach() * (mask + decay * (outer_mask - mask))


def overfull_blocks(weight: Tensor, parts: Sequence[Part]) -> list[list[int]]:
    """The blocks that hold more than N non-zero entries."""
    values = weight.detach().double().flatten().tolist()
    return [
        block
        for part in parts
        for block in blocks(weight.shape, part)
        if sum(values[place] != 0 for place in block) > part.n
    ]


@torch.no_grad()
def prune_by_hand(model: nn.Module, parts: Parts, decay: float) -> nn.Module:
    """Write W~ into an ordinary model's weights, in place."""
    for name, parts_of_weight in parts.items():
        weight = model.get_parameter(name)
        weight.copy_(effective_of(weight, parts_of_weight, decay))
    return model
