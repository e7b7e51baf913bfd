"""images: any classes of photographs that lie in a folder, read from disk batch by batch."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nmflow.train.config_sections import DataConfig
from nmflow.train.data.image_files import RESIZED_CROP, read_image, size_of
from nmflow.train.data.image_layouts import Files, Found, Items, Packed, find_images
from nmflow.train.data.pixels import Pixels
from nmflow.train.data.splits import Data, Split, TensorSplit, held_out
from nmflow.train.objectives import Classify

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""Per channel over 0..1: ImageNet's, as the field uses them for any photographs."""

MIDDLE = 0.875
"""The part of the shorter side that is looked at in evaluation, 224 of 256 pixels, as the field has it for ImageNet."""

MAX_THREADS = 16


def load_images(config: DataConfig) -> Data:
    """RGB images [3, S, S], in any of the layouts of `find_images`; the classes are the folders of train/, sorted.

    `image_size` given: photographs of any size, brought to it by random resized crops and mirroring in training and
    by the middle (`MIDDLE`) in evaluation. None: images of the size of the first one, in training shifted by up to
    S/8 and mirrored. Files are decoded when a batch asks for them.

    Of val and test one may be missing: val is then set aside from train (see `held_out`), and a val without a test is
    the test split (as for ImageNet). Raises `FileNotFoundError` where the layout is another, with where official data
    come from, `ValueError` where a class or a file is at fault.
    """
    root = Path(config.path or "")
    found = find_images(root)
    if len(found.classes) < 2:
        raise ValueError(
            f"{root / 'train'}: a single class, {found.classes[0]}; to tell images apart it takes two or more folders"
        )
    if config.image_size is not None and isinstance(found.splits["train"], Packed):
        raise ValueError(f"{root}: packed images have one size, and it is theirs; leave data.image_size out")
    splits, notes = _three_splits(found, root)
    if config.image_size is not None:
        notes += (f"evaluated on the middle {MIDDLE:.1%} of the shorter side",)
    middle = 1.0 if config.image_size is None else MIDDLE
    size = config.image_size or _size_of(splits["train"])
    mean, std = (tuple(255 * value for value in values) for values in (MEAN, STD))
    plain = Pixels(mean, std)
    training = plain.for_training(config, pad=size // 8 if config.image_size is None else 0)
    crops = config.image_size is not None and config.augment is not False
    return Data(
        name="images",
        kind="images",
        objective=Classify(("accuracy", "top5") if len(found.classes) > 5 else ("accuracy",)),
        train=_split(splits["train"], size, training, middle, crops),
        val=_split(splits["val"], size, plain, middle),
        test=_split(splits["test"], size, plain, middle),
        num_classes=len(found.classes),
        sample_shape=(3, size, size),
        notes=notes,
    )


@dataclass(frozen=True)
class FileSplit:
    """Images that stay on disk until a batch asks for them."""

    files: Files
    size: int
    pixels: Pixels
    middle: float = 1.0
    """The part of the shorter side that is kept where nothing is cropped at random."""
    crops: bool = False
    """Whether augmentation crops."""

    def __len__(self) -> int:
        return len(self.files.names)

    def batch(self, indices: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Inputs [B, 3, S, S] and labels [B]; a few threads decode. Raises `ValueError` naming a bad file."""
        crops = RESIZED_CROP.draw(len(indices), generator) if generator is not None and self.crops else None

        def read(place: int) -> np.ndarray:
            path = self.files.path(int(indices[place]))
            return read_image(path, self.size, self.middle, None if crops is None else crops[place])

        with ThreadPoolExecutor(max_workers=min(MAX_THREADS, os.cpu_count() or 1)) as pool:
            images = np.stack(list(pool.map(read, range(len(indices)))))
        return self.pixels(torch.from_numpy(images), generator), self.files.labels[indices]


def _three_splits(found: Found, root: Path) -> tuple[dict[str, Items], tuple[str, ...]]:
    """train, val and test, and what to say of them."""
    splits, notes = dict(found.splits), found.notes
    if "test" not in splits:
        splits["test"] = splits.pop("val")
        notes += ("val/ is the test split",)
    if "val" not in splits:
        train = splits["train"]
        is_val, note = held_out(train.labels)
        if not is_val.any():
            raise ValueError(f"{root}: no val/, and no class of train/ has the ten images to set one aside")
        splits["train"], splits["val"] = train.part(~is_val), train.part(is_val)
        notes += (note,)
    return splits, notes


def _split(items: Items, size: int, pixels: Pixels, middle: float, crops: bool = False) -> Split:
    if isinstance(items, Packed):
        return TensorSplit(items.images, items.labels, pixels)
    return FileSplit(items, size, pixels, middle, crops)


def _size_of(items: Items) -> int:
    return int(items.images.shape[-1]) if isinstance(items, Packed) else size_of(items.path(0))
