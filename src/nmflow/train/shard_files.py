"""Tensors that several processes share, as a folder of safetensors files: each process writes what it holds.

Written and read by torch.distributed.checkpoint in its safetensors form, never the pickled one. Whoever reads may be
another number of processes: each reads what it holds now.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def write_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors into an empty folder; what is not spread, the first process writes. Collective.

    Raises `OSError` where a process cannot write.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    state = {name: tensor.detach() for name, tensor in tensors.items()}
    try:
        save(state, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True), no_dist=not _several())
    except CheckpointException as error:
        raise OSError(f"{folder}: the checkpoint could not be written: {_first(error)}") from error


def file_sizes(folder: Path) -> dict[str, int]:
    """Name -> bytes of every file of a folder that `write_shards` filled."""
    return {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}


def shard_problems(folder: Path, sizes: Mapping[str, Any]) -> list[str]:
    """What is missing of a folder whose files had these sizes, or is not as long as it was."""
    found = file_sizes(folder)
    problems = [f"{folder / name}: missing" for name in sizes if name not in found]
    return problems + [
        f"{folder / name}: {found[name]} bytes, written with {size}"
        for name, size in sizes.items()
        if name in found and found[name] != size
    ]


def described(folder: Path) -> dict[str, Tensor]:
    """Name -> a tensor without storage of the shape and dtype that lie in the folder; reads the headers alone."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {
        name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        for name, entry in found.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def read_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors, spread or whole, with those of their names in the folder. Collective."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    state = {name: tensor.detach() for name, tensor in tensors.items()}
    try:
        load(state, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=not _several())
    except CheckpointException as error:
        raise ValueError(f"{folder}: the checkpoint could not be read: {_first(error)}") from error


def remove_others(folder: Path, keep: str) -> None:
    """Delete every checkpoint of a folder but one: older ones, and what a killed process left behind."""
    for path in folder.iterdir():
        if path.is_dir() and path.name != keep:
            shutil.rmtree(path, ignore_errors=True)


def _several() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _first(error: Any) -> str:
    """What the first of the processes that failed said."""
    return next((str(failure[0]) for failure in error.failures.values()), str(error))
