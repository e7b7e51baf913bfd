"""cifar10: 60,000 colour images of 32x32, from whichever of three layouts lies in the folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nmflow.train.config_sections import DataConfig
from nmflow.train.data.jpeg_npz import read_jpeg_npz
from nmflow.train.data.pixels import Pixels
from nmflow.train.data.safe_pickle import read_array_pickle
from nmflow.train.data.splits import Data, TensorSplit, held_out, missing
from nmflow.train.objectives import Classify

MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)
"""Per channel over 0..1, of the train images; the constants that the field uses."""

TRAIN_NAMES = tuple(f"data_batch_{number}" for number in range(1, 6))
LAYOUT = (
    "cifar-10-batches-py/ (as torchvision downloads it), cifar-10-batches-bin/ (the binary version), or "
    "cifar10_train_jpeg.npz and cifar10_test_jpeg.npz in that folder"
)
FETCH = "curl -O https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz && tar xzf cifar-10-python.tar.gz"

Arrays = tuple[Tensor, Tensor]
"""Bytes [n, 3, 32, 32] and labels [n]."""


def load_cifar10(config: DataConfig) -> Data:
    """45,000 / 5,000 / 10,000 images of 10 classes: every tenth training image of a class is val.

    Augmentation (on unless refused) shifts by up to 4 pixels and mirrors. Raises `FileNotFoundError` where no
    known layout is found, with the command that gets the data, `ValueError` where a file is not what it should be.
    """
    folder = Path(config.path or "")
    layout, train_all, test = _read(folder)
    is_val, note = held_out(train_all[1])
    if not is_val.any():
        raise ValueError(f"{folder}: {len(is_val)} training images are too few to set a tenth aside for val")
    mean, std = (tuple(255 * value for value in values) for values in (MEAN, STD))
    plain = Pixels(mean, std)
    return Data(
        name="cifar10",
        kind="images",
        objective=Classify(("accuracy", "top5")),
        train=TensorSplit(train_all[0][~is_val], train_all[1][~is_val], plain.for_training(config, pad=4)),
        val=TensorSplit(train_all[0][is_val], train_all[1][is_val], plain),
        test=TensorSplit(*test, plain),
        num_classes=10,
        sample_shape=(3, 32, 32),
        notes=(f"read from {layout}", note),
    )


def _read(folder: Path) -> tuple[str, Arrays, Arrays]:
    """(what was found, train, test)."""
    readers: tuple[tuple[str, str, Callable[[Path], Arrays]], ...] = (
        ("cifar-10-batches-py", "", _read_python),
        ("cifar-10-batches-bin", ".bin", _read_binary),
    )
    for name, suffix, read in readers:
        place = folder if folder.name == name else folder / name
        if place.is_dir():
            paths = [place / f"{file}{suffix}" for file in (*TRAIN_NAMES, "test_batch")]
            absent = [str(path) for path in paths if not path.is_file()]
            if absent:
                raise missing(absent[0], f"all of {', '.join(path.name for path in paths)} in {place}")
            batches = [read(path) for path in paths]
            images, labels = (torch.cat(part) for part in zip(*batches[:-1], strict=True))
            return name, (images, labels), batches[-1]
    files = [folder / f"cifar10_{split}_jpeg.npz" for split in ("train", "test")]
    if not all(file.is_file() for file in files):
        raise missing(folder, LAYOUT, FETCH)
    train, test = (_checked(*read_jpeg_npz(file, size=32), file) for file in files)
    return "cifar10_*_jpeg.npz (recompressed: a little lower accuracy than published)", train, test


def _read_python(path: Path) -> Arrays:
    content = read_array_pickle(path)
    images = content.get("data") if isinstance(content, dict) else None
    labels = content.get("labels") if isinstance(content, dict) else None
    if not isinstance(images, np.ndarray) or not isinstance(labels, list):
        raise ValueError(f'{path}: expected a mapping with an array "data" and a list "labels"')
    if images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != 3072:
        raise ValueError(f"{path}: expected uint8 data [n, 3072], found {images.dtype} {list(images.shape)}")
    if not all(type(label) is int and 0 <= label <= 9 for label in labels):
        raise ValueError(f"{path}: a label is not a whole number from 0 to 9")
    return _checked(images.reshape(-1, 3, 32, 32), np.array(labels, dtype=np.int64), path)


def _read_binary(path: Path) -> Arrays:
    records, rest = divmod(path.stat().st_size, 3073)
    if rest or not 0 < records <= 100_000:
        raise ValueError(f"{path}: {path.stat().st_size:,} bytes; expected whole records of 1 + 3072 bytes")
    content = np.fromfile(path, dtype=np.uint8).reshape(-1, 3073)
    return _checked(content[:, 1:].reshape(-1, 3, 32, 32), content[:, 0], path)


def _checked(images: np.ndarray, labels: np.ndarray, path: Path) -> Arrays:
    if len(images) != len(labels):
        raise ValueError(f"{path}: {len(images)} images but {len(labels)} labels")
    if not len(labels) or int(labels.max()) > 9:
        raise ValueError(f"{path}: labels run from 0 to 9, and there is at least one image")
    return torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(labels.astype(np.int64))
