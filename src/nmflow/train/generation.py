"""How networks write: sentences translated in batches, and a text gone on with, both token by token with a cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from nmflow.train.data.vocabulary import END, PAD

BATCH = 64
"""Sentences that are translated at a time."""


def translate(model: nn.Module, sources: Sequence[Sequence[int]], length: int, beam: int = 1) -> list[list[int]]:
    """The likeliest target tokens that an encoder-decoder of transformers finds for every source, without END.

        greedy (beam = 1): y_t = argmax_v p(v | y_1 ... y_t-1, source), until END or `length` tokens, END among them

    `beam` > 1 follows that many targets at a time and takes the one with the highest mean log p. Sources are token
    numbers, END included; those of like length share a batch.
    """
    order = sorted(range(len(sources)), key=lambda place: len(sources[place]))
    targets: dict[int, list[int]] = {}
    with _answering(model) as device:
        for first in range(0, len(order), BATCH):
            places = order[first : first + BATCH]
            ids = pad_sequence([torch.tensor(sources[place]) for place in places], True, PAD).to(device)
            written = cast(Any, model).generate(
                input_ids=ids, attention_mask=(ids != PAD).long(), max_new_tokens=length, num_beams=beam,
                do_sample=False, use_cache=True,
            )  # fmt: skip
            for place, row in zip(places, written[:, 1:].tolist(), strict=True):  # without the PAD it begins with
                targets[place] = row[: row.index(END)] if END in row else row
    return [targets[place] for place in range(len(sources))]


def go_on(
    model: nn.Module, prompt: Sequence[int], count: int, context: int, temperature: float = 0.0, seed: int = 0
) -> list[int]:
    """The `count` tokens that a causal language model writes after a prompt of at least one.

        temperature = 0: argmax_v p(v | the tokens in sight);    else drawn from softmax(logits / temperature)

    At most `context` tokens are in sight, as in training. When they are that many, the older half drops out of sight
    and the others are read anew; in between, networks of transformers keep the keys and values of what they have read.
    """
    chance = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    first, cache = max(0, len(tokens) - context), None  # the first token in sight
    with _answering(model) as device:
        for _ in range(count):
            if len(tokens) - first > context:
                first, cache = len(tokens) - (context + 1) // 2, None
            unread = tokens[first:] if cache is None else tokens[-1:]
            logits_V, cache = _next(model, torch.tensor([unread], device=device), cache)
            if temperature:
                odds = (logits_V.float().cpu() / temperature).softmax(-1)
                tokens.append(int(torch.multinomial(odds, 1, generator=chance)))
            else:
                tokens.append(int(logits_V.argmax()))
    return tokens[len(prompt) :]


def _next(model: nn.Module, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
    """Logits [V] of the token after `ids` [1, T], and the cache to go on with; our own networks have none."""
    if not hasattr(model, "generate"):
        return model(ids)[0, -1], None
    out = model(input_ids=ids, past_key_values=cache, use_cache=True)
    return out.logits[0, -1], out.past_key_values


@contextmanager
def _answering(model: nn.Module) -> Iterator[torch.device]:
    """In eval mode and without gradients; gives the device that the model lies on."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield next(model.parameters()).device
    finally:
        model.train(was_training)
