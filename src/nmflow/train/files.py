"""How a run writes: whole files or none, and a log that is cut back before it goes on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from nmflow.atomic import replacing


def check_new(path: Path, command: str) -> None:
    """Raise `FileExistsError` where something stands at `path`; `command` is the verb that would go on with it."""
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path}: a file stands here; name a folder for the run (out=...)")
    if path.is_dir() and any(path.iterdir()):
        raise FileExistsError(
            f"{path}: the folder is not empty; go on with what is in it (nmflow {command} resume={path}), or name "
            "another one (out=...)"
        )


def remove_leftovers(path: Path) -> None:
    """Delete what a process that was killed while writing has left behind in a folder: our own and safetensors'."""
    for pattern in (".*.part", ".tmp*"):
        for leftover in path.glob(pattern):
            leftover.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write plain data as JSON, whole or not at all. Raises `ValueError` for NaN and infinity, which JSON lacks."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


class MetricsLog:
    """Appends lines to a file that is cut back to `length` bytes first, so that no line ever stands there twice.

    Raises `ValueError`, before it cuts, where the file is shorter than that.
    """

    def __init__(self, path: Path, length: int = 0) -> None:
        found = path.stat().st_size if path.exists() else 0
        if found < length:
            raise ValueError(
                f"{path}: {found} bytes, and the checkpoint was written at {length}; bring the file back, or train "
                "anew in another folder"
            )
        self._file = path.open("ab")
        self._file.truncate(length)

    def write(self, line: dict[str, Any]) -> None:
        """Append one line of JSON."""
        self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def sync(self) -> int:
        """Bring the lines to disk; returns the length in bytes, for the checkpoint to record."""
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        """Close the file."""
        self._file.close()
