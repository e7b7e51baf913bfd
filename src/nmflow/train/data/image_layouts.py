"""Which images lie in a folder, and what they show: a folder a class, Tiny ImageNet's layout, or packed .npz files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nmflow.train.data.image_files import SUFFIXES
from nmflow.train.data.jpeg_npz import read_class_names, read_jpeg_npz
from nmflow.train.data.lines import lines_of
from nmflow.train.data.splits import missing

LAYOUT = (
    "train/CLASS/*.jpg (or .png, ...) and val/CLASS/ or test/CLASS/ or both in that folder, Tiny ImageNet's official "
    "layout, or NAME_train_jpeg.npz beside NAME_val_jpeg.npz or NAME_test_jpeg.npz"
)
FETCH = (
    "Tiny ImageNet: curl -O http://cs231n.stanford.edu/tiny-imagenet-200.zip && unzip tiny-imagenet-200.zip; "
    "ImageNet-1K: https://image-net.org/download-images"
)
SORT = (
    "sort them into val/CLASS/: torchvision.datasets.ImageNet(FOLDER, split='val') does it from "
    "ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz; for files that are unpacked already, the script "
    "https://raw.githubusercontent.com/soumith/imagenetLoader.torch/master/valprep.sh, run in val/"
)
ANNOTATIONS = "val_annotations.txt"
"""Tiny ImageNet's labels of val/images/: a line is the file's name, its class and a box."""


@dataclass(frozen=True)
class Files:
    """Images that lie in files: their names below a folder, and labels [n]."""

    folder: Path
    names: tuple[str, ...]
    labels: Tensor

    def path(self, index: int) -> Path:
        """Where an image lies."""
        return self.folder / self.names[index]

    def part(self, mask: Tensor) -> Files:
        """Those where a bool tensor [n] is true."""
        return Files(self.folder, tuple(self.names[i] for i in mask.nonzero().flatten().tolist()), self.labels[mask])


@dataclass(frozen=True)
class Packed:
    """Images in memory: bytes [n, 3, S, S] and labels [n]."""

    images: Tensor
    labels: Tensor

    def part(self, mask: Tensor) -> Packed:
        """Those where a bool tensor [n] is true."""
        return Packed(self.images[mask], self.labels[mask])


Items = Files | Packed


@dataclass(frozen=True)
class Found:
    """What lies in a folder: the classes, the splits that have labels (train, and val or test or both), and notes."""

    classes: tuple[str, ...]
    splits: dict[str, Items]
    notes: tuple[str, ...] = ()


def find_images(root: Path) -> Found:
    """The images of a folder in whichever layout it has.

    Raises `FileNotFoundError` with the layouts and where official data come from, `ValueError` where files
    contradict each other or val has no labels.
    """
    trains = sorted(root.glob("*_train_jpeg.npz"))
    if len(trains) > 1:
        raise ValueError(f"{root}: which of {', '.join(path.name for path in trains)}? Keep one set to a folder")
    if trains:
        return _packed(root, trains[0].name.removesuffix("_train_jpeg.npz"))
    if not (root / "train").is_dir() or not ((root / "val").is_dir() or (root / "test").is_dir()):
        raise missing(root, LAYOUT, FETCH)
    classes = tuple(_subfolders(root / "train"))
    if not classes:
        raise missing(root / "train", LAYOUT, FETCH)
    splits: dict[str, Items] = {"train": _folder_a_class(root / "train", classes)}
    notes: tuple[str, ...] = ()
    if (root / "val" / ANNOTATIONS).is_file():
        splits["val"] = _annotated(root / "val", classes)
    elif (root / "val").is_dir():
        if not _subfolders(root / "val") and _images_in(root / "val"):
            raise ValueError(f"{root / 'val'}: its images lie in no folders of classes; {SORT}")
        splits["val"] = _folder_a_class(root / "val", classes)
    if (root / "test").is_dir():
        # The official test images of ImageNet and Tiny ImageNet have no labels: they lie flat, or all in images/.
        if "val" in splits and set(_subfolders(root / "test")) <= {"images"} - set(classes):
            notes += ("test/ has no labels and is not used",)
        else:
            splits["test"] = _folder_a_class(root / "test", classes)
    return Found(classes, splits, notes)


# -- files -------------------------------------------------------------------------------------------------------


def _folder_a_class(folder: Path, classes: Sequence[str]) -> Files:
    """`CLASS/*.jpg`, and `CLASS/images/*.jpg` as in Tiny ImageNet."""
    unknown = sorted(set(_subfolders(folder)) - set(classes))
    if unknown:
        raise ValueError(f"{folder}: classes that train/ does not have: {', '.join(unknown[:5])}")
    names: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        members = [f"{name}/{file}" for file in _images_in(folder / name)]
        members += [f"{name}/images/{file}" for file in _images_in(folder / name / "images")]
        if not members and folder.name == "train":
            raise ValueError(f"{folder / name}: a class without images ({', '.join(SUFFIXES)})")
        names += members
        labels += [label] * len(members)
    if not names:
        raise ValueError(f"{folder}: no images ({', '.join(SUFFIXES)}) in its class folders")
    return Files(folder, tuple(names), torch.tensor(labels))


def _annotated(folder: Path, classes: Sequence[str]) -> Files:
    """`images/*.jpg` with their labels in a file, as in Tiny ImageNet."""
    file = folder / ANNOTATIONS
    places = {name: place for place, name in enumerate(classes)}
    names = _images_in(folder / "images")
    labels = dict.fromkeys(names, -1)
    for number, line in enumerate(lines_of(file), start=1):
        name, _, rest = line.partition("\t")
        label = places.get(rest.partition("\t")[0])
        if label is None or labels.get(name, 0) >= 0:
            raise ValueError(f"{file}: line {number} does not name an image, once, and a class of train/: {line!r:.80}")
        labels[name] = label
    bare = [name for name, label in labels.items() if label < 0]
    if bare:
        raise ValueError(f"{file}: {len(bare)} images without a line, such as {bare[0]}")
    if not names:
        raise ValueError(f"{folder / 'images'}: no images ({', '.join(SUFFIXES)})")
    return Files(folder / "images", tuple(names), torch.tensor(list(labels.values())))


def _subfolders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in _entries(folder) if entry.is_dir() and not entry.name.startswith("."))


def _images_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in _entries(folder) if entry.name.lower().endswith(SUFFIXES))


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    if folder.is_dir():
        with os.scandir(folder) as entries:
            yield from entries


# -- packed files ------------------------------------------------------------------------------------------------


def _packed(root: Path, name: str) -> Found:
    files = {split: root / f"{name}_{split}_jpeg.npz" for split in ("train", "val", "test")}
    present = {split: file for split, file in files.items() if file.is_file()}
    if len(present) < 2:
        raise missing(files["val"], f"it or {files['test'].name} beside {files['train'].name}")
    classes = read_class_names(files["train"])
    splits: dict[str, Items] = {}
    size = None
    for split, file in present.items():
        if read_class_names(file) != classes:
            raise ValueError(f"{file}: its class names are not those of {files['train'].name}")
        images, labels = read_jpeg_npz(file, size)
        size = images.shape[-1]
        if labels.min() < 0 or labels.max() >= len(classes):
            raise ValueError(f"{file}: labels run from {labels.min()} to {labels.max()}; {len(classes)} class names")
        splits[split] = Packed(torch.from_numpy(images), torch.from_numpy(labels.astype("int64")))
    return Found(classes, splits, (f"read from {', '.join(file.name for file in present.values())}",))
