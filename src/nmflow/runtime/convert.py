"""From a trained model to a compressed one and back: which weights are packed, checked before anything is changed."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nmflow.attach import attached_weights
from nmflow.layout import to_rows
from nmflow.runtime.blocks import finite_problems, named, too_full
from nmflow.runtime.format import LARGEST_M, CompressedNM
from nmflow.runtime.found import found_slots
from nmflow.runtime.fuse import unfuse
from nmflow.runtime.inference import unstream
from nmflow.runtime.modules import PackedWeight, is_stored, packed_weights, restore, store
from nmflow.runtime.parts import StoredWeight, stored_weights
from nmflow.shards import refuse_spread
from nmflow.targets import Slot, Targets, candidates, record, recorded, resolve

ModelT = TypeVar("ModelT", bound=nn.Module)

_SETTINGS = "_nm_settings"
# A fused path takes the dense weights of the whole layer at once, and nested tensors exist for that path alone. With
# these values torch calls the modules one by one, in eval as in training, so that the runtime layers are used.
_UNFUSED: dict[type[nn.Module], dict[str, Any]] = {
    nn.TransformerEncoderLayer: {"activation_relu_or_gelu": 0},
    nn.TransformerEncoder: {"use_nested_tensor": False},
}


def compress(model: ModelT, targets: Targets | None = None) -> ModelT:
    """A new model whose N:M weights are stored compressed and multiplied by runtime layers; `model` is untouched.

    Without `targets`: the slots that `Sparsifier.finalize` recorded, else the tightest pattern found in each
    candidate weight (M over the divisors of its axis up to 256; a weight that would not become smaller stays dense).
    With `targets` (see `nmflow.targets.resolve`): those, a last block of r < M entries keeping min(N, r). Tied
    weights stay tied and are stored once. `compression_report(result)` lists what was won.

    `nn.TransformerEncoderLayer` takes its ordinary path in eval mode, which calls the runtime layers; the fused one
    would need all of its weights dense.

    Raises one `ValueError` listing all problems: a weight that breaks its pattern (with row and block), NaN or inf in
    a weight, a slot that does not fit the model; and where the model carries a `Sparsifier` or is compressed already.
    """
    refuse_unless_dense(model, "compress")
    weights = stored_weights(slots := _slots(model, targets))
    by_name = {name: parameter.detach() for name, parameter in model.named_parameters(remove_duplicate=False)}
    problems = [problem for stored in weights for problem in weight_problems(stored, by_name)]
    if problems:
        raise ValueError("\n".join(problems))
    packed = {stored.name: pack(stored, model.get_parameter(stored.name)) for stored in weights}
    # The dense weights themselves are not copied: the memo hands the copy the originals, which it then lets go.
    memo: dict[int, Any] = {id(model.get_parameter(name)): model.get_parameter(name) for name in packed}
    result = copy.deepcopy(model, memo)
    put_in(result, packed)
    record(result, slots)
    return result


def decompress(model: ModelT) -> ModelT:
    """The inverse of `compress`: a new model of ordinary layers with dense weights; `model` is untouched.

    Classes, the order of parameters, `requires_grad`, ties and the recorded slots are those of the model that was
    compressed. The weights are its weights bit for bit (where it held -0 they hold +0).
    """
    result = copy.deepcopy(model)
    dense: dict[int, nn.Parameter] = {}
    for module in list(result.modules()):
        for packed in packed_weights(module).values():
            if id(packed) not in dense:
                dense[id(packed)] = nn.Parameter(packed.unpack(), requires_grad=packed.requires_grad)
        unfuse(module)
        unstream(module)
        if is_stored(module):
            restore(module, dense)
        module.__dict__.update(module.__dict__.pop(_SETTINGS, {}))
    return result


def refuse_unless_dense(model: nn.Module, verb: str) -> None:
    """Raise `ValueError` where a model is not an ordinary one: sparsified still, or compressed already."""
    if attached_weights(model):
        raise ValueError(f"{verb}: the model carries a sparsifier; call its finalize() first")
    refuse_spread(model, verb)
    if is_compressed(model):
        raise ValueError(f"{verb}: the model is compressed already; nmflow.decompress(model) gives the ordinary one")


def is_compressed(model: nn.Module) -> bool:
    """True where any layer stores its weight compressed."""
    return any(is_stored(module) for module in model.modules())


def _slots(model: nn.Module, targets: Targets | None) -> tuple[Slot, ...]:
    if targets is not None:
        return resolve(model, targets, "partial").slots
    return recorded(model) or found_slots(candidates(model), model.get_parameter)


# -- checking and packing one weight; the file reader does the same to the tensors of a file ---------------------


def weight_problems(stored: StoredWeight, weights: Mapping[str, Tensor]) -> list[str]:
    """What keeps a weight from being stored as asked: it is missing, of another shape or dtype, or breaks a pattern."""
    weight = weights.get(stored.name)
    if weight is None:
        return [f"{stored.name}: there is no such weight"]
    if tuple(weight.shape) != stored.shape:
        return [f"{stored.name}: the weight has shape {tuple(weight.shape)}, its slot says {stored.shape}"]
    if not weight.is_floating_point():
        return [f"{stored.name}: a weight of dtype {weight.dtype} is not compressed; it must be a floating one"]
    problems = finite_problems(stored.name, weight)
    rows_RK = to_rows(weight, stored.layout)
    for part in stored.parts:
        if part.pattern is None or problems:
            continue
        if part.pattern.m > LARGEST_M:
            problems.append(f"{part.label}: {part.pattern}: blocks of more than {LARGEST_M} have no compressed form")
            continue
        num_broken, shown = too_full(rows_RK[part.start : part.stop], part.pattern, part.start)
        if num_broken:
            problems.append(f"{part.label} is not {part.pattern}: {named(num_broken, shown)}")
    return problems


def pack(stored: StoredWeight, weight: Tensor) -> PackedWeight:
    """Store a weight that `weight_problems` has found no fault with."""
    rows_RK = to_rows(weight.detach(), stored.layout)
    return PackedWeight(stored, pack_parts(stored, rows_RK), weight.requires_grad)


def pack_parts(stored: StoredWeight, rows_RK: Tensor) -> list[CompressedNM | Tensor]:
    """The parts of a weight in order: compressed where they have a pattern, copies of the rows where not."""
    return [
        rows_RK[part.start : part.stop].clone(memory_format=torch.contiguous_format)
        if part.pattern is None
        else CompressedNM.pack(rows_RK[part.start : part.stop], part.pattern)
        for part in stored.parts
    ]


def put_in(model: nn.Module, packed: Mapping[str, PackedWeight]) -> None:
    """Make runtime layers of every module that holds one of these parameters, tied ones too. Checks nothing."""
    for module in model.modules():
        unstream(module)  # what reads its own weight would not become a runtime layer
    by_parameter = {id(model.get_parameter(name)): weight for name, weight in packed.items()}
    for module in model.modules():
        mine = {
            local: by_parameter[id(parameter)]
            for local, parameter in module._parameters.items()
            if parameter is not None and id(parameter) in by_parameter
        }
        if mine:
            store(module, mine)
    for module in model.modules():
        settings = next((s for cls, s in _UNFUSED.items() if isinstance(module, cls)), {})
        if settings and is_compressed(module):
            before = {name: module.__dict__[name] for name in settings if name in module.__dict__}
            module.__dict__[_SETTINGS] = before
            module.__dict__.update({name: settings[name] for name in before})
