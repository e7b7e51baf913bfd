"""timm's RandAugment, AutoAugment and AugMix on a batch, so that what they draw follows from a generator alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Policy:
    """A transform of PIL images that draws from Python's and numpy's global streams, made a function of a generator.

        y[b] = transform(x[b]) with both streams begun at seed[b],    seed ~ uniform in 0 ... 2³² - 1 from the generator

    Bytes [B, 3, H, W] in and out. The global streams are as they were afterwards.
    """

    transform: Callable[[Any], Any]

    def __call__(self, images_BCHW: Tensor, generator: torch.Generator) -> Tensor:
        from PIL import Image

        changed = torch.empty_like(images_BCHW)
        seeds = torch.randint(2**32, (len(images_BCHW),), generator=generator).tolist()
        with _streams_put_back():
            for place, seed in enumerate(seeds):
                random.seed(seed)
                np.random.seed(seed)
                image = Image.fromarray(images_BCHW[place].movedim(0, -1).contiguous().numpy())
                changed[place] = torch.from_numpy(np.array(self.transform(image))).movedim(-1, 0)
        return changed


def timm_policy(text: str, mean: tuple[float, ...]) -> Policy:
    """The policy that timm's string names; what moves in from outside is the mean colour (0..255).

    As in timm's own training: bilinear or bicubic by chance, magnitudes above 10 count as 10 unless mmax says
    otherwise; without colour jitter. Raises `ValueError` where timm is missing or refuses the string.
    """
    try:
        from timm.data import auto_augment
    except ImportError as error:
        raise ValueError(f"data.augment: {text} is a policy of timm's: pip install 'nmflow[timm]'") from error
    name = text.partition("-")[0]
    settings: dict[str, Any] = {"img_mean": tuple(round(value) for value in mean)}
    if name == "augmix":
        settings["translate_pct"] = 0.3
    makers = {"rand": auto_augment.rand_augment_transform, "augmix": auto_augment.augment_and_mix_transform}
    try:
        transform = makers.get(name, auto_augment.auto_augment_transform)(text, settings)
        for op in _ops_of(transform):
            if op.aug_fn is auto_augment.posterize:
                op.aug_fn = _posterize
        policy = Policy(transform)
        policy(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.Generator().manual_seed(0))
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"data.augment: timm refuses {text}: {error}") from error
    return policy


def _ops_of(transform: Any) -> Iterator[Any]:
    """The operations that a transform of timm chooses from."""
    lists = transform.policy if hasattr(transform, "policy") else [transform.ops]
    return chain.from_iterable(lists)


def _posterize(image: Any, bits_to_keep: int, **_: Any) -> Any:
    """timm's own, where Pillow has it: at the end of its scale timm keeps no bit, which newer Pillows refuse to do."""
    from PIL import Image, ImageOps

    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    return image if bits_to_keep >= 8 else ImageOps.posterize(image, bits_to_keep)


@contextmanager
def _streams_put_back() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
