"""Who multiplies with what: every tensor of a forward is followed from operator to operator, every product noted."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nmflow.flops.formulas import Multiplied, formula
from nmflow.layout import rows_shape
from nmflow.targets import Candidate, candidates

OTHER = "other"
_SOFTMAX = re.compile(r"_?(safe_|masked_)?softmax")
_WITHOUT_PRODUCTS = {"aten", "prim", "prims", "profiler"}
"""Where operators without a formula multiply nothing; of others nobody knows."""

_UNKNOWN = {"_trilinear"}
"""What multiplies nevertheless: nn.Bilinear's, three operands at a time."""


@dataclass(frozen=True)
class Product:
    """One product of a forward."""

    flops: int
    layer: str
    """The module whose weight it is; where there is none, the module in which it runs."""
    parameter: str | None
    rows: tuple[int, int]
    """[start, stop) of the parameter's rows (`nmflow.layout`)."""
    kind: str
    """Without a parameter: "Logit" before a softmax, "Attend" behind it, else "other"."""
    input_gradients: int
    """Products of this size in the backward for operands that are no weight: 0, 1 or 2."""
    weight_gradient: bool


@dataclass(frozen=True)
class _Held:
    """A parameter, or rows of it, in a storage."""

    parameter: str
    layers: tuple[str, ...]
    """The modules that have it."""
    height: int
    rows: tuple[int, int] | None = None
    """None: all of them, in the storage as the parameter lies in its own, so that a view says which rows it has."""
    offset: int = 0
    row_stride: int = 1

    def rows_of(self, view: Tensor) -> tuple[int, int]:
        if self.rows is not None:
            return self.rows
        first = int(view.storage_offset()) - self.offset
        last = first + sum((size - 1) * int(stride) for size, stride in zip(view.shape, view.stride(), strict=True))
        return first // self.row_stride % self.height, last // self.row_stride % self.height + 1

    def in_copy(self, view: Tensor, copied: Tensor) -> _Held:
        """The same where it is copied to, or seen through another view."""
        if _storage(view) == _storage(copied):
            return self
        rows = self.rows_of(view)
        alike = view.shape == copied.shape and view.stride() == copied.stride()
        if self.rows is None and alike and rows == (0, self.height):
            return replace(self, offset=int(copied.storage_offset()))
        return replace(self, rows=rows)


@dataclass(frozen=True)
class _Past:
    """What the entries of a storage come from."""

    held: _Held | None = None
    needs_gradient: bool = False
    scores: frozenset[int] = frozenset()
    """Products of two activations (their places in the list) since which there was no product."""
    is_softmax: bool = False
    """There was a softmax since the last product."""


_NOTHING = _Past()


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # not annotated
    """The products of what runs within it, to be entered in inference mode.

    There operators arrive whole, as a `linear` or an attention; those without a formula are taken apart here.
    """

    def __init__(self, model: nn.Module, example: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # not annotated
        self.products: list[Product] = []
        self.unknown: dict[str, None] = {}
        # Weak references are kept, so that no storage comes to lie where one of these was.
        self._past: dict[StorageWeakRef, _Past] = {}
        self._path: list[str] = [""]
        parameters = dict(model.named_parameters())
        for candidate in candidates(model):
            parameter = parameters[candidate.name]
            self._remember(parameter, _Past(_held(candidate, parameter), parameter.requires_grad))
        for tensor in _tensors(example):
            self._remember(tensor, _Past(needs_gradient=tensor.is_floating_point()))
        for name, module in model.named_modules():
            module.register_forward_pre_hook(partial(self._enter, name))
            module.register_forward_hook(self._leave)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = formula(func)
        if known is None and func.namespace != "prim":  # those ask what a tensor is like
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        given = (args, kwargs)
        past = self._carried(func, given, out) if known is None else self._noted(known(args, out), given)
        for tensor in _tensors(out):
            self._remember(tensor, past)
        return out

    def _noted(self, found: list[Multiplied], given: Any) -> _Past:
        """Note products; the past of what comes of them."""
        needs_gradient = any(self._past_of(tensor).needs_gradient for tensor in _tensors(given))  # of biases too
        scores = set()
        for each in found:
            left, right = self._past_of(each.left), self._past_of(each.right)
            weight, view, other = (right, each.right, left) if right.held else (left, each.left, right)
            if weight.held is not None:
                held, here = weight.held, self._path[-1]
                layer = here if here in held.layers else held.layers[0]
                gradients = (int(other.needs_gradient), weight.needs_gradient)
                self.products.append(
                    Product(each.flops, layer, held.parameter, held.rows_of(view), OTHER, *gradients)
                )
                continue
            kind = each.kind or ("Attend" if left.is_softmax or right.is_softmax else OTHER)
            if kind == OTHER:
                scores.add(len(self.products))
            gradients = (left.needs_gradient + right.needs_gradient, False)
            self.products.append(Product(each.flops, self._path[-1], None, (0, 1), kind, *gradients))
        return _Past(needs_gradient=needs_gradient, scores=frozenset(scores))

    def _carried(self, func: Any, given: Any, out: Any) -> _Past:
        """The past of what an operator without products makes of its operands."""
        operands, made = list(_tensors(given)), next(_tensors(out), None)
        pasts = [self._past_of(tensor) for tensor in operands]
        held = pasts[0].held if len(pasts) == 1 else None
        past = _Past(
            held=None if held is None or made is None else held.in_copy(operands[0], made),
            needs_gradient=any(each.needs_gradient for each in pasts),
            scores=frozenset().union(*(each.scores for each in pasts)),
            is_softmax=any(each.is_softmax for each in pasts),
        )
        if func.namespace not in _WITHOUT_PRODUCTS or func.overloadpacket.__name__ in _UNKNOWN:
            self.unknown[str(func.overloadpacket)] = None
        if not _SOFTMAX.fullmatch(func.overloadpacket.__name__):
            return past
        for place in past.scores:
            self.products[place] = replace(self.products[place], kind="Logit")
        return replace(past, scores=frozenset(), is_softmax=True)

    def _past_of(self, tensor: Tensor) -> _Past:
        return self._past.get(_storage(tensor), _NOTHING)

    def _remember(self, tensor: Tensor, past: _Past) -> None:
        self._past[_storage(tensor)] = past

    def _enter(self, name: str, module: nn.Module, args: Any) -> None:
        self._path.append(name)

    def _leave(self, module: nn.Module, args: Any, out: Any) -> None:
        self._path.pop()


def _tensors(tree: Any) -> Iterator[Tensor]:
    """Those that have a storage, in their order."""
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.layout == torch.strided)


def _storage(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]  # not annotated


def _held(candidate: Candidate, parameter: Tensor) -> _Held:
    layers = tuple(name.rpartition(".")[0] for name in candidate.names)
    height, _ = rows_shape(candidate.shape, candidate.layout)
    dim = {"rows": -2, "columns": 1, "conv": 0}[candidate.layout]
    row_stride = int(parameter.stride(dim)) if parameter.dim() > 1 else 1
    return _Held(candidate.name, layers, height, None, int(parameter.storage_offset()), row_stride)
