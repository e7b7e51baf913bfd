"""What a run may be judged by in place of its last weights: an exponential average of them (EMA)."""

from __future__ import annotations

import copy
from itertools import chain

import torch
from torch import nn


class Average:
    """An exponential average of a model's weights, kept beside it.

        A_s = d_s·A_{s-1} + (1 - d_s)·W_s,    d_s = min(decay, (1 + s) / (10 + s)),    A_0 = W_0

    W_s are the weights after optimizer step s = 1, 2, ...; the smaller d_s of the first steps let go of the random
    weights that a run begins with. Buffers of whole numbers are copied, others (running means) averaged alike.

    `model` is a deep copy made where the sparsifier is attached already: it averages the dense W, takes masks of its
    own from the average, and follows the run's stage. Source: Polyak and Juditsky 1992; the warm-up is TensorFlow's.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights of `model` after `step` optimizer steps."""
        part = 1 - min(self.decay, (1 + step) / (10 + step))
        mine, its = (chain(each.parameters(), each.buffers()) for each in (self.model, model))
        for average, tensor in zip(mine, its, strict=True):
            if average.is_floating_point():
                average.lerp_(tensor, part)
            else:
                average.copy_(tensor)
