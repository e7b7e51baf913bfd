"""What data looks like to the loop: three splits that give batches by index, and what a network must know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from nmflow.train.data.pixels import Pixels
from nmflow.train.objectives import Objective

Kind = Literal["images", "text", "sentences", "translation"]
"""What an item is, and so which networks take it."""

MANY_ITEMS = 200_000
"""From here on a tenth is more than validation needs."""

Inputs = Tensor | Mapping[str, Tensor]
"""What a network takes: one tensor, or several by the names of its arguments."""


class Split(Protocol):
    """Items that are read by number."""

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor, generator: torch.Generator | None = None) -> tuple[Inputs, Tensor]:
        """Inputs and targets of the items; a pure function. A generator, where given, augments."""
        ...


@runtime_checkable
class Uneven(Split, Protocol):
    """Items of different lengths: a batch is padded to its longest."""

    @property
    def lengths(self) -> Tensor:
        """Tokens of every item."""
        ...


def longest_first(items: Split, indices: Tensor) -> Tensor:
    """An order of `indices` (their places, a permutation) in which neighbours need little padding."""
    if not isinstance(items, Uneven):
        return torch.arange(len(indices))
    return items.lengths[indices].argsort(descending=True, stable=True)


@dataclass(frozen=True)
class Data:
    """One data set: images are float [B, C, H, W], text int64 [B, T], sentences what a tokenizer gives."""

    name: str
    kind: Kind
    objective: Objective
    train: Split
    val: Split
    test: Split
    num_classes: int
    """Numbers that the network gives an item or a place: classes, 1 for a single number, or the vocabulary."""
    sample_shape: tuple[int, ...]
    """Shape of one input: (C, H, W) or (T,); sentences are at most T tokens long."""
    unit: str = "classes"
    """What `num_classes` counts."""
    further: Mapping[str, Split | None] = field(default_factory=dict)
    """Splits that are tested on besides, by what results call them; none: it belongs to the data but is not there."""
    notes: tuple[str, ...] = ()
    """What a reader of results should know, such as a split that is ours."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """What a run keeps in its folder, such as a vocabulary, by file name."""

    def describe(self) -> str:
        """One line: sizes, splits, notes."""
        shape = "x".join(map(str, self.sample_shape))
        sizes = ", ".join(
            f"{len(split):,} {name}"
            for name, split in (("train", self.train), ("val", self.val), ("test", self.test), *self.further.items())
            if split is not None
        )
        return "; ".join([f"{self.name}: inputs {shape}, {self.num_classes:,} {self.unit}, {sizes}", *self.notes])


@dataclass(frozen=True)
class TensorSplit:
    """Images that fit into memory: bytes [n, C, H, W] and labels [n]."""

    images: Tensor
    labels: Tensor
    pixels: Pixels

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Inputs [B, C, H, W] and labels [B]."""
        return self.pixels(self.images[indices], generator), self.labels[indices]


def rank_in_class(labels: Tensor) -> Tensor:
    """How many items before it have an item's label: the stuff of splits that need no random numbers.

    >>> rank_in_class(torch.tensor([7, 7, 3, 7, 3]))
    tensor([0, 1, 0, 2, 1])
    """
    ranks = torch.empty_like(labels)
    for label in torch.unique(labels):
        members = labels == label
        ranks[members] = torch.arange(int(members.sum()))
    return ranks


def held_out(labels: Tensor) -> tuple[Tensor, str]:
    """Which training items (a bool tensor [n]) are val where data bring none, and the note that says so.

    Every tenth of a class; of more than 200,000 items every hundredth, which is enough to see how well a run does.
    """
    every, ordinal = (10, "tenth") if len(labels) <= MANY_ITEMS else (100, "hundredth")
    return rank_in_class(labels) % every == every - 1, f"val is every {ordinal} training image of a class"


def missing(path: str | Path, layout: str, fetch: str = "") -> FileNotFoundError:
    """The error for data that is not there: what was looked for, what should lie there, and how to get it."""
    return FileNotFoundError(f"{path}: not found; expected {layout}" + (f". To get the data: {fetch}" if fetch else ""))
