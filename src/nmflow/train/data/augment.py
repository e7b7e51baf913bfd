"""Random changes to a batch of images; the randomness comes from the given generator alone."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def shift(images_BCHW: Tensor, pad: int, generator: torch.Generator) -> Tensor:
    """Every image moved by up to `pad` pixels in each direction, zeros moved in.

        y[b, c, i, j] = x[b, c, i + u_b, j + v_b],    u, v uniform in -pad ... pad,    0 outside the image
    """
    num, _, height, width = images_BCHW.shape
    padded = F.pad(images_BCHW, (pad, pad, pad, pad))
    top_left = torch.randint(0, 2 * pad + 1, (2, num, 1), generator=generator)
    rows_BH = top_left[0] + torch.arange(height)
    columns_BW = top_left[1] + torch.arange(width)
    items_B11 = torch.arange(num).view(-1, 1, 1)
    moved_BHWC = padded.movedim(1, -1)[items_B11, rows_BH[:, :, None], columns_BW[:, None, :]]
    return moved_BHWC.movedim(-1, 1)


def flip(images_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Every image mirrored left to right with probability 1/2."""
    mirrored = torch.randint(0, 2, (len(images_BCHW), 1, 1, 1), generator=generator, dtype=torch.bool)
    return torch.where(mirrored, images_BCHW.flip(-1), images_BCHW)


def mix(images_BCHW: Tensor, alpha: float, generator: torch.Generator) -> tuple[Tensor, Tensor, float]:
    """Mixup: every image blended with another one of its batch; (blended images, the partners' places, part λ).

        y[b] = λ·x[b] + (1 - λ)·x[π(b)],    λ ~ Beta(α, α),    π a random permutation

    The loss is λ times that of an image's own target and 1 - λ times that of its partner's. Source: Zhang et al. 2018.
    """
    order_B = torch.randperm(len(images_BCHW), generator=generator)
    seed = int(torch.randint(2**62, (), generator=generator))
    part = float(np.random.default_rng(seed).beta(alpha, alpha))
    return part * images_BCHW + (1 - part) * images_BCHW[order_B], order_B, part
