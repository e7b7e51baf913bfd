"""Random changes to a batch of images; the randomness comes from the given generator alone."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nmflow.train.data.boxes import RandomBox

ERASED = RandomBox(area=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3))


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


def erase(images_BCHW: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Random erasing: in every image, with this probability, a rectangle overwritten by noise.

        y[b, c, i, j] = z ~ Normal(0, 1) for (i, j) in the rectangle (`ERASED`),    x[b, c, i, j] elsewhere

    The images are at their final scale, mean 0 and variance 1. Source: Zhong et al. 2020.
    """
    num, channels, height, width = images_BCHW.shape
    chosen_B = torch.rand(num, generator=generator) < probability
    numbers_B = ERASED.draw(num, generator)
    erased = images_BCHW.clone()
    for place in chosen_B.nonzero().flatten().tolist():
        box = ERASED.inside(height, width, numbers_B[place])
        if box is not None:
            noise = torch.randn(channels, box.height, box.width, generator=generator)
            erased[place, :, box.top : box.top + box.height, box.left : box.left + box.width] = noise
    return erased
