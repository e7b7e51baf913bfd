"""Text files: their lines, plain or .gz, and how the parts of a data set are told apart by the names of their files."""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator
from pathlib import Path

PARTS = {"train": r"train", "val": r"valid|val|dev", "test": r"test"}
"""A word (as a regular expression) in the name of a part's file."""

LONGEST = 1 << 20
"""Characters of a line; a small .gz may hold one that fills the memory."""


def lines_of(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file without their ends; only line feeds end one. Raises `ValueError` naming the file.

    A line of more than `LONGEST` characters is refused by its number.
    """
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="\n")
            number = 0
            while line := text.readline(LONGEST + 1):
                number += 1
                if len(line) > LONGEST:
                    raise ValueError(f"{path}: line {number} has more than {LONGEST:,} characters")
                yield line.rstrip("\r\n")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
