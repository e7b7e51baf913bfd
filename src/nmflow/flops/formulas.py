"""What one of torch's operators multiplies: operands and FLOPs, from shapes alone. A multiply-add is two FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.flop_counter import flop_registry


class Multiplied(NamedTuple):
    """One product; where it is a layer's, `right` is usually the weight."""

    flops: int
    left: Tensor
    right: Tensor
    kind: str | None = None
    """"Logit" or "Attend" where the operator says so itself."""


Formula = Callable[[Sequence[Any], Tensor], list[Multiplied]]
"""The products in a call with these positional arguments that gave this output."""


def _linear(args: Sequence[Any], out: Tensor) -> list[Multiplied]:
    """x W^T: every entry of x meets every row of W."""
    x, weight = args[:2]
    return [Multiplied(2 * x.numel() * (weight.numel() // weight.shape[-1]), x, weight)]


def _matrices(args: Sequence[Any], out: Tensor, first: int) -> list[Multiplied]:
    """[..., m, k] times [..., k, n] or [k]: every entry of the left one meets n columns. A bias may come before."""
    left, right = args[first : first + 2]
    return [Multiplied(2 * left.numel() * (right.shape[-1] if right.dim() > 1 else 1), left, right)]


def _convolution(args: Sequence[Any], out: Tensor) -> list[Multiplied]:
    """Every weight meets every place of the output; of the input, where the convolution is transposed."""
    x, weight, transposed = args[0], args[1], args[6]
    places = (x if transposed else out).shape[2:]
    return [Multiplied(2 * out.shape[0] * prod(places) * weight.numel(), x, weight)]


def _attention(args: Sequence[Any], out: Tensor) -> list[Multiplied]:
    """Q K^T and P V of every head of the queries. Masked places count, as a kernel without blocks would run them."""
    query, key, value = args[:3]
    places = out.numel() // out.shape[-1] * key.shape[-2]
    return [
        Multiplied(2 * places * query.shape[-1], query, key, "Logit"),
        Multiplied(2 * places * value.shape[-1], query, value, "Attend"),
    ]


_FORMULAS: Mapping[str, Formula] = {
    "linear": _linear,
    **dict.fromkeys(("mm", "bmm", "mv", "dot", "vdot", "_grouped_mm"), partial(_matrices, first=0)),
    **dict.fromkeys(("addmm", "baddbmm", "addmv"), partial(_matrices, first=1)),
    "convolution": _convolution,
    "scaled_dot_product_attention": _attention,
}


def formula(operator: Any) -> Formula | None:
    """The formula of an operator, or None where none is known: it multiplies nothing, or is to be decomposed.

    What has none here has the one of torch's own counter, where people register those of their own operators.
    """
    ours = _FORMULAS.get(operator.overloadpacket.__name__) if operator.namespace == "aten" else None
    theirs = flop_registry.get(operator.overloadpacket)
    if ours is not None or theirs is None:
        return ours

    def counted(args: Sequence[Any], out: Tensor) -> list[Multiplied]:
        left, right = [arg for arg in args if isinstance(arg, Tensor)][:2]
        return [Multiplied(theirs(*args, out_val=out), left, right)]

    return counted
