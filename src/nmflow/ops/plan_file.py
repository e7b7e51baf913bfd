"""The file that keeps measured choices between runs: JSON, a format's name and version, and rows of plain numbers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

from nmflow.atomic import replacing


def text_of(rows: Iterable[Mapping[str, Any]], kind: str, version: int) -> str:
    """Choices of one kind of plan as text."""
    return json.dumps({"format": kind, "version": version, "choices": list(rows)}, indent=1)


def kind_of(text: str) -> str:
    """Which kind of plan a text is. Raises `ValueError` where it is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    kind = found.get("format") if isinstance(found, dict) else None
    if not isinstance(kind, str) or not kind.endswith("-plan"):
        raise ValueError("this is no plan; nmflow.tune(..., plan=PATH) writes one")
    return kind


def rows_of(text: str, kind: str, version: int) -> list[Any]:
    """The rows of `text_of`. Raises `ValueError` where the text is no plan of this kind and version."""
    if kind_of(text) != kind:
        raise ValueError(f"this is no plan of the kind {kind}; nmflow.tune(..., plan=PATH) writes one")
    found = json.loads(text)
    if found.get("version") != version:
        other = found.get("version")
        raise ValueError(f"plan of the kind {kind}: version {other!r}, this nmflow reads {version}; tune again")
    rows = found.get("choices", [])
    if not isinstance(rows, list):
        raise ValueError(f"plan of the kind {kind}: its choices are no list")
    return rows


def write(path: str | os.PathLike[str], text: str) -> None:
    """Write a plan, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
