"""Which items a step sees: a pure function of (seed, step), so that a run resumes anywhere, bit for bit."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import torch
from torch import Tensor

WINDOW = 64
"""Batches' worth of items that are sorted together; sorting all of them would make the same batches every time."""


def batch_indices(num_items: int, batch: int, seed: int, step: int, lengths: Tensor | None = None) -> Tensor:
    """Items of optimizer step `step` = 0, 1, ..., an int64 tensor [batch].

        p = step·batch + i,    epoch = p div num_items,    item = permutation(seed, epoch)[p mod num_items]

    Every epoch is a permutation of its own; a batch that begins in one epoch ends in the next, so nothing is
    dropped and all batches are full. With `lengths` [num_items] it is a permutation whose batches need little padding:
    `WINDOW` batches' worth of items at a time are sorted by length, then the batches are shuffled; the one between two
    epochs stays as drawn. (The order is remembered by the tensor itself: hand in the same one at every step.) Raises
    `ValueError` where a size is below 1 or the step below 0.

    >>> steps = [batch_indices(5, 2, seed=0, step=step) for step in range(5)]
    >>> sorted(torch.cat(steps).tolist()) == sorted(2 * [0, 1, 2, 3, 4])
    True
    """
    if num_items < 1 or batch < 1 or step < 0:
        raise ValueError(f"num_items {num_items} and batch {batch} are at least 1, step {step} at least 0")
    taken: list[Tensor] = []
    position, end = step * batch, (step + 1) * batch
    while position < end:
        epoch, start = divmod(position, num_items)
        stop = min(num_items, start + end - position)
        items = _permutation(num_items, seed, epoch) if lengths is None else _alike(lengths, batch, seed, epoch)
        taken.append(items[start:stop])
        position += stop - start
    return torch.cat(taken)


def share(
    batch: int, process: int = 0, num_processes: int = 1, micro: int = 0, accumulate: int = 1
) -> slice:
    """The part of a batch that one process reads in one micro-batch: all parts are equal and cover the batch.

    Raises `ValueError` where processes times micro-batches do not divide the batch, or where one is out of
    range.

    >>> [share(8, process, 2, micro, 2) for process in range(2) for micro in range(2)]
    [slice(0, 2, None), slice(2, 4, None), slice(4, 6, None), slice(6, 8, None)]
    """
    if not (0 <= process < num_processes and 0 <= micro < accumulate):
        raise ValueError(
            f"process {process} of {num_processes}, micro-batch {micro} of {accumulate}: counted from 0"
        )
    size, rest = divmod(batch, num_processes * accumulate)
    if rest or not size:
        raise ValueError(
            f"{num_processes} processes x {accumulate} micro-batches do not divide a batch of {batch}; "
            f"the nearest batch above is {(size + 1) * num_processes * accumulate}"
        )
    first = (process * accumulate + micro) * size
    return slice(first, first + size)


def step_generator(seed: int, step: int, first: int = 0) -> torch.Generator:
    """Randomness of one share of one step (augmentation); `first` is where the share begins in the batch."""
    return torch.Generator().manual_seed(_seed("augment", seed, step, first))


# A batch may lie in two epochs. Callers get copies, never the remembered tensor.
@lru_cache(maxsize=2)
def _permutation(num_items: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed(_seed("order", seed, epoch))
    return torch.randperm(num_items, generator=generator)


@lru_cache(maxsize=2)
def _alike(lengths: Tensor, batch: int, seed: int, epoch: int) -> Tensor:
    items = _permutation(len(lengths), seed, epoch)
    head = min(-epoch * len(items) % batch, len(items))  # what the batch between two epochs takes of this one
    whole = (len(items) - head) // batch
    first, body, last = items.tensor_split([head, head + whole * batch])
    cuts = list(range(WINDOW * batch, len(body), WINDOW * batch))
    windows = [window[lengths[window].argsort(stable=True)] for window in body.tensor_split(cuts)]
    generator = torch.Generator().manual_seed(_seed("batches", seed, epoch))
    batches = torch.cat(windows).view(whole, batch)[torch.randperm(whole, generator=generator)]
    return torch.cat([first, batches.flatten(), last])


def _seed(purpose: str, *numbers: int) -> int:
    """63 bits from a hash: neighbouring seeds and steps give unrelated streams."""
    text = ":".join([purpose, *map(str, numbers)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
