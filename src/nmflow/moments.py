"""Sums, means and variances of many small numbers: second moments of 1e-10, whose variance is 1e-20 and less.

Everything is added up in float64, around means. Pieces of a tensor, or of a weight that several processes hold, are
summed for themselves and joined.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

_PIECE = {"cpu": 1 << 20}
_LARGE_PIECE = 1 << 24
"""Entries that are float64 at a time: a few megabytes on a CPU, elsewhere few and large launches."""


class Moments(NamedTuple):
    """n, Σ x and Σ (x - x̄)² of one set of numbers."""

    size: int
    total: float
    squares: float

    @property
    def variance(self) -> float | None:
        """Σ (x - x̄)² / n, None of no numbers."""
        return self.squares / self.size if self.size else None


class Sums(NamedTuple):
    """The moments of each piece of a tensor, still on its device."""

    sizes: list[int]
    totals: list[Tensor]
    squares: list[Tensor]

    @property
    def tensors(self) -> list[Tensor]:
        """What `read` has to read before `moments`."""
        return [*self.totals, *self.squares]

    def moments(self, numbers: Iterator[float]) -> Moments:
        """Those of the whole tensor; takes the numbers of `tensors` from an iterator."""
        totals = [next(numbers) for _ in self.totals]
        squares = [next(numbers) for _ in self.squares]
        return joined(map(Moments, self.sizes, totals, squares))


def sums(tensor: Tensor | None, magnitudes: bool = False) -> Sums:
    """Sum up the entries of a tensor, their magnitudes with `magnitudes`; nothing where there is no tensor.

    A piece at a time, so that memory is read once and float64 costs the memory of a piece. Around the mean of each:
    from Σ x² alone, numbers that hardly differ would lose their variance.
    """
    found = Sums([], [], [])
    if tensor is None:
        return found
    if tensor.device.type == "mps":  # which has no float64
        tensor = tensor.cpu()
    if tensor.dim() == 2 and tensor.stride(0) == 1:  # columns that lie next to each other need no copy
        tensor = tensor.t()
    for piece in torch.split(tensor.reshape(-1), _PIECE.get(tensor.device.type, _LARGE_PIECE)):
        size = len(piece)
        if size:
            x = piece.to(torch.float64, copy=True)
            total = (x.abs_() if magnitudes else x).sum()
            x -= total / size
            found.sizes.append(size)
            found.totals.append(total)
            found.squares.append(x.dot(x))
    return found


def read(tensors: Sequence[Tensor]) -> list[float]:
    """Tensors of one number, from whatever devices; they are waited for together."""
    if not tensors:
        return []
    device = tensors[0].device
    return cast("list[float]", torch.stack([each.to(device, torch.float64) for each in tensors]).tolist())


def joined(parts: Iterable[Moments]) -> Moments:
    """The moments of the union of sets.

        n = Σ n_i,    Σ x = Σ t_i,    Σ (x - x̄)² = Σ s_i + Σ n_i·(t_i/n_i - x̄)²

    n_i, t_i and s_i are size, total and squares of set i. Source: Chan, Golub and LeVeque 1983.

    >>> joined([Moments(2, 4.0, 2.0), Moments(1, 5.0, 0.0)])  # {1, 3} and {5}
    Moments(size=3, total=9.0, squares=8.0)
    """
    parts = [part for part in parts if part.size]
    size, total, squares = sum(part.size for part in parts), sum(part.total for part in parts), 0.0
    for part in parts:
        apart = part.total / part.size - total / size
        squares += part.squares + part.size * apart * apart
    return Moments(size, total, squares)
