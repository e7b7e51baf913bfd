"""images: a folder a class, read from disk batch by batch."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nmflow.train.config import DataConfig
from nmflow.train.data.splits import Data, Pixels, missing, rank_in_class
from nmflow.train.objectives import Classify

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""Per channel over 0..1: ImageNet's, as the field uses them for any photographs."""

LAYOUT = "train/CLASS/*.png (or .jpg, ...) and val/CLASS/ or test/CLASS/ or both in that folder"


def load_images(config: DataConfig) -> Data:
    """RGB images [3, S, S]: the shorter side brought to S = `image_size`, the middle cut out.

    The classes are the folders of train/, sorted. Of val/ and test/ one may be missing: val is then every
    tenth training image of a class, and a val/ without a test/ is the test split (as for ImageNet). Files are
    decoded when a batch asks for them. Augmentation (on unless refused) shifts by up to S/8 and mirrors.
    Raises `FileNotFoundError` where the layout is another, `ValueError` where a class or a file is at fault.
    """
    root = Path(config.path or "")
    if not (root / "train").is_dir() or not ((root / "val").is_dir() or (root / "test").is_dir()):
        raise missing(root, LAYOUT)
    classes = _subfolders(root / "train")
    if not classes:
        raise missing(root / "train", LAYOUT)
    found = {name: _scan(root / name, classes) for name in ("train", "val", "test") if (root / name).is_dir()}
    notes: tuple[str, ...] = ()
    if "test" not in found:
        found["test"] = found.pop("val")
        notes += ("no test/: val/ is the test split",)
    if "val" not in found:
        found["train"], found["val"] = _hold_out(found["train"], root)
        notes += ("val is every tenth training image of a class",)
    size = config.image_size or _size_of(found["train"].paths[0])
    mean, std = (tuple(255 * value for value in values) for values in (MEAN, STD))
    plain = Pixels(mean, std)
    augmented = plain if config.augment is False else Pixels(mean, std, pad=size // 8, flips=True)
    splits = {
        name: FileSplit(files, size, augmented if name == "train" else plain) for name, files in found.items()
    }
    return Data(
        name="images",
        kind="images",
        objective=Classify(("accuracy", "top5")),
        train=splits["train"],
        val=splits["val"],
        test=splits["test"],
        num_classes=len(classes),
        sample_shape=(3, size, size),
        notes=notes,
    )


@dataclass(frozen=True)
class Files:
    """Paths and the label of each."""

    paths: tuple[Path, ...]
    labels: Tensor


@dataclass(frozen=True)
class FileSplit:
    """Images that stay on disk until a batch asks for them."""

    files: Files
    size: int
    pixels: Pixels

    def __len__(self) -> int:
        return len(self.files.paths)

    def batch(self, indices: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Inputs [B, 3, S, S] and labels [B]; a few threads decode. Raises `ValueError` naming a bad file."""
        paths = [self.files.paths[index] for index in indices.tolist()]
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            images = list(pool.map(lambda path: read_image(path, self.size), paths))
        return self.pixels(torch.from_numpy(np.stack(images)), generator), self.files.labels[indices]


def read_image(path: Path, size: int) -> np.ndarray:
    """One file as RGB bytes [3, size, size]. Raises `ValueError` with its path where it cannot be read."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            fitted = ImageOps.fit(image.convert("RGB"), (size, size))
            pixels: np.ndarray = np.asarray(fitted).transpose(2, 0, 1)
            return pixels
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: no readable image: {error}") from error


def _size_of(path: Path) -> int:
    from PIL import Image

    try:
        with Image.open(path) as image:
            width, height = int(image.width), int(image.height)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: no readable image: {error}") from error
    if width != height:
        raise ValueError(f"{path}: {width}x{height} is not square; say which size: data.image_size=...")
    return width


def _subfolders(folder: Path) -> list[str]:
    entries = (entry for entry in folder.iterdir() if entry.is_dir())
    return sorted(entry.name for entry in entries if not entry.name.startswith("."))


def _scan(folder: Path, classes: list[str]) -> Files:
    unknown = sorted(set(_subfolders(folder)) - set(classes))
    if unknown:
        raise ValueError(f"{folder}: classes that train/ does not have: {', '.join(unknown[:5])}")
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        inside = (folder / name).iterdir() if (folder / name).is_dir() else ()
        members = sorted(path for path in inside if path.suffix.lower() in SUFFIXES)
        if not members and folder.name == "train":
            raise ValueError(f"{folder / name}: a class without images ({', '.join(SUFFIXES)})")
        paths += members
        labels += [label] * len(members)
    if not paths:
        raise ValueError(f"{folder}: no images ({', '.join(SUFFIXES)}) in its class folders")
    return Files(tuple(paths), torch.tensor(labels))


def _hold_out(train: Files, root: Path) -> tuple[Files, Files]:
    """(train, val)."""
    is_val = rank_in_class(train.labels) % 10 == 9
    if not is_val.any():
        raise ValueError(f"{root}: no val/, and no class of train/ has the ten images to set one aside")
    train_files, val_files = (
        Files(tuple(train.paths[i] for i in part.nonzero().flatten().tolist()), train.labels[part])
        for part in (~is_val, is_val)
    )
    return train_files, val_files
