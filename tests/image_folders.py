"""Small stand-ins for image data, laid out as the official ones are: ImageNet-1K, Tiny ImageNet, packed JPEGs."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

WNIDS = ("n02124075", "n01443537", "n04067472", "n07734744", "n02906734", "n04540053", "n02231487")
"""Seven of Tiny ImageNet's classes, as unsorted as in its wnids.txt."""


def photograph(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """Smooth random colours: what a crop and a change of size leave recognisable."""
    coarse = rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def write_imagenet(root: Path, classes: int = 3, train: int = 12, val: int = 4) -> Path:
    """train/WNID/WNID_n.JPEG and val/WNID/ILSVRC2012_val_n.JPEG; every image has a size of its own."""
    rng = np.random.default_rng(0)
    number = 0
    for split, count in (("train", train), ("val", val)):
        for wnid in WNIDS[:classes]:
            (root / split / wnid).mkdir(parents=True)
            for place in range(count):
                number += 1
                name = f"{wnid}_{place}.JPEG" if split == "train" else f"ILSVRC2012_val_{number:08}.JPEG"
                height, width = rng.integers(40, 90, 2).tolist()
                photograph(rng, height, width).save(root / split / wnid / name, "JPEG")
    return root


def write_tiny_imagenet(root: Path, classes: int = 7, train: int = 10, val: int = 3, size: int = 64) -> Path:
    """train/WNID/images/, val/images/ with val_annotations.txt, and test/images/ that nobody has labels of."""
    rng = np.random.default_rng(0)
    for wnid in WNIDS[:classes]:
        (root / "train" / wnid / "images").mkdir(parents=True)
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t9\t9\n")
        for number in range(train):
            name = root / "train" / wnid / "images" / f"{wnid}_{number}.JPEG"
            photograph(rng, size, size).save(name, "JPEG")
    for split, count in (("val", val * classes), ("test", 2)):
        (root / split / "images").mkdir(parents=True)
        for number in range(count):
            photograph(rng, size, size).save(root / split / "images" / f"{split}_{number}.JPEG", "JPEG")
    lines = [f"val_{number}.JPEG\t{WNIDS[number % classes]}\t0\t0\t9\t9\n" for number in range(val * classes)]
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    (root / "wnids.txt").write_text("".join(f"{wnid}\n" for wnid in WNIDS[:classes]))
    return root


def jpeg(image: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=75, **options)
    return buffer.getvalue()


def jpeg_arrays(
    num: int = 20, seed: int = 0, size: int = 32, classes: int = 2
) -> tuple[dict[str, np.ndarray], list[bytes]]:
    """The arrays of JPEGs packed with one header, classes in turn; and the files that they came from."""
    images = np.random.default_rng(seed).integers(0, 256, (num, size, size, 3), dtype=np.uint8)
    files = [jpeg(image) for image in images]
    shared = next(i for i, bytes_at in enumerate(zip(*files, strict=False)) if len(set(bytes_at)) > 1)
    header = files[0][:shared]
    offsets = np.cumsum([0, *(len(file) - len(header) for file in files)]).astype(np.uint32)
    arrays = {
        "header": np.frombuffer(header, np.uint8),
        "data": np.frombuffer(b"".join(file[len(header) :] for file in files), np.uint8),
        "offsets": offsets,
        "labels": (np.arange(num) % classes).astype(np.uint8),
        "class_names": np.array([f"class {number}" for number in range(classes)]),
    }
    return arrays, files


def write_packed(root: Path, name: str, splits: dict[str, int], **options: int) -> Path:
    """NAME_SPLIT_jpeg.npz with so many images each."""
    root.mkdir(parents=True, exist_ok=True)
    for seed, (split, num) in enumerate(splits.items()):
        np.savez(root / f"{name}_{split}_jpeg.npz", **jpeg_arrays(num, seed, **options)[0])
    return root


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares a size and has no pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
