"""Models in files: saving them, and loading a compressed one, which checks all before it changes anything."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from nmflow.runtime.blocks import bad_offsets, finite_problems, named
from nmflow.runtime.container import (
    COMPRESSED,
    DENSE,
    Header,
    TensorFile,
    listed,
    open_file,
    tensors_of,
    write_file,
)
from nmflow.runtime.convert import ModelT, compress, is_compressed, put_in, refuse_unless_dense
from nmflow.runtime.format import CompressedNM
from nmflow.runtime.modules import PackedRows, PackedWeight
from nmflow.runtime.parts import StoredWeight, stored_weights
from nmflow.targets import Slot, candidates, record, recorded


def save_model(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Save an ordinary model with dense weights, and the slots it was finalized to in the metadata.

    Names are those of the state dict; of tied tensors the first name is stored and the others are listed. Raises
    `ValueError` where the model carries a sparsifier or is compressed, `OSError` where the disk refuses; the file
    that was there before is replaced only by a whole one.
    """
    refuse_unless_dense(model, "save_model")
    tensors, aliases = _untied(_state(model))
    write_file(path, tensors, Header(DENSE, recorded(model) or (), {}, aliases))


def save_compressed(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Save a compressed model; a finalized one is compressed on the way (see `nmflow.compress`).

    A weight is stored as `<label>.values` and `<label>.offsets` for every slot, dense rows of it as `<label>`, all
    else under its name in the state dict. Raises as `compress` and `save_model` do, and `ValueError` where a weight
    holds NaN or inf, as values too large for `half()` become: such a file would not be loaded.
    """
    model = model if is_compressed(model) else compress(model)
    tensors: dict[str, Tensor] = {}
    slots: list[Slot] = []
    dtypes: dict[str, str] = {}
    aliases: dict[str, str] = {}
    prefixes: list[str] = []
    problems: list[str] = []
    first: dict[int, str] = {}
    for path_of_module, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, PackedWeight):
            continue
        prefixes.append(f"{path_of_module}.")
        name = path_of_module.removesuffix("_nm")
        if id(module) in first:
            aliases[name] = first[id(module)]
            continue
        first[id(module)] = name
        slots += [replace(slot, name=name) for slot in module.stored.slots()]
        dtypes[name] = str(module.like.dtype).removeprefix("torch.")
        tensors.update(stored_tensors(name, module))
        problems += _not_finite(name, module)
    if problems:
        raise ValueError(listed(f"{path}: not saved, for it would not be loaded:", problems))
    state = _state(model)
    plain, more_aliases = _untied({k: v for k, v in state.items() if not k.startswith(tuple(prefixes))})
    write_file(path, {**tensors, **plain}, Header(COMPRESSED, tuple(slots), dtypes, {**aliases, **more_aliases}))


def load_compressed(path: str | os.PathLike[str], into: ModelT) -> ModelT:
    """Load a compressed file into a dense model of the same architecture, which becomes a compressed model in place.

    Everything is checked before anything is changed: names (with near misses), shapes, dtypes, ties, offsets, NaN.
    Returns `into`. Raises `ValueError` listing the problems, `FileNotFoundError`.
    """
    refuse_unless_dense(into, "load_compressed")
    with open_file(path) as file:
        if file.header is None or file.header.format != COMPRESSED:
            found = "a file without nmflow metadata" if file.header is None else "a dense model"
            way_out = "nmflow.runtime.compress_file makes one of it"
            raise ValueError(f"{file.path}: {found}, not a compressed model; {way_out}")
        state = _state(into)
        problems = file.size_problems() or _misfits(file, file.header, into, state)
        if problems:
            raise ValueError(listed(f"{file.path} does not fit:", problems))
        packed = {weight.name: _read_packed(file, weight, state[weight.name]) for weight in file.weights}
        plain = {name: file.read(name) for name in file.plain()}
    for name, weight in packed.items():
        problems += _content_problems(name, weight)
    if problems:
        raise ValueError(listed(f"{file.path} is damaged:", problems))
    with torch.no_grad():
        for name, tensor in plain.items():
            state[name].copy_(tensor)
    put_in(into, packed)
    record(into, file.header.slots)
    return into


# -- a model's tensors by name -----------------------------------------------------------------------------------


def _state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, with the parameters and buffers themselves. Raises where it holds anything but tensors."""
    state = model.state_dict(keep_vars=True)
    foreign = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if foreign:
        names = ", ".join(foreign)
        raise ValueError(f"the state dict holds more than tensors, which these files cannot keep: {names}")
    return dict(state)


def _untied(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors under their first names, {further name: first name})."""
    first: dict[int, str] = {}
    aliases = {}
    for name, tensor in state.items():
        if first.setdefault(id(tensor), name) != name:
            aliases[name] = first[id(tensor)]
    return {name: tensor for name, tensor in state.items() if name not in aliases}, aliases


def stored_tensors(name: str, packed: PackedWeight) -> dict[str, Tensor]:
    """The tensors of one compressed weight under the names that files give them."""
    [stored] = stored_weights(replace(slot, name=name) for slot in packed.stored.slots())
    held: list[Tensor] = []
    for part in packed.rows:
        held += [part.values, part.offsets] if isinstance(part, PackedRows) else [part.values]
    return dict(zip(tensors_of(stored, packed.like.dtype), held, strict=True))


# -- loading -----------------------------------------------------------------------------------------------------


def _misfits(file: TensorFile, header: Header, model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Where the file and the model differ."""
    own, aliases = _untied(state)
    shapes = {weight.name: weight.shape for weight in file.weights}
    dtypes: dict[str, torch.dtype | str] = {name: getattr(torch, header.dtypes[name]) for name in shapes}
    plain = set(file.plain())
    for name in plain:
        dtypes[name], shapes[name] = file.tensors[name]
    missing = [name for name in own if name not in shapes and name not in header.aliases]
    unexpected = [name for name in shapes if name not in own and name not in aliases]
    problems = [f"{name}: in the model, not in the file{_near(name, unexpected)}" for name in missing]
    problems += [f"{name}: in the file, not in the model{_near(name, missing)}" for name in unexpected]
    for name in sorted(aliases.keys() | header.aliases.keys()):
        mine, theirs = aliases.get(name), header.aliases.get(name) if name not in shapes else None
        if mine != theirs:
            problems.append(f"{name}: {_tie(mine)} in the model, {_tie(theirs)} in the file")
    for name in shapes:
        if name not in own:
            continue
        tensor = own[name]
        if tuple(tensor.shape) != shapes[name]:
            problems.append(f"{name}: shape {tuple(tensor.shape)} in the model, {shapes[name]} in the file")
        if tensor.dtype != dtypes[name]:
            problems.append(f"{name}: {tensor.dtype} in the model, {dtypes[name]} in the file; model.to() changes it")
        if name in plain and _shares_memory(tensor):
            problems.append(f"{name}: entries share memory in the model, as after expand(); clone() gives each its own")
        if tensor.is_meta:
            problems.append(f'{name}: the model holds no memory; model.to_empty(device="cpu") gives it some')
    layouts = {known.name: known.layout for known in candidates(model)}
    for weight in file.weights:
        if weight.name in own and layouts.get(weight.name) != weight.layout:
            problems.append(
                f"{weight.name}: {layouts.get(weight.name, 'no parameter')} in the model, {weight.layout} in the file"
            )
    return problems


def _shares_memory(tensor: Tensor) -> bool:
    """Whether entries of one tensor are one number in memory; torch refuses to write to such a tensor."""
    return any(size > 1 and step == 0 for size, step in zip(tensor.shape, tensor.stride(), strict=True))


def _near(name: str, others: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(others), n=1, cutoff=0.6)
    return f" (near: {near[0]})" if near else ""


def _tie(name: str | None) -> str:
    return f"tied to {name}" if name else "a tensor of its own"


def _read_packed(file: TensorFile, weight: StoredWeight, parameter: Tensor) -> PackedWeight:
    parts: list[CompressedNM | Tensor] = []
    for part in weight.parts:
        if part.pattern is None:
            parts.append(file.read(part.label))
        else:
            values, offsets = (file.read(f"{part.label}.{what}") for what in ("values", "offsets"))
            parts.append(CompressedNM(values, offsets, (part.stop - part.start, weight.axis), part.pattern))
    return PackedWeight(weight, parts, parameter.requires_grad).to(parameter.device)


def _not_finite(name: str, packed: PackedWeight) -> list[str]:
    [stored] = stored_weights(replace(slot, name=name) for slot in packed.stored.slots())
    parts = zip(stored.parts, packed.rows, strict=True)
    return [problem for part, rows in parts for problem in finite_problems(part.label, rows.values)]


def _content_problems(name: str, packed: PackedWeight) -> list[str]:
    problems = []
    for part, rows in zip(packed.stored.parts, packed.rows, strict=True):
        problems += finite_problems(part.label, rows.values)
        if isinstance(rows, PackedRows):
            num_broken, first = bad_offsets(rows.offsets, rows.values, rows.shape[1], rows.pattern, part.start)
            problems += [f"{part.label}: {named(num_broken, first)}"] if num_broken else []
    return problems
