"""What the suite believes: masks by sorting blocks one at a time, and copies of a model pruned by hand.

Shares no code with nmflow: a weight is a list of numbers, a block is a list of columns, a column a list of places in
it, one for each row that shares it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Part:
    """N of every M kept in some output rows of a weight, V rows alike. `axis`: where the inputs of one output lie."""

    n: int
    m: int
    rows: tuple[int, int] | None = None
    axis: str = "last"                                            # "last" [out, in], "first" [in, out], "conv"
    v: int = 1

    @property
    def text(self) -> str:
        return f"{self.n}:{self.m}" + (f"v{self.v}" if self.v > 1 else "")


Parts = Mapping[str, tuple[Part, ...]]                            # by parameter name


def blocks(shape: Sequence[int], part: Part) -> Iterator[list[tuple[int, ...]]]:
    """Every block of a part: the flat indices of its columns' entries, in order; short last blocks included."""
    places = torch.arange(torch.Size(shape).numel()).reshape(tuple(shape))
    if part.axis == "first":
        places = places.T
    elif part.axis == "conv":                                     # input channels innermost
        places = places.permute(0, 2, 3, 1).flatten(1)
    first, last = part.rows or (0, len(places))
    for top in range(first, last, part.v):
        columns = list(zip(*places[top : min(top + part.v, last)].tolist(), strict=True))
        for start in range(0, len(columns), part.m):
            yield columns[start : start + part.m]


def added(sizes: Sequence[float], exact: bool) -> float:
    """A sum in the order of the rows, rounded to float32 after every addition (`exact`: to float64)."""
    total = torch.zeros((), dtype=torch.float64 if exact else torch.float32)
    for size in sizes:
        total = total + size
    return total.item()


def mask_of(weight: Tensor, parts: Sequence[Part], scores: Tensor | None = None) -> Tensor:
    """True where a weight survives. Equal magnitudes: the earlier one does."""
    values = (weight if scores is None else scores).detach().abs().flatten()
    size, exact = values.double().tolist(), values.dtype == torch.float64
    keep = torch.ones(weight.numel(), dtype=torch.bool)
    for part in parts:
        for block in blocks(weight.shape, part):
            ranked = sorted(block, key=lambda column: -_score(column, size, exact))   # Python's sort is stable
            keep[[place for column in ranked[part.n :] for place in column]] = False
    return keep.reshape(weight.shape)


def _score(column: tuple[int, ...], size: list[float], exact: bool) -> float:
    return size[column[0]] if len(column) == 1 else added([size[place] for place in column], exact)


def effective_of(weight: Tensor, parts: Sequence[Part], decay: float, outer: Sequence[Part] = ()) -> Tensor:
    """W~ = W ⊙ [Φ + D·(Φ_outer - Φ)] of a dense weight; Φ_outer all ones without outer parts."""
    mask, outer_mask = (mask_of(weight, p).to(weight.dtype) for p in (parts, outer))
    return weight.detach() * (mask + decay * (outer_mask - mask))


def overfull_blocks(weight: Tensor, parts: Sequence[Part]) -> list[list[tuple[int, ...]]]:
    """The blocks with more than N columns that are not zero throughout."""
    values = weight.detach().double().flatten().tolist()
    return [
        block
        for part in parts
        for block in blocks(weight.shape, part)
        if sum(any(values[place] != 0 for place in column) for column in block) > part.n
    ]


@torch.no_grad()
def prune_by_hand(model: nn.Module, parts: Parts, decay: float) -> nn.Module:
    """Write W~ into an ordinary model's weights, in place."""
    for name, parts_of_weight in parts.items():
        weight = model.get_parameter(name)
        weight.copy_(effective_of(weight, parts_of_weight, decay))
    return model
