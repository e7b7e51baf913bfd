"""What a model file holds: safetensors, with the key "nmflow" of its metadata saying which weights are N:M.

Never pickle. safetensors checks on opening that every tensor's dtype, shape and place agree with the size of the
file, so nothing a header declares makes us take memory that the file does not fill.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nmflow.atomic import replacing
from nmflow.runtime.format import offset_dtype_of, stored_sizes
from nmflow.runtime.parts import StoredWeight, stored_weights
from nmflow.targets import Candidate, Slot, candidates_of_names, slots_from_json, slots_to_json

COMPRESSED = "nmflow-compressed"
DENSE = "nmflow-dense"
FORMATS = (COMPRESSED, DENSE)
VERSION, VERSION_OF_GROUPS = 1, 2
"""A file is of the second version where any pattern lets V rows share their offsets (`1:8v64`), else of the first: what
reads the first alone refuses the one and goes on reading the other."""
CONVENTION = "N of every M consecutive weights are kept"
MODEL_FILE = "model.safetensors"
"""What a run folder calls its finished model."""

_KEY = "nmflow"
_DTYPES = {
    "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class Header:
    """The metadata under "nmflow"."""

    format: str
    slots: tuple[Slot, ...] = ()
    dtypes: Mapping[str, str] = field(default_factory=dict)
    """Name of a compressed weight -> dtype of the dense one, such as "float32"."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Every further name of a tied tensor -> the name under which it is stored."""

    def to_metadata(self) -> dict[str, str]:
        """As safetensors stores it. The inverse is `header_of`."""
        content = {
            "format": self.format,
            "format_version": _version_of(self.slots),
            "convention": CONVENTION,
            "slots": slots_to_json(self.slots),
            "dtypes": dict(self.dtypes),
            "aliases": dict(self.aliases),
        }
        # transformers opens files that say "pt". Only dense ones need it: safetensors writes two keys in random order,
        # one key gives equal models equal files.
        return {**({"format": "pt"} if self.format == DENSE else {}), _KEY: json.dumps(content)}


def header_of(metadata: Mapping[str, str] | None) -> Header | None:
    """Read what `to_metadata` wrote; None where a file says nothing of us. Raises `ValueError` on any other content."""
    text = (metadata or {}).get(_KEY)
    if text is None:
        return None
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f'its metadata under "{_KEY}" is not JSON: {error}') from error
    if not isinstance(content, dict):
        raise ValueError(f'its metadata under "{_KEY}" is not an object')
    version, kind = content.get("format_version"), content.get("format")
    if version not in (VERSION, VERSION_OF_GROUPS) or isinstance(version, bool):
        raise ValueError(f"it has format_version {version!r}; this nmflow reads {VERSION} and {VERSION_OF_GROUPS}")
    if kind not in FORMATS:
        raise ValueError(f"it has format {kind!r}; this nmflow reads {' and '.join(FORMATS)}")
    if content.get("convention") != CONVENTION:
        raise ValueError(f'its convention is {content.get("convention")!r}, not "{CONVENTION}"')
    names = {key: content.get(key) for key in ("dtypes", "aliases")}
    for key, mapping in names.items():
        if not isinstance(mapping, dict) or not all(isinstance(value, str) for value in mapping.values()):
            raise ValueError(f"its {key} are not an object of names: {str(mapping)[:80]}")
    dtypes, aliases = (cast("dict[str, str]", names[key]) for key in ("dtypes", "aliases"))
    slots = read_slots(content.get("slots"))
    if version != _version_of(slots):
        raise ValueError(f"it has format_version {version}, its patterns are those of {_version_of(slots)}")
    return Header(kind, slots, dtypes, aliases)


def _version_of(slots: Sequence[Slot]) -> int:
    return VERSION_OF_GROUPS if any(slot.pattern.v > 1 for slot in slots) else VERSION


def read_slots(data: object) -> tuple[Slot, ...]:
    """Slots from JSON of a file. Raises `ValueError` saying which one cannot be."""
    try:
        slots = slots_from_json(data)
    except TypeError as error:
        raise ValueError(str(error)) from error
    for slot in slots:
        if slot.layout == "columns" and len(slot.shape) != 2:
            raise ValueError(f"{slot.label}: shape {slot.shape} does not go with the layout columns, [in, out]")
    return slots


class TensorFile:
    """An open safetensors file: its header, and its tensors by name, each read when asked for."""

    def __init__(self, path: Path, handle: Any) -> None:
        self.path = path
        self._handle = handle
        self.header = header_of(handle.metadata())
        self.weights = stored_weights(self.header.slots) if self.header and self.header.format == COMPRESSED else ()
        self.tensors: dict[str, tuple[torch.dtype | str, tuple[int, ...]]] = {}
        for name in handle.keys():  # noqa: SIM118  not a mapping
            entry = handle.get_slice(name)
            dtype = entry.get_dtype()
            self.tensors[name] = _DTYPES.get(dtype, dtype), tuple(entry.get_shape())

    def read(self, name: str) -> Tensor:
        """A tensor in memory of its own, which outlives the file."""
        return cast(Tensor, self._handle.get_tensor(name)).clone()

    def size_problems(self) -> list[str]:
        """Where the tensors of a compressed file do not have the names, shapes and dtypes that its slots ask for."""
        problems: list[str] = []
        for weight in self.weights:
            dtype = getattr(torch, self.header.dtypes.get(weight.name, ""), None) if self.header else None
            if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
                problems.append(f"{weight.name}: the metadata names no floating dtype for it")
                continue
            try:
                wanted = tensors_of(weight, dtype)
            except ValueError as error:
                problems.append(f"{weight.name}: {error}")
                continue
            for name, (kind, shape) in wanted.items():
                if name not in self.tensors:
                    problems.append(f"{name}: missing")
                elif self.tensors[name] != (kind, shape):
                    found_kind, found = self.tensors[name]
                    problems.append(f"{name}: {found_kind} of shape {found}, its slot asks for {kind} of shape {shape}")
        return problems

    def plain(self) -> list[str]:
        """Names of the tensors that are no part of a compressed weight."""
        parts = {name for weight in self.weights for name in tensors_of(weight, torch.float32)}
        return [name for name in self.tensors if name not in parts]

    def candidates(self) -> list[Candidate]:
        """The weights of the file as rules see them, compressed ones by their dense shape."""
        layouts = {slot.name: slot.layout for slot in (self.header.slots if self.header else ())}
        shapes = {weight.name: weight.shape for weight in self.weights}
        for name in self.plain():
            dtype, shape = self.tensors[name]
            # A byte is too little for torch's comparisons, which looking for patterns takes.
            if isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1:
                shapes[name] = shape
        return [
            replace(known, layout=layouts.get(known.name, known.layout)) for known in candidates_of_names(shapes)
        ]


def tensors_of(weight: StoredWeight, dtype: torch.dtype) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Names, dtypes and shapes of the tensors that a weight is stored as: `<label>.values`, `<label>.offsets`.

    Dense rows beside compressed ones are stored under their label alone. Raises `ValueError` where M has no
    compressed form.
    """
    wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for part in weight.parts:
        rows = part.stop - part.start
        if part.pattern is None:
            wanted[part.label] = dtype, (rows, weight.axis)
        else:
            of_values, of_offsets = stored_sizes((rows, weight.axis), part.pattern)
            wanted[f"{part.label}.values"] = dtype, of_values
            wanted[f"{part.label}.offsets"] = offset_dtype_of(part.pattern), of_offsets
    return wanted


@contextlib.contextmanager
def open_file(path: str | os.PathLike[str]) -> Iterator[TensorFile]:
    """Open a safetensors file, or the `model.safetensors` of a run folder.

    Raises `FileNotFoundError`, and `ValueError` saying what was found instead: a pickle file, a truncated or foreign
    file, metadata of another version.
    """
    path = file_of(path)
    try:
        handle = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: {_what_it_is(path)} ({error})") from error
    with handle:
        try:
            file = TensorFile(path, handle)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        yield file


def file_of(path: str | os.PathLike[str]) -> Path:
    """The file itself, or a run folder's `model.safetensors`. Raises `FileNotFoundError` where there is none."""
    path = Path(path)
    if not path.is_dir():
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        return path
    model = path / MODEL_FILE
    if not model.is_file():
        way_out = ""
        if (path / "runs").is_dir():
            way_out = f"; a comparison has its models in {path / 'runs'}, a folder a run"
        elif (path / "config.yaml").is_file():
            way_out = f"; the run is not done, and goes on with: nmflow train resume={shlex.quote(str(path))}"
        raise FileNotFoundError(f"{model}: no such file{way_out}")
    return model


def write_file(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], header: Header) -> None:
    """Write tensors and header as one safetensors file, atomically. Raises `OSError` where the disk refuses."""
    ready: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        ready[name] = tensor.clone() if place in storages else tensor  # views of one storage are stored apart
        storages.add(place)
    with replacing(path) as temporary:
        try:
            save_file(ready, temporary, metadata=header.to_metadata())
        except SafetensorError as error:
            raise OSError(f"{path} could not be written: {error}") from error


def listed(what: str, problems: Sequence[str]) -> str:
    """A heading and the first dozen problems, the rest counted."""
    rest = len(problems) - 12
    return "\n".join([what, *problems[:12], *([f"and {rest} more"] if rest > 0 else [])])


def _what_it_is(path: Path) -> str:
    with path.open("rb") as stream:
        head = stream.read(16)
    if not head:
        return "an empty file"
    if head[:4] == b"PK\x03\x04":
        return "a zip archive, such as torch.save writes; it may hold pickled code and is not opened"
    if head[:1] == b"\x80" and head[1:2] in {b"\x02", b"\x03", b"\x04", b"\x05"}:
        return "a pickle file; it may hold code and is not opened"
    if head[8:9] == b"{":
        return "a safetensors file that is cut short or inconsistent"
    return "not a safetensors file"
