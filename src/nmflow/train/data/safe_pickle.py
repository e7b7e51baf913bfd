"""The one pickle that is read here: CIFAR-10's own files. Arrays and plain containers pass, nothing else.

A pickle is a program. This reader gives it two functions to call, of which neither can do more than make a
small array; whatever else it names is refused by that name, and nothing of it is imported.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any

import numpy as np

MAX_BYTES = 1 << 28


def read_array_pickle(path: Path) -> Any:
    """Lists, dicts, numbers, text and numpy arrays of a pickle file. Raises `ValueError` on anything else."""
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: {path.stat().st_size:,} bytes; expected at most {MAX_BYTES:,}")
    content = path.read_bytes()
    try:
        _check_sizes(content)
        return _ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()
    except _RefusedError as error:
        raise ValueError(f"{path}: {error}") from None
    except Exception as error:  # a broken pickle may fail with any exception there is
        raise ValueError(f"{path}: no readable pickle of arrays: {error!r}") from error


class _RefusedError(Exception):
    pass


class _Ndarray:
    """Stands for numpy.ndarray in a pickle, and cannot be called."""


def _empty_array(kind: object, shape: object, dtype: object) -> np.ndarray:
    """numpy's `_reconstruct`, for the only arguments that numpy itself writes; the content comes later."""
    if kind is not _Ndarray or shape != (0,):
        raise _RefusedError("an array that numpy would not have written")
    return np.empty(0, dtype=np.uint8)


def _number_dtype(name: object, align: object = False, copy: object = False) -> np.dtype[Any]:
    if not isinstance(name, str) or len(name) > 3 or name[:1] not in "biuf":
        raise _RefusedError(f"an array of {name!r}; only numbers are read")
    return np.dtype(name)


_ALLOWED = {
    ("numpy", "ndarray"): _Ndarray,
    ("numpy", "dtype"): _number_dtype,
    ("numpy.core.multiarray", "_reconstruct"): _empty_array,
    ("numpy._core.multiarray", "_reconstruct"): _empty_array,
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise _RefusedError(f"it asks for {module}.{name}; only numpy arrays and plain containers pass")
        return _ALLOWED[module, name]


def _check_sizes(content: bytes) -> None:
    """Walk the opcodes without obeying them: a length or a memo slot beyond the file would take memory."""
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name == "LONG_BINPUT" and isinstance(argument, int) and argument > len(content):
            raise _RefusedError(f"memo slot {argument} in a file of {len(content)} bytes")
