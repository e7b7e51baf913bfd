"""The compressed product on a GPU: asked of the plan, run by the kernel that it names.

Shape suffixes: R rows (outputs), S slots of a row, G groups of V rows that share their offsets.
"""

from __future__ import annotations

import functools
from collections.abc import MutableMapping
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from nmflow.groups import spread
from nmflow.ops.dense import Activation, activate, unpacked, versions
from nmflow.ops.gpu import product, two_four
from nmflow.ops.gpu.choice import DENSE, Key, Plan, Way
from nmflow.ops.gpu.product import SharedTiling, SlotMajor, Tiling
from nmflow.ops.gpu.two_four import Algorithm
from nmflow.ops.native_plan import bucket
from nmflow.ops.reference import expand

plan = Plan()
"""What was measured in this process, or read from a file."""

_FORMS: MutableMapping[Tensor, dict[str, tuple[tuple[int, ...], Any]]] = WeakTensorKeyDictionary()
"""Forms that kernels read, by the kind of form: derived once, kept while the tensor of values lives."""


class Weight(NamedTuple):
    """A compressed weight."""

    values: Tensor
    """[R, S]"""
    offsets: Tensor
    """[G, S]"""
    shape: tuple[int, int]
    n: int
    m: int
    v: int = 1

    def key(self, tokens: int, graph: bool | None = None) -> Key:
        """What the plan is asked for; `graph` as it is now, where None."""
        values = self.values
        key = key_of(values.device, values.dtype, self.shape, self.n, self.m, self.v, tokens)
        return key if graph is None else key._replace(graph=graph)

    def dense(self) -> Tensor:
        """Unpacked, and kept."""
        return unpacked(self.values, self.offsets, self.shape[1], self.n, self.m, self.v)

    def slot_major(self) -> SlotMajor:
        """The form that gathering reads."""

        def derive() -> SlotMajor:
            return product.slot_major(self.values, spread(self.offsets, self.v, self.shape[0]))

        return cast(SlotMajor, self._form("slot-major", derive))

    def two_four(self) -> Tensor:
        """The form that 2:4 cores read."""

        def derive() -> Tensor:
            return two_four.packed(expand(self.values, self.offsets, self.shape[1], self.n, self.m, self.v))

        return cast(Tensor, self._form("2:4", derive))

    def _form(self, kind: str, derive: Any) -> object:
        now = versions(self.values, self.offsets)
        forms = _FORMS.setdefault(self.values, {})
        found = forms.get(kind)
        if found is None or found[0] != now:
            with torch.inference_mode(False), torch.no_grad():
                found = forms[kind] = now, derive()
        return found[1]


def forms_nbytes(values: Tensor) -> int:
    """Bytes of the forms that were derived from these values so far."""
    forms = [form for _, form in _FORMS.get(values, {}).values()]
    return sum(tensor.nbytes for form in forms for tensor in ((form,) if isinstance(form, Tensor) else form))


def key_of(
    device: torch.device | str, dtype: torch.dtype, shape: tuple[int, int], n: int, m: int, v: int, tokens: int
) -> Key:
    """What the plan is asked for, now."""
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    graph = on_gpu and torch.cuda.is_current_stream_capturing()
    name = _name(torch.cuda.current_device() if device.index is None else device.index) if on_gpu else "interpreter"
    return Key(name, *shape, n, m, v, str(dtype).removeprefix("torch."), bucket(max(tokens, 1)), graph)


def measured(key: Key) -> list[int]:
    """Numbers of tokens, powers of two, at which the plan knows the weight of this key."""
    like = key._replace(bucket=0, graph=False)
    return [1 << known.bucket for known in plan.choices if known._replace(bucket=0, graph=False) == like]


@functools.cache
def _name(index: int) -> str:
    return torch.cuda.get_device_name(index)


def why_not(kernel: str, **facts: Any) -> str | None:
    """Why `kernel` ("triton" or "cusparselt") does not multiply; None where it does.

    Facts as in `nmflow.ops.registry.Kernel`.
    """
    reason = product.why_not(**facts) if kernel == "triton" else two_four.why_not(**facts)
    told = [facts.get(name) for name in ("device", "dtype", "shape", "n", "m", "v", "tokens")]
    if reason is None and None not in told and not torch.compiler.is_compiling():  # the operator asks then
        return plan.why_not(kernel, key_of(*told))  # type: ignore[arg-type]  # none of them is None
    return reason


def operator(
    x: Tensor,
    values: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    out_features: int,
    in_features: int,
    n: int,
    m: int,
    activation: Activation | None,
    v: int = 1,
) -> Tensor:
    """`torch.ops.nmflow.linear` on CUDA: y = act(x W^T + b) as the plan says, dense where it says nothing."""
    weight = Weight(values, offsets, (out_features, in_features), n, m, v)
    way = plan.choices.get(weight.key(x.shape[:-1].numel()), DENSE)
    return multiply(way, x, weight, bias, activation)


def multiply(
    way: Way, x: Tensor, weight: Weight, bias: Tensor | None = None, activation: Activation | None = None
) -> Tensor:
    """y = act(x W^T + b) in this way."""
    if way.kernel == "gather":
        cut = cast(Tiling, way.cut)
        return product.gather_linear(x, weight.slot_major(), weight.n, weight.m, bias, activation, cut)
    if way.kernel == "shared":
        values, offsets, _, n, m, v = weight
        return product.shared_linear(x, values, offsets, n, m, v, bias, activation, cast(SharedTiling, way.cut))
    if way.kernel == "2:4":
        algorithm = cast(Algorithm, way.cut)
        return two_four.two_four_linear(x, weight.two_four(), weight.shape[0], bias, activation, algorithm)
    return activate(F.linear(x, weight.dense(), bias), activation)
