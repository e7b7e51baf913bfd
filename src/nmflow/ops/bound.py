"""The product with one weight, its questions answered in advance: at one token, asking costs as much as multiplying.

Shape suffixes: R rows (outputs), S stored entries of a row, G groups of V rows that share their offsets.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from nmflow.ops import native, native_library
from nmflow.ops.dense import Activation, versions
from nmflow.ops.dispatch import select_linear
from nmflow.ops.gpu import linear as gpu
from nmflow.ops.gpu.choice import DENSE, Way

_MOST_REMEMBERED = 256
"""Shapes of x; a process that sees more of them (texts of every length) starts to remember anew."""


class _Ready(NamedTuple):
    """What of a call follows from the shape of x."""

    address: int
    tokens: int
    out_shape: tuple[int, ...]
    call: object  # keeps what lies at the address


class BoundOnCpu:
    """`nmflow.ops.linear` for one weight on a CPU, where it comes down to the native product.

    The registry is asked once for every shape of x (and number of threads, and activation); what is remembered is
    forgotten where the plan changes. Calls bypass torch's dispatcher, so they are for eager inference alone.
    """

    def __init__(
        self, values_RS: Tensor, offsets_GS: Tensor, shape: tuple[int, int], n: int, m: int, v: int = 1
    ) -> None:
        self.values_RS, self.offsets_GS = values_RS, offsets_GS
        self.shape, self.n, self.m, self.v, self.dtype = shape, n, m, v, values_RS.dtype
        self._versions = versions(values_RS, offsets_GS)
        self._ready: dict[tuple[torch.Size, int, str | None], _Ready | None] = {}
        self._plan_changes = native.plan.changes
        self._native = None if native_library.why_not() else native_library.loaded()

    def holds(self, values_RS: Tensor, offsets_GS: Tensor) -> bool:
        """Whether this is bound to these tensors as they are now."""
        return (
            values_RS is self.values_RS
            and offsets_GS is self.offsets_GS
            and versions(values_RS, offsets_GS) == self._versions
        )

    def __call__(self, x: Tensor, bias: Tensor | None, activation: Activation | None = None) -> Tensor | None:
        """y = act(x W^T + b); None where the registry must be asked: gradients, autocast, strided x, dense faster."""
        if self._native is None or not x.is_cpu or not x.is_contiguous():
            return None
        if not _plain_inference(x, bias, self.dtype, "cpu"):
            return None
        if bias is not None and not self._takes(bias):
            return None
        if self._plan_changes != native.plan.changes or len(self._ready) > _MOST_REMEMBERED:
            self._ready.clear()
            self._plan_changes = native.plan.changes
        key = x.shape, torch.get_num_threads(), activation
        try:
            ready = self._ready[key]
        except KeyError:
            ready = self._ready[key] = self._decide(x, bias, activation)
        if ready is None:
            return None
        y = x.new_empty(ready.out_shape)
        status = self._native.handle.nmflow_linear(
            ready.address,
            x.data_ptr(),
            self.shape[1],
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            self.shape[0],
            ready.tokens,
            self._native.parallel_for,
        )
        if status:
            native_library.checked(status, f"the product of {ready.tokens} tokens with a weight {self.shape}")
        return y

    def _takes(self, bias: Tensor) -> bool:
        return bias.numel() == self.shape[0] and bias.is_cpu and bias.is_contiguous()

    def _decide(self, x: Tensor, bias: Tensor | None, activation: Activation | None) -> _Ready | None:
        if select_linear(x, self.values_RS, self.shape, self.n, self.m, bias, self.v).name != "native":
            return None
        call = native.call_for(x, self.values_RS, self.offsets_GS, bias, self.shape, self.n, self.m, activation, self.v)
        return _Ready(call.address, x.shape[:-1].numel(), (*x.shape[:-1], self.shape[0]), call)


class BoundOnGpu:
    """`nmflow.ops.linear` for one weight on a GPU; the plan is asked once for every shape of x.

    For eager inference and what it captures in CUDA graphs, which have choices of their own. What is remembered is
    forgotten where the plan changes.
    """

    def __init__(self, weight: gpu.Weight) -> None:
        self.weight = weight
        self._ways: dict[tuple[torch.Size, bool], Way] = {}
        self._plan: object = None

    def holds(self, values_RS: Tensor, offsets_GS: Tensor) -> bool:
        """Whether this is bound to these tensors; forms derived from them look for changes themselves."""
        return values_RS is self.weight.values and offsets_GS is self.weight.offsets

    def __call__(self, x: Tensor, bias: Tensor | None, activation: Activation | None = None) -> Tensor | None:
        """y = act(x W^T + b); None where the registry must be asked: gradients, autocast, another device or dtype."""
        values = self.weight.values
        if x.device != values.device or not _plain_inference(x, bias, values.dtype, x.device.type):
            return None
        now = gpu.plan, gpu.plan.changes
        if self._plan != now or len(self._ways) > _MOST_REMEMBERED:
            self._ways.clear()
            self._plan = now
        asked = x.shape, x.is_cuda and torch.cuda.is_current_stream_capturing()
        way = self._ways.get(asked)
        if way is None:
            way = self._ways[asked] = gpu.plan.choices.get(self.weight.key(x.shape[:-1].numel()), DENSE)
        return gpu.multiply(way, x, self.weight, bias, activation)


def _plain_inference(x: Tensor, bias: Tensor | None, dtype: torch.dtype, device: str) -> bool:
    """Whether nothing but numbers of this dtype go in, and nothing but numbers are to come out."""
    if type(x) is not Tensor or x.dtype is not dtype:
        return False
    if bias is not None and (type(bias) not in native_library.PLAIN or bias.dtype is not dtype):
        return False
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return False
    return not torch.is_autocast_enabled(device)


Bound: TypeAlias = BoundOnCpu | BoundOnGpu


def bind(values_RS: Tensor, offsets_GS: Tensor, shape: tuple[int, int], n: int, m: int, v: int = 1) -> Bound:
    """The product with this weight, for the device that it lies on."""
    if values_RS.is_cuda:
        return BoundOnGpu(gpu.Weight(values_RS, offsets_GS, shape, n, m, v))
    return BoundOnCpu(values_RS, offsets_GS, shape, n, m, v)
