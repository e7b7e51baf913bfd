"""Small JPEG images in one .npz: a header that all share, the rest of each, and where each begins."""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.lib import format as npy

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_BYTES = 1 << 30
"""The largest content that is read, by its declared size."""

_KEYS: dict[str, type] = {"header": np.uint8, "data": np.uint8, "offsets": np.integer, "labels": np.integer}
_NAMES: dict[str, type] = {"class_names": np.str_}


def read_jpeg_npz(path: Path, size: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Bytes [n, 3, size, size] and labels [n]; image i is the JPEG header + data[offsets[i]:offsets[i+1]].

    `size` None: that of the first image. Sizes and offsets are checked before anything large is read; pickled arrays
    are refused. Raises `ValueError` with the file, and where one image is at fault its number.
    """
    arrays = _arrays(path, _KEYS)
    header, content = arrays["header"].tobytes(), arrays["data"].tobytes()
    offsets = arrays["offsets"].astype(np.int64)
    problem = _offset_problem(offsets, len(content), len(arrays["labels"]))
    if not problem:
        size = size or _size_of(header + content[: offsets[1]], f"{path}: image 0")
        if len(arrays["labels"]) * 3 * size * size > MAX_BYTES:
            problem = f"{len(arrays['labels']):,} images of {size}x{size} take more than {MAX_BYTES:,} bytes"
    if problem or size is None:
        raise ValueError(f"{path}: {problem}")
    images = np.empty((len(offsets) - 1, 3, size, size), dtype=np.uint8)
    for number, (start, stop) in enumerate(pairwise(offsets)):
        images[number] = _decode(header + content[start:stop], size, f"{path}: image {number}")
    return images, arrays["labels"]


def read_class_names(path: Path) -> tuple[str, ...]:
    """What the labels 0, 1, ... of such a file stand for. Raises `ValueError` as `read_jpeg_npz` does."""
    return tuple(_arrays(path, _NAMES)["class_names"].tolist())


def _arrays(path: Path, keys: dict[str, type]) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(path) as archive:
            for key, kind in keys.items():
                _check_member(archive, key, kind, path)
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] for key in keys}
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError) as error:
        raise ValueError(f"{path}: no readable .npz file: {error}") from error


def _check_member(archive: zipfile.ZipFile, key: str, kind: type, path: Path) -> None:
    """A declared shape is believed only where the archive holds as many bytes."""
    try:
        info = archive.getinfo(f"{key}.npy")
    except KeyError:
        raise ValueError(f'{path}: no array "{key}"; expected {", ".join((*_KEYS, *_NAMES))}') from None
    with archive.open(info) as member:
        try:
            version = npy.read_magic(member)
            read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, _, dtype = read_header(member)
        except ValueError as error:
            raise ValueError(f'{path}: "{key}" is no numpy array: {error}') from error
        held = info.file_size - member.tell()
    if not np.issubdtype(dtype, kind) or len(shape) != 1:
        raise ValueError(f'{path}: "{key}" is {dtype} {list(shape)}, expected a vector of {kind.__name__}')
    if math.prod(shape) * dtype.itemsize != held or held > MAX_BYTES:
        raise ValueError(f'{path}: "{key}" declares {list(shape)} of {dtype} but holds {held:,} bytes')


def _offset_problem(offsets: np.ndarray, num_bytes: int, num_labels: int) -> str | None:
    if len(offsets) != num_labels + 1:
        return f"{len(offsets)} offsets for {num_labels} labels; expected one more offset than labels"
    if not num_labels:
        return "no images"
    if offsets[0] != 0 or offsets[-1] != num_bytes:
        return f"offsets run from {offsets[0]} to {offsets[-1]}; expected 0 to {num_bytes}"
    falling = np.flatnonzero(np.diff(offsets) < 0)
    return f"offset {falling[0] + 1} lies before the one before it" if len(falling) else None


def _size_of(content: bytes, what: str) -> int:
    with _opened(content, what) as image:
        if image.width != image.height:
            raise ValueError(f"{what}: {image.width}x{image.height} is not square")
        return int(image.width)


def _decode(content: bytes, size: int, what: str) -> np.ndarray:
    with _opened(content, what) as image:
        if image.size != (size, size) or image.mode != "RGB":
            found = f"{image.mode} {image.size[0]}x{image.size[1]}"
            raise ValueError(f"{what}: {found}, expected RGB {size}x{size}")
        pixels: np.ndarray = np.asarray(image).transpose(2, 0, 1)
        return pixels


@contextmanager
def _opened(content: bytes, what: str) -> Iterator[Image]:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content), formats=["JPEG"]) as image:
            yield image
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{what}: no readable JPEG: {error}") from error
