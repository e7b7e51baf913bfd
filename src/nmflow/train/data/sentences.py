"""Sentences and pairs of them as a pretrained network's own tokenizer cuts them up, padded batch by batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from nmflow.train.data.hub import fetch_command

Tokenizer = Any
"""A tokenizer of transformers; there are no types to name."""


@dataclass(frozen=True)
class SentenceSplit:
    """Items of different lengths, end to end: what a tokenizer gives, by the names that networks know it under.

    `columns["input_ids"]` [n] and the like; item i lies in `starts[i]:starts[i + 1]`.
    """

    columns: dict[str, Tensor]
    starts: Tensor
    targets: Tensor
    padding: dict[str, int]

    def __len__(self) -> int:
        return len(self.targets)

    @cached_property
    def lengths(self) -> Tensor:
        """Tokens of every item."""
        return self.starts.diff()

    def batch(self, indices: Tensor, generator: torch.Generator | None = None) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs [B, T] by name, T the longest of these items, and targets [B]. Nothing is augmented."""
        at, inside = places_of(self.starts, indices)
        inputs = {
            name: torch.where(inside, column[at].long(), self.padding.get(name, 0))
            for name, column in self.columns.items()
        }
        return {**inputs, "attention_mask": inside.long()}, self.targets[indices]


def places_of(starts: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Where the tokens of items lie, side by side: (places [B, T], which of them are the item's own), T the longest."""
    begins, ends = starts[indices], starts[indices + 1]
    steps = torch.arange(int((ends - begins).max()))
    return (begins.unsqueeze(1) + steps).clamp(max=int(starts[-1]) - 1), steps < (ends - begins).unsqueeze(1)


def load_tokenizer(source: str | None, who: str) -> Tokenizer:
    """The tokenizer of a folder or of a name that transformers knows.

    Raises `ValueError` where there is none, or no transformers.
    """
    if source is None:
        raise ValueError(f"{who} needs a tokenizer: model=transformers:NAME brings one, or give data.tokenizer=PATH")
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ValueError(f"{who} needs transformers: pip install 'nmflow[transformers]'") from error
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no tokenizer found for {source}: {str(error).splitlines()[0]}; fetch it: {fetch_command(source)}"
        ) from error


def encode(items: Sequence[tuple[str, ...]], targets: Tensor, tokenizer: Tokenizer, context: int) -> SentenceSplit:
    """Cut up items of one sentence or two; of a pair the longer one is cut off first to fit into `context` tokens."""
    texts = [list(column) for column in zip(*items, strict=True)]
    found = tokenizer(*texts, truncation=True, max_length=context, return_attention_mask=False)
    lengths = torch.tensor([0, *(len(ids) for ids in found["input_ids"])])
    columns = {
        name: torch.tensor([number for item in found[name] for number in item], dtype=torch.int32) for name in found
    }
    padding = {"input_ids": tokenizer.pad_token_id or 0, "token_type_ids": getattr(tokenizer, "pad_token_type_id", 0)}
    return SentenceSplit(columns, lengths.cumsum(0), targets, padding)
