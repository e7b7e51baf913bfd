"""From a dense file to a compressed one without its model, and which slots hold for a file."""

from __future__ import annotations

import json
import os
from pathlib import Path

from torch import Tensor

from nmflow.layout import to_rows
from nmflow.runtime.container import COMPRESSED, Header, TensorFile, listed, open_file, read_slots, write_file
from nmflow.runtime.convert import pack_parts, weight_problems
from nmflow.runtime.files import stored_tensors
from nmflow.runtime.found import found_slots
from nmflow.runtime.modules import PackedWeight
from nmflow.runtime.parts import stored_weights
from nmflow.runtime.report import CompressionReport, LayerReport
from nmflow.targets import Slot, Targets, resolve

TARGETS_FILE = "targets.json"
"""The slots of a run, beside its model: they count where the metadata was lost on the way."""


def compress_file(
    source: str | os.PathLike[str], destination: str | os.PathLike[str], targets: Targets | None = None
) -> CompressionReport:
    """Compress a dense safetensors file (or a run folder's) without building its model; bytes are those of the files.

    The slots are those of `targets`, else of the file's metadata, else of a `targets.json` beside it, else the
    tightest patterns found. From names alone a two-dimensional weight counts as [out, in].

    Raises `ValueError` listing all problems (as `nmflow.compress`) and where no weight is N:M, `FileExistsError` where
    `destination` is the source or anything but an earlier compressed file, `FileNotFoundError`, `OSError`.
    """
    with open_file(source) as file:
        if file.header is not None and file.header.format == COMPRESSED:
            raise ValueError(f"{file.path} is compressed already")
        _check_destination(file.path, Path(destination))
        slots = slots_of_file(file, targets) or found_slots(file.candidates(), file.read)
        if not slots:
            raise ValueError(
                f"{file.path}: no weight in it is N:M, so there is nothing to compress; make it so by nmflow train"
            )
        weights = stored_weights(slots)
        tensors: dict[str, Tensor] = {}
        dtypes: dict[str, str] = {}
        layers: list[LayerReport] = []
        problems: list[str] = []
        for stored in weights:
            known = {stored.name: file.read(stored.name)} if stored.name in file.tensors else {}
            found = weight_problems(stored, known)
            problems += found
            if found:
                continue
            weight = known[stored.name]
            packed = PackedWeight(stored, pack_parts(stored, to_rows(weight, stored.layout)))
            tensors.update(stored_tensors(stored.name, packed))
            dtypes[stored.name] = str(weight.dtype).removeprefix("torch.")
            layers.append(LayerReport(stored.name, packed.patterns(), weight.nbytes, packed.nbytes, "in a file"))
        if problems:
            raise ValueError(listed(f"{file.path} cannot be compressed:", problems))
        for name in file.plain():
            if name not in dtypes:
                tensors[name] = file.read(name)
        aliases = file.header.aliases if file.header else {}
        header = Header(COMPRESSED, tuple(slot for weight in weights for slot in weight.slots()), dtypes, aliases)
        before = file.path.stat().st_size
    write_file(destination, tensors, header)
    return CompressionReport(tuple(layers), before, os.stat(destination).st_size)


def _check_destination(source: Path, destination: Path) -> None:
    """Nothing but what was compressed before gives way to a compressed file; a folder is refused on writing."""
    if not destination.exists() or destination.is_dir():
        return
    if destination.samefile(source):
        raise FileExistsError(f"{destination}: that is the file that is read; name another file for the compressed one")
    try:
        with open_file(destination) as file:
            is_ours = file.header is not None and file.header.format == COMPRESSED
    except (ValueError, OSError):
        is_ours = False
    if not is_ours:
        raise FileExistsError(
            f"{destination}: exists and is no compressed file of nmflow, so it is not replaced; name another file, or "
            "remove it"
        )


def slots_of_file(file: TensorFile, targets: Targets | None) -> tuple[Slot, ...]:
    """The slots that hold for a file: those of `targets`, of its metadata, or of a `targets.json` beside it."""
    if targets is not None:
        return resolve(file.candidates(), targets, "partial").slots
    if file.header is not None and file.header.slots:
        return file.header.slots
    beside = file.path.with_name(TARGETS_FILE)
    if not beside.is_file():
        return ()
    try:
        return read_slots(json.loads(beside.read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{beside}: {error}") from error
