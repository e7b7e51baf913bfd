"""How a sparsifier's state lies beside a checkpoint that somebody else writes: one safetensors file, never a pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nmflow.atomic import replacing

FORMAT = "nmflow-sparsity"
VERSION = 1


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write what `Sparsifier.state_dict` gave, whole or not at all: masks as `mask/SLOT`, the rest as JSON metadata.

    Raises `OSError` where the disk is full or the folder gone.
    """
    rest = {key: value for key, value in state.items() if key != "masks"}
    masks = {f"mask/{label}": bits.detach().cpu().contiguous() for label, bits in state["masks"].items()}
    meta = {"format": FORMAT, "version": VERSION, "sparsifier": rest}
    with replacing(path) as partial:
        try:
            save_file(masks, partial, metadata={"nmflow": json.dumps(meta)})
        except SafetensorError as error:
            raise OSError(f"{path}: the state of the sparsifier could not be written: {error}") from error


def read_state(path: Path) -> dict[str, Any]:
    """What `Sparsifier.load_state_dict` takes. Raises `FileNotFoundError`, and `ValueError` for any other file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no state of a sparsifier here")
    try:
        with safe_open(path, framework="pt") as file:
            written = (file.metadata() or {}).get("nmflow")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
        meta = json.loads(written or "null")
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no state of a sparsifier, or one that was cut short: {error}") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT or not isinstance(meta.get("sparsifier"), dict):
        raise ValueError(f"{path}: a safetensors file, but not the state of a sparsifier")
    if meta.get("version") != VERSION:
        raise ValueError(f"{path}: version {meta.get('version')!r} of the state; this nmflow reads version {VERSION}")
    masks = {name.removeprefix("mask/"): bits for name, bits in tensors.items()}
    return {**meta["sparsifier"], "masks": masks}
