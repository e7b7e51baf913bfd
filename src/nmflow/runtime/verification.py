"""Is it N:M, and if not, where: every block of a model's or a file's weights is looked at."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nmflow.layout import to_rows
from nmflow.ops.reference import columns
from nmflow.runtime.blocks import (
    SHOWN,
    BrokenBlock,
    bad_offsets,
    finite_problems,
    named,
    num_blocks_of,
    too_full,
    too_full_block,
)
from nmflow.runtime.compress_files import slots_of_file
from nmflow.runtime.container import COMPRESSED, TensorFile, listed, open_file
from nmflow.runtime.convert import decompress, is_compressed
from nmflow.runtime.parts import Part, StoredWeight
from nmflow.shards import refuse_spread
from nmflow.targets import Slot, Targets, recorded, resolve


@dataclass(frozen=True)
class LayerCheck:
    """The blocks of one slot: how many there are, how many break the pattern, and the first few of those."""

    label: str
    pattern: str
    blocks: int
    broken: int
    first: tuple[BrokenBlock, ...] = ()


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found, a layer for every slot."""

    layers: tuple[LayerCheck, ...]

    @property
    def ok(self) -> bool:
        """True if no block breaks its pattern."""
        return not any(layer.broken for layer in self.layers)

    def lines(self) -> list[str]:
        """For people: one line for each broken layer, then the verdict."""
        broken = [layer for layer in self.layers if layer.broken]
        lines = [
            f"{layer.label}: not {layer.pattern} in {layer.broken} of {layer.blocks} blocks: "
            f"{named(layer.broken, layer.first)}"
            for layer in broken
        ]
        total = len(self.layers)
        if broken:
            return [*lines, f"not verified: {len(broken)} of {total} layers break their pattern"]
        return [f"verified: {total} of {total} layers are N:M"]

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {"ok": self.ok, **asdict(self)}


def verify(subject: nn.Module | str | os.PathLike[str], targets: Targets | None = None) -> VerifyReport:
    """Check that every block of M weights has at most N non-zeros. Nearly zero is not zero.

    Where V rows share their columns, a block is V x M weights and at most N of its columns are not zero throughout.

    A model is read as its forward reads it: under a live `Sparsifier` W~ is checked, in a compressed model the
    unpacked weight. A path is a safetensors file, dense or compressed, or a run folder with a `model.safetensors`.
    In a compressed file offsets that do not rise or leave their block are broken blocks.

    The patterns are those of `targets` (see `nmflow.targets.resolve`; a last block of r < M entries may keep
    min(N, r)), else those that `finalize` recorded in the model or the file, else those of a `targets.json` beside
    the file. Raises `ValueError` where there are none, where a weight holds NaN or inf (named), and on a file that is
    foreign, cut short or inconsistent; `FileNotFoundError`.
    """
    checks = _check_model(subject, targets) if isinstance(subject, nn.Module) else _check_file(subject, targets)
    return VerifyReport(tuple(checks))


# -- models ------------------------------------------------------------------------------------------------------


def _check_model(model: nn.Module, targets: Targets | None) -> list[LayerCheck]:
    refuse_spread(model, "verify")
    if targets is not None:
        slots = resolve(decompress(model) if is_compressed(model) else model, targets, "partial").slots
    else:
        slots = recorded(model) or ()
    return _check_slots(slots, lambda name: _read_as_forward_does(model, name), "the model")


@torch.no_grad()
def _read_as_forward_does(model: nn.Module, name: str) -> Tensor | None:
    path, _, local = name.rpartition(".")
    try:
        weight = getattr(model.get_submodule(path), local)
    except AttributeError:
        return None
    return weight.detach() if isinstance(weight, Tensor) else None


def _check_slots(slots: tuple[Slot, ...], read: Callable[[str], Tensor | None], where: str) -> list[LayerCheck]:
    """Check dense weights. All weights that cannot be checked are named together."""
    checks: list[LayerCheck] = []
    problems: list[str] = []
    if not slots:
        raise ValueError(
            f'{where} says nothing of patterns; give targets, such as {{"ff": "1:16"}}, on the command line --targets '
            "ff=1:16"
        )
    for slot in slots:
        weight = read(slot.name)
        if weight is None:
            problems.append(f"{slot.name}: missing")
        elif tuple(weight.shape) != slot.shape:
            problems.append(f"{slot.name}: shape {tuple(weight.shape)}, its slot says {slot.shape}")
        elif found := finite_problems(slot.name, weight):
            problems += found
        else:
            start, stop = slot.row_range
            rows_RK = to_rows(weight, slot.layout)[start:stop]
            num_broken, first = too_full(rows_RK, slot.pattern, start)
            num_blocks = num_blocks_of(stop - start, slot.axis, slot.pattern)
            checks.append(LayerCheck(slot.label, str(slot.pattern), num_blocks, num_broken, first))
    if problems:
        raise ValueError(listed(f"{where} cannot be verified:", list(dict.fromkeys(problems))))
    return checks


# -- files -------------------------------------------------------------------------------------------------------


def _check_file(path: str | os.PathLike[str], targets: Targets | None) -> list[LayerCheck]:
    with open_file(path) as file:
        slots = slots_of_file(file, targets)
        if file.header is None or file.header.format != COMPRESSED:
            return _check_slots(slots, lambda n: file.read(n) if n in file.tensors else None, str(file.path))
        problems = file.size_problems()
        for weight in file.weights if not problems else ():
            for part in weight.parts:
                name = part.label if part.pattern is None else f"{part.label}.values"
                problems += finite_problems(part.label, file.read(name))
        if problems:
            raise ValueError(listed(f"{file.path} cannot be verified:", problems))
        stored = [_check_stored(file, weight, part) for weight in file.weights for part in weight.parts if part.pattern]
        if targets is None and stored:
            return stored
        by_name = {weight.name: weight for weight in file.weights}
        dense = tuple(slot for slot in slots if slot.name not in by_name)
        asked = [_check_asked(file, by_name[slot.name], slot) for slot in slots if slot.name in by_name]
        asked += _check_slots(dense, file.read, str(file.path)) if dense or not asked else []
        return [check for check in stored if check.broken] + asked


def _check_stored(file: TensorFile, weight: StoredWeight, part: Part) -> LayerCheck:
    """A compressed part against its own pattern: its blocks have no room for more than N values, so offsets decide."""
    assert part.pattern is not None
    values, offsets = file.read(f"{part.label}.values"), file.read(f"{part.label}.offsets")
    num_broken, first = bad_offsets(offsets, values, weight.axis, part.pattern, part.start)
    blocks = num_blocks_of(part.stop - part.start, weight.axis, part.pattern)
    return LayerCheck(part.label, str(part.pattern), blocks, num_broken, first)


def _check_asked(file: TensorFile, weight: StoredWeight, slot: Slot) -> LayerCheck:
    """A compressed weight against a pattern that may be another than its own; never unpacked.

    A hostile file could make a dense weight tens of thousands of times larger than itself.
    """
    start, stop = slot.row_range
    pattern, axis = slot.pattern, weight.axis
    used = []
    for row, column in _nonzeros(file, weight):
        mine = (row >= start) & (row < stop)
        used.append((row[mine] - start) // pattern.v * axis + column[mine])
    used_once = torch.unique(torch.cat(used))  # a column counts once, however many rows of its group have it
    blocks_of_row = num_blocks_of(1, axis, pattern)
    in_block = used_once // axis * blocks_of_row + used_once % axis // pattern.m
    block, count = torch.unique_consecutive(in_block, return_counts=True)
    full = count > pattern.n
    first = tuple(
        too_full_block(b // blocks_of_row, b % blocks_of_row, c, pattern, stop - start, start)
        for b, c in zip(block[full][:SHOWN].tolist(), count[full][:SHOWN].tolist(), strict=True)
    )
    num_blocks = num_blocks_of(stop - start, axis, pattern)
    return LayerCheck(slot.label, str(pattern), num_blocks, int(full.sum()), first)


def _nonzeros(file: TensorFile, weight: StoredWeight) -> Iterator[tuple[Tensor, Tensor]]:
    """(row, column) of the non-zero entries, part by part."""
    for part in weight.parts:
        if part.pattern is None:
            row, column = file.read(part.label).nonzero(as_tuple=True)
        else:
            row, slot_of = file.read(f"{part.label}.values").nonzero(as_tuple=True)
            column_HS = columns(file.read(f"{part.label}.offsets"), part.pattern.n, part.pattern.m)
            column = column_HS[row // part.pattern.v, slot_of]
        yield row + part.start, column
