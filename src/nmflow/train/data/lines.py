"""Text files: their lines, plain or .gz, and how the parts of a data set are told apart by the names of their files."""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator
from pathlib import Path

PARTS = {"train": r"train", "val": r"valid|val|dev", "test": r"test"}
"""A word (as a regular expression) in the name of a part's file."""


def lines_of(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file without their ends; only line feeds end one. Raises `ValueError` naming the file."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for line in io.TextIOWrapper(file, encoding="utf-8-sig", newline="\n"):
                yield line.rstrip("\r\n")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
