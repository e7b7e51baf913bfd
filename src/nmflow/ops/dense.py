"""The dense weight behind a compressed one, unpacked once: what multiplies where no sparse kernel is faster.

Shape suffixes: R rows (outputs), K entries of the reduction axis, S stored entries of a row, G groups of V rows.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from nmflow.ops.native_library import transformed
from nmflow.ops.reference import expand
from nmflow.ops.registry import Kernel, register

Activation = Literal["relu", "gelu", "gelu_tanh", "silu"]
"""What may follow a product at once; "gelu" is the exact one."""

_UNPACKED: MutableMapping[Tensor, tuple[tuple[int, ...], Tensor, Tensor]] = WeakTensorKeyDictionary()
"""What it was unpacked from (`state`), the offsets' storage and the dense weight; while the tensor of values lives."""


def unpacked(values_RS: Tensor, offsets_GS: Tensor, axis: int, n: int, m: int, v: int = 1) -> Tensor:
    """`expand`, remembered: as much memory as the dense weight for the time of one unpacking.

    Derived anew where values or offsets were changed. Not remembered where gradients flow to the values, nor while
    a graph is compiled or torch.func transforms: what comes of it then is gone with the transform.
    """
    if torch.compiler.is_compiling() or type(values_RS) is not Tensor or values_RS.requires_grad or transformed():
        return expand(values_RS, offsets_GS, axis, n, m, v)
    now = state(values_RS, offsets_GS)
    found = _UNPACKED.get(values_RS)
    if found is None or found[0] != now or found[2].shape[1] != axis:
        with torch.inference_mode(False), torch.no_grad():  # a weight from inference mode could not be trained past
            weight_RK = expand(values_RS, offsets_GS, axis, n, m, v)
            found = _UNPACKED[values_RS] = now, offsets_GS.detach(), weight_RK
    return found[2]


def forms_nbytes(values_RS: Tensor) -> int:
    """Bytes of the dense weight that is remembered with these values, 0 where none is."""
    found = _UNPACKED.get(values_RS)
    return 0 if found is None else found[2].nbytes


def versions(*tensors: Tensor) -> tuple[int, ...]:
    """Counts of the writes into each tensor; tensors of inference mode do not count theirs."""
    return tuple(-1 if tensor.is_inference() else tensor._version for tensor in tensors)


def state(*tensors: Tensor) -> tuple[int, ...]:
    """What tells whether these are the tensors of before, unchanged: addresses (whoever compares holds their memory, or
    it may be another's by then) and `versions`."""
    return (*(tensor.data_ptr() for tensor in tensors), *versions(*tensors))


def activate(y: Tensor, activation: str | None) -> Tensor:
    """The activation functions that the native product fuses, in plain torch."""
    if activation is None:
        return y
    if activation == "gelu_tanh":
        return F.gelu(y, approximate="tanh")
    if activation == "gelu":
        return F.gelu(y)
    return F.silu(y) if activation == "silu" else F.relu(y)


def _linear(
    x: Tensor,
    values_RS: Tensor,
    offsets_GS: Tensor,
    shape: tuple[int, int],
    n: int,
    m: int,
    bias: Tensor | None = None,
    activation: Activation | None = None,
    v: int = 1,
) -> Tensor:
    return activate(F.linear(x, unpacked(values_RS, offsets_GS, shape[1], n, m, v), bias), activation)


register(Kernel("dense", "linear", lambda **facts: None, _linear))
