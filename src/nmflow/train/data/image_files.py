"""One image file: its size is checked before memory is taken, then it is cropped and brought to a square."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from nmflow.train.data.boxes import RandomBox

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""By content: a PNG may be called .jpg, but nothing that starts an interpreter is opened."""

MAX_PIXELS = 89_478_485
"""A quarter of a GiB in RGB, where Pillow begins to warn of decompression bombs."""

RESIZED_CROP = RandomBox(area=(0.08, 1.0), ratio=(3 / 4, 4 / 3))
"""Of random resized crops. Source: Szegedy et al. 2015, as every ImageNet script has it."""


def read_image(path: Path, size: int, middle: float = 1.0, crop: Tensor | None = None) -> np.ndarray:
    """One file as RGB bytes [3, size, size], bicubically.

    Without `crop`: the square in its middle whose edge is `middle` of the shorter side. `crop`: random numbers of
    `RESIZED_CROP` for a part of any shape, the largest allowed one in the middle where no try fits. Raises
    `ValueError` with the path where the file is no image or has more than `MAX_PIXELS`.
    """
    from PIL import Image, ImageOps

    with opened(path) as image:
        if crop is None:
            square = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC, bleed=(1 - middle) / 2)
        else:
            height, width = image.height, image.width
            box = RESIZED_CROP.inside(height, width, crop) or RESIZED_CROP.central(height, width)
            part = image.crop((box.left, box.top, box.left + box.width, box.top + box.height))
            square = part.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
        pixels: np.ndarray = np.asarray(square).transpose(2, 0, 1)
        return pixels


def size_of(path: Path) -> int:
    """Edge of a square image. Raises `ValueError` as `read_image` does, and for one that is not square."""
    with opened(path) as image:
        if image.width == image.height:
            return int(image.width)
        found = f"{image.width}x{image.height}"
    raise ValueError(f"{path}: {found} is not square; say which size: data.image_size=...")


@contextmanager
def opened(path: Path) -> Iterator[Image]:
    """An image whose header is read and whose pixels are not."""
    from PIL import Image

    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height} is more than {MAX_PIXELS:,} pixels")
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: no readable image: {error}") from error
