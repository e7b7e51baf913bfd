"""Rectangles of random area and shape inside an image: what a random crop keeps, and what random erasing overwrites."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

TRIES = 10


class Box(NamedTuple):
    """A rectangle in pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class RandomBox:
    """A rectangle of random area and shape at a random place inside an image of H x W.

        a = H·W·uniform(area),    r = exp(uniform(log ratio)),    width = round(√(a·r)),    height = round(√(a / r))

    The first of ten tries that fits counts; its place is uniform among those inside the image.
    """

    area: tuple[float, float]
    """Least and largest part of the image's area."""
    ratio: tuple[float, float]
    """Least and largest width over height."""

    def draw(self, num: int, generator: torch.Generator) -> Tensor:
        """The random numbers of `num` rectangles [num, TRIES + 1, 2], drawn before the images' sizes are known."""
        return torch.rand(num, TRIES + 1, 2, generator=generator, dtype=torch.float64)

    def inside(self, height: int, width: int, uniform: Tensor) -> Box | None:
        """The rectangle of random numbers [TRIES + 1, 2] in an image, or None where no try fits."""
        *tries, (down, right) = uniform.tolist()
        low, high = (math.log(limit) for limit in self.ratio)
        for of_area, of_ratio in tries:
            area = height * width * (self.area[0] + of_area * (self.area[1] - self.area[0]))
            ratio = math.exp(low + of_ratio * (high - low))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return Box(int(down * (height - h + 1)), int(right * (width - w + 1)), h, w)
        return None

    def central(self, height: int, width: int) -> Box:
        """The largest rectangle in the middle of an image whose shape is allowed."""
        low, high = self.ratio
        h, w = min(height, max(1, round(width / low))), min(width, max(1, round(height * high)))
        return Box((height - h) // 2, (width - w) // 2, h, w)
