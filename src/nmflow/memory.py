"""What a process of a training run keeps in memory, counted from the shapes of a network; nothing is allocated.

Bytes, with float32 weights W (n parameters, s of them sparse), AdamW, P processes:

    DDP     W 4n    gradients 4n, and 4n of buckets where P > 1    moments 8n    W~ 4s    masks s
    FSDP2   the same over P, each weight rounded up to whole rows; and, gathered for a while, what lies outside of the
            blocks, two blocks (one that computes and the next one), and the gradients of one before they are summed

`masks` counts one byte a weight, and four more under `pruned_gradient="decay"`. Mixed precision copies weights to bf16:
under FSDP2 what is gathered, else one layer at a time, which autograd keeps (`activations`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nmflow.targets import Slot

_FLOAT, _HALF = 4, 2


@dataclass(frozen=True)
class Memory:
    """Bytes of one process, by what they are for."""

    weights: int
    gradients: int
    optimizer: int
    effective: int
    """W~ of the sparse weights."""
    masks: int
    gathered: int
    """FSDP2: weights and gradients of the layers that compute, whole."""
    activations: int
    """What autograd keeps for the backward pass."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(asdict(self).values())

    @property
    def overhead(self) -> float:
        """What sparse training adds, as a part of what dense training of the same network takes."""
        extra = self.effective + self.masks
        return extra / max(self.total - extra, 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**asdict(self), "total": self.total, "overhead": self.overhead}


def training_memory(
    model: nn.Module,
    slots: Sequence[Slot],
    processes: int = 1,
    blocks: Sequence[nn.Module] | None = None,
    half: bool = False,
    activations: int = 0,
    scaled_gradients: bool = False,
) -> Memory:
    """What one process of a run keeps (see the head of this file); the model may lie on the meta device.

    `slots` are the sparse weights. `blocks`, the modules that FSDP2 gathers one by one, stand for a run that is spread;
    None for whole copies. `half`: bf16. `activations`: see `saved_bytes`. `scaled_gradients`: a recipe whose
    `pruned_gradient` is "decay".
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    sparse = {slot.name for slot in slots}
    parts = processes if blocks is not None else 1
    held = sum(_held(shape, parts) for shape in shapes.values())
    held_sparse = sum(_held(shapes[name], parts) for name in sparse)
    buckets = _FLOAT * held if blocks is None and processes > 1 else 0
    gathered = 0
    if blocks is not None and processes > 1:
        sizes = sorted(_size(block.parameters()) for block in blocks)
        rest = sum(map(math.prod, shapes.values())) - sum(sizes)
        gathered = (_HALF if half else _FLOAT) * (rest + sum(sizes[-2:])) + _FLOAT * max(sizes[-1:], default=0)
    return Memory(
        weights=_FLOAT * held,
        gradients=_FLOAT * held + buckets,
        optimizer=2 * _FLOAT * held,
        effective=_FLOAT * held_sparse,
        masks=(1 + _FLOAT * scaled_gradients) * held_sparse,
        gathered=gathered,
        activations=activations,
    )


def saved_bytes(model: nn.Module, run: Callable[[nn.Module], Any]) -> int:
    """Bytes that autograd keeps of a forward pass `run(model)`, each storage once, parameters left out.

    Of `scaled_dot_product_attention` query, key, value and output, as fused kernels keep it: on the meta device torch
    would take it apart and keep the scores, which no GPU does.
    """
    mine = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, tuple[Any, int]] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in mine:
            kept[storage._cdata] = (storage, storage.nbytes())  # held, so that no other gets its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), _FusedAttention():
        run(model)
    return sum(size for _, size in kept.values())


class _FusedAttention(TorchFunctionMode):
    """Attention without its numbers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        named = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
        return _Attention.apply(named["query"], named["key"], named["value"])


class _Attention(torch.autograd.Function):
    """Keeps query, key, value and output; never run backwards."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_zeros(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError


def _held(shape: tuple[int, ...], parts: int) -> int:
    """Entries of a weight that the first of `parts` processes holds: whole rows."""
    return -(-shape[0] // parts) * math.prod(shape[1:]) if shape else 1


def _size(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
