"""The product with one weight, its questions answered in advance: at one token, asking costs as much as multiplying.

Shape suffixes: R rows (outputs), S stored entries of a row, G groups of V rows that share their offsets.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from nmflow.ops import native, native_library
from nmflow.ops.dense import Activation, versions
from nmflow.ops.dispatch import select_linear
from nmflow.ops.gpu import linear as gpu
from nmflow.ops.gpu.choice import DENSE, Way

_STRIDED = torch.strided

_MOST_REMEMBERED = 256
"""Shapes of x; a process that sees more of them (texts of every length) starts to remember anew."""


class _Asked:
    """What of a call follows from the shape of x, the threads and the activation alone.

    One object for all weights of one shape: between two calls of a layer the weights of all others pass through the
    caches, and what is a layer's own has to come from memory again, a line at a time.
    """

    __slots__ = ("axis", "out_shape", "rows", "tokens")

    def __init__(self, lead: torch.Size, rows: int, axis: int) -> None:
        self.tokens, self.rows, self.axis, self.out_shape = lead.numel(), rows, axis, (*lead, rows)


_ASKED: dict[tuple[int, int], dict[tuple[torch.Size, int, str | None], _Asked]] = {}


class BoundOnCpu:
    """`nmflow.ops.linear` for one weight on a CPU, where it comes down to the native product.

    The registry is asked once for every shape of x (and number of threads, and activation); what is remembered is
    forgotten where the plan changes. Calls bypass torch's dispatcher, so they are for eager inference alone.
    """

    __slots__ = (  # instead of a dictionary, which is three more places in memory
        *("_buffers", "_values", "_offsets", "_versions", "_counted", "_dtype"),
        *("_handle", "_parallel_for", "_plan_changes", "_asked", "_last", "_calls", "_weight"),
    )

    def __init__(
        self, buffers: Mapping[str, Tensor | None], shape: tuple[int, int], n: int, m: int, v: int = 1
    ) -> None:
        self._buffers = buffers
        self._values, self._offsets = _both(buffers)
        self._versions = versions(self._values, self._offsets)
        self._counted = sum(version >= 0 for version in self._versions)  # of the two; tensors of inference mode do not
        self._dtype = self._values.dtype
        self._weight = shape, n, m, v
        self._asked = _ASKED.setdefault(shape, {})
        self._calls: dict[_Asked, native.Call | None] = {}
        self._last: tuple[_Asked | None, native.Call | None] = (None, None)
        self._plan_changes = native.plan.changes
        missing = native_library.why_not()
        self._handle = None if missing else native_library.loaded().handle
        self._parallel_for = None if missing else native_library.loaded().parallel_for

    def holds(self) -> bool:
        """Whether the buffers still hold the tensors this is bound to, as they were."""
        buffers, values, offsets = self._buffers, self._values, self._offsets
        if buffers["values"] is not values or buffers["offsets"] is not offsets:
            return False
        if self._counted == 2:
            return (values._version, offsets._version) == self._versions
        return not self._counted or versions(values, offsets) == self._versions

    def __call__(self, x: Tensor, bias: Tensor | None, activation: Activation | None = None) -> Tensor | None:
        """y = act(x W^T + b); None where the registry must be asked: gradients, autocast, strided x, dense faster, and
        where it no longer holds."""
        if self._handle is None or not x.is_cpu or x.layout is not _STRIDED or not x.is_contiguous() or x.is_neg():
            return None
        if not self.holds():
            return None
        if not _plain_inference(x, bias, self._dtype, "cpu"):
            return None
        last, call = self._last
        asked = self._asked.get((x.shape, torch.get_num_threads(), activation))
        if asked is None or asked is not last or self._plan_changes != native.plan.changes:
            asked, call = self._last = self._find(x, bias, activation)
        if call is None or (bias is not None and not _takes(bias, asked.rows)):
            return None
        y = x.new_empty(*asked.out_shape)  # torch reads numbers in two thirds of the time that a tuple takes
        status = self._handle.nmflow_linear(
            call.address,
            x.data_ptr(),
            asked.axis,
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            asked.rows,
            asked.tokens,
            self._parallel_for,
        )
        if status:
            shape = asked.rows, asked.axis
            native_library.checked(status, f"the product of {asked.tokens} tokens with a weight {shape}")
        return y

    def _find(self, x: Tensor, bias: Tensor | None, activation: Activation | None) -> tuple[_Asked, native.Call | None]:
        """What is asked, and the call; None where the product is not the native one."""
        if self._plan_changes != native.plan.changes or len(self._calls) > _MOST_REMEMBERED:
            self._calls.clear()
            self._plan_changes = native.plan.changes
        if len(self._asked) > _MOST_REMEMBERED:
            self._asked.clear()
        (rows, axis), *_ = self._weight
        key = x.shape, torch.get_num_threads(), activation
        asked = self._asked.get(key) or self._asked.setdefault(key, _Asked(x.shape[:-1], rows, axis))
        if asked not in self._calls:
            self._calls[asked] = self._decide(x, bias, activation)
        return asked, self._calls[asked]

    def _decide(self, x: Tensor, bias: Tensor | None, activation: Activation | None) -> native.Call | None:
        shape, n, m, v = self._weight
        if select_linear(x, self._values, shape, n, m, bias, v).name != "native":
            return None
        return native.call_for(x, self._values, self._offsets, bias, shape, n, m, activation, v)


def _takes(bias: Tensor, rows: int) -> bool:
    return bias.numel() == rows and bias.is_cpu and bias.is_contiguous()


def _both(buffers: Mapping[str, Tensor | None]) -> tuple[Tensor, Tensor]:
    values, offsets = buffers["values"], buffers["offsets"]
    assert values is not None
    assert offsets is not None
    return values, offsets


class BoundOnGpu:
    """`nmflow.ops.linear` for one weight on a GPU; the plan is asked once for every shape of x.

    For eager inference and what it captures in CUDA graphs, which have choices of their own. What is remembered is
    forgotten where the plan changes.
    """

    def __init__(
        self, buffers: Mapping[str, Tensor | None], shape: tuple[int, int], n: int, m: int, v: int = 1
    ) -> None:
        self._buffers = buffers
        self.weight = gpu.Weight(*_both(buffers), shape, n, m, v)
        self._ways: dict[tuple[torch.Size, bool], Way] = {}
        self._plan: object = None

    def holds(self) -> bool:
        """Whether the buffers still hold the tensors this is bound to; forms derived from them look for changes
        themselves."""
        return self._buffers["values"] is self.weight.values and self._buffers["offsets"] is self.weight.offsets

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


def bind(buffers: Mapping[str, Tensor | None], shape: tuple[int, int], n: int, m: int, v: int = 1) -> Bound:
    """The product with the weight in `buffers` ("values" [R, S], "offsets" [G, S]), for the device that it lies on."""
    return (BoundOnGpu if _both(buffers)[0].is_cuda else BoundOnCpu)(buffers, shape, n, m, v)
