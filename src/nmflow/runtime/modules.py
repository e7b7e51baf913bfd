"""The layers of a compressed model: where the stored weights live, and who multiplies with them.

`NMLinear` and `NMConv2d` compute from the compressed form. Any other module keeps its own forward and reads the
weight through a property that unpacks it at every use: storage only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nmflow import ops
from nmflow.ops import native_library
from nmflow.ops.dense import Activation, activate, unpacked, versions
from nmflow.ops.gpu import linear as gpu_linear
from nmflow.pattern import Pattern
from nmflow.runtime.format import CompressedNM, weight_of
from nmflow.runtime.parts import StoredWeight
from nmflow.runtime.view import WeightView
from nmflow.runtime.windows import pays, windows
from nmflow.targets import is_gpt2_conv1d

_DENSE_FORM = "_nm_dense_form"
_REPORTED_TOKENS = (1, 16, 256, 2048)


class PackedRows(nn.Module):
    """Compressed rows of a weight: the buffers `values` and `offsets`, and the pattern in a buffer of its own.

    The pattern is part of the state dict because 1:4 and 2:8 have the same shapes: loading one into the other
    must not go unnoticed. It is [n, m], and [n, m, v] where V rows share their offsets.
    """

    values: Tensor
    offsets: Tensor
    nm: Tensor

    def __init__(self, compressed: CompressedNM) -> None:
        super().__init__()
        self.pattern = compressed.pattern
        self.shape = (compressed.values.shape[0], compressed.axis)
        self._bound: ops.Bound | None = None
        self.register_buffer("values", _counted(compressed.values))
        self.register_buffer("offsets", _counted(compressed.offsets))
        self.register_buffer("nm", torch.tensor(_numbers(self.pattern), device=compressed.values.device))

    @property
    def compressed(self) -> CompressedNM:
        return CompressedNM(self.values, self.offsets, self.shape, self.pattern, "rows")

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.offsets.nbytes

    @property
    def forms_nbytes(self) -> int:
        return ops.forms_nbytes(self.values)

    def unpack(self) -> Tensor:
        return self.compressed.unpack()

    def linear(self, x: Tensor, bias: Tensor | None, activation: Activation | None = None) -> Tensor:
        n, m, v = self.pattern.n, self.pattern.m, self.pattern.v
        if not native_library.recording() and not native_library.transformed():
            bound = self._bound
            if bound is None or not bound.holds():
                bound = self._bound = ops.bind(self._buffers, self.shape, n, m, v)
            y = bound(x, bias, activation)
            if y is not None:
                return y
        return ops.linear(x, self.values, self.offsets, self.shape, n, m, bias, activation, v)

    def kernel(self) -> str:
        """Who multiplies; two names where it depends on the number of tokens."""
        return " or ".join(dict.fromkeys(self.kernel_for(tokens) for tokens in self._reported()))

    def kernel_for(self, tokens: int) -> str:
        """Who multiplies so many tokens."""
        return ops.select("linear", tokens=tokens, **self._facts()).name

    def others(self) -> dict[str, str]:
        """Kernels of this machine and device that leave some number of tokens to others, each with its reason."""
        found: dict[str, str] = {}
        device = self.values.device.type
        for kernel in ops.kernels():
            if kernel.task != "linear" or kernel.why_not(device=device) is not None:
                continue
            for tokens in self._reported():
                reason = kernel.why_not(tokens=tokens, **self._facts())
                if reason is not None:
                    found.setdefault(kernel.name, reason)
        return found

    def _reported(self) -> list[int]:
        """Numbers of tokens to report on: a few, and those that were measured on a GPU."""
        if not self.values.is_cuda:
            return list(_REPORTED_TOKENS)
        n, m, v = self.pattern.n, self.pattern.m, self.pattern.v
        key = gpu_linear.key_of(self.values.device, self.values.dtype, self.shape, n, m, v, 1)
        return sorted({*_REPORTED_TOKENS, *gpu_linear.measured(key)})

    def _facts(self) -> dict[str, Any]:
        n, m, v, device = self.pattern.n, self.pattern.m, self.pattern.v, self.values.device.type
        return {"device": device, "dtype": self.values.dtype, "shape": self.shape, "n": n, "m": m, "v": v}

    def dense(self) -> Tensor:
        """The dense rows, unpacked once and kept."""
        return unpacked(self.values, self.offsets, self.shape[1], self.pattern.n, self.pattern.m, self.pattern.v)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bound": None}  # addresses mean nothing to a copy

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        found = state_dict.get(f"{prefix}nm")
        if found is not None and found.tolist() != _numbers(self.pattern):
            n_m, v = found.tolist()[:2], found.tolist()[2:]
            held = "v".join([":".join(map(str, n_m)), *map(str, v)])
            error_messages = args[-1]
            error_messages.append(f"{prefix[:-1]}: the state dict holds {held}, this layer {self.pattern}")


def _counted(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of one from inference mode: those do not count what is written to them."""
    with torch.inference_mode(False):
        return tensor.clone() if tensor.is_inference() else tensor


def _numbers(pattern: Pattern) -> list[int]:
    return [pattern.n, pattern.m, *([pattern.v] if pattern.v > 1 else [])]


class DenseRows(nn.Module):
    """Rows of a weight that stay dense beside compressed ones, as in a fused projection."""

    values: Tensor

    def __init__(self, rows_RK: Tensor) -> None:
        super().__init__()
        self.register_buffer("values", rows_RK)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    @property
    def forms_nbytes(self) -> int:
        return 0

    def unpack(self) -> Tensor:
        return self.values

    def linear(self, x: Tensor, bias: Tensor | None, activation: Activation | None = None) -> Tensor:
        return activate(F.linear(x, self.values, bias), activation)

    def kernel(self) -> str:
        return "dense"

    def dense(self) -> Tensor:
        return self.values


@dataclass(frozen=True)
class _Joined:
    """Slices put together, and the tensors (and how often they had been written to) they were taken from."""

    sources: tuple[Tensor, ...]
    versions: tuple[int, ...]
    whole: PackedRows

    def holds(self, sources: tuple[Tensor, ...]) -> bool:
        same = all(ours is theirs for ours, theirs in zip(self.sources, sources, strict=True))
        return same and versions(*sources) == self.versions


class PackedWeight(nn.ModuleList):
    """One weight as its row slices in order. Tied modules share one."""

    def __init__(
        self, stored: StoredWeight, parts: Sequence[CompressedNM | Tensor], requires_grad: bool = True
    ) -> None:
        super().__init__(PackedRows(part) if isinstance(part, CompressedNM) else DenseRows(part) for part in parts)
        self.stored = stored
        self.requires_grad = requires_grad  # what the parameter gets back
        self._joined: _Joined | None = None

    @property
    def rows(self) -> list[PackedRows | DenseRows]:
        return cast("list[PackedRows | DenseRows]", list(self))

    @property
    def like(self) -> Tensor:
        """A tensor with the dtype and device of the weight."""
        return self.rows[0].values

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.rows)

    @property
    def forms_nbytes(self) -> int:
        """What was made of the weight to multiply with it, in memory beside it."""
        whole = 0 if self._joined is None else self._joined.whole.nbytes + self._joined.whole.forms_nbytes
        return whole + sum(part.forms_nbytes for part in self.rows)

    @property
    def dense_nbytes(self) -> int:
        return torch.Size(self.stored.shape).numel() * self.like.itemsize

    def unpack(self) -> Tensor:
        """The dense weight in its own shape and layout."""
        return weight_of(torch.cat([part.unpack() for part in self.rows]), self.stored.shape, self.stored.layout)

    def dense(self) -> Tensor:
        """`unpack`, with compressed slices unpacked once and kept."""
        slices = [part.dense() for part in self.rows]
        rows_RK = slices[0] if len(slices) == 1 else torch.cat(slices)
        return weight_of(rows_RK, self.stored.shape, self.stored.layout)

    def linear(self, x: Tensor, bias: Tensor | None, activation: Activation | None = None) -> Tensor:
        """y = act(x W^T + b), slice by slice."""
        if len(self._modules) == 1:
            return cast(PackedRows, self._modules["0"]).linear(x, bias, activation)
        if not torch.compiler.is_compiling() and (whole := self._whole()) is not None:
            return whole.linear(x, bias, activation)
        outputs = []
        for part, rows in zip(self.stored.parts, self.rows, strict=True):
            outputs.append(rows.linear(x, None if bias is None else bias[part.start : part.stop], activation))
        return torch.cat(outputs, dim=-1)

    def multiplied(self) -> list[PackedRows | DenseRows]:
        """The rows as they are multiplied: slices of one pattern together."""
        whole = self._whole() if len(self._modules) > 1 else None
        return self.rows if whole is None else [whole]

    def _whole(self) -> PackedRows | None:
        """Slices of one pattern (a fused query, key and value) as one, for one product in place of three."""
        parts = [part for part in self.rows if isinstance(part, PackedRows)]
        if len(parts) < len(self._modules) or any(part.pattern != parts[0].pattern for part in parts):
            return None
        if any(part.shape[0] % part.pattern.v for part in parts[:-1]):  # a shorter group in the middle of the whole
            return None
        sources = tuple(tensor for part in parts for tensor in (part.values, part.offsets))
        joined = self._joined
        if joined is None or not joined.holds(sources):
            values, offsets = torch.cat(sources[::2]), torch.cat(sources[1::2])
            shape, pattern = (values.shape[0], self.stored.axis), parts[0].pattern
            whole = PackedRows(CompressedNM(values, offsets, shape, pattern, "rows"))
            joined = self._joined = _Joined(sources, versions(*sources), whole)
        return joined.whole

    @property
    def bound(self) -> ops.Bound | None:
        """What the whole weight is bound to, where that is one product."""
        only = self._modules["0"] if len(self._modules) == 1 else None
        return only._bound if isinstance(only, PackedRows) else None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_joined": None}

    def kernel(self) -> str:
        """Who multiplies with the parts; "native or dense" where it depends on the number of tokens."""
        return "+".join(dict.fromkeys(part.kernel() for part in self.rows))

    def others(self) -> dict[str, str]:
        """Kernels that leave a part or some number of tokens to others, each with its reason."""
        parts = [part for part in self.rows if isinstance(part, PackedRows)]
        return {name: reason for part in reversed(parts) for name, reason in part.others().items()}

    def patterns(self) -> str:
        """`1:16`, or `1:4+dense` for slices that differ."""
        return "+".join(dict.fromkeys(str(part.pattern or "dense") for part in self.stored.parts))


def packed_weights(module: nn.Module) -> dict[str, PackedWeight]:
    """The stored weights of one module (not of its children), by the local name of the weight: `weight`."""
    return {
        name.removesuffix("_nm"): child for name, child in module._modules.items() if isinstance(child, PackedWeight)
    }


def _reader(local: str) -> property:
    def read(module: nn.Module) -> Tensor:
        packed = cast(PackedWeight, getattr(module, f"{local}_nm"))
        if torch.compiler.is_compiling():  # the compiler drops what is not used
            return packed.unpack()
        return WeightView.of(packed.unpack, packed.stored.shape, packed.like)

    return property(read, doc=f"The dense `{local}`, unpacked where its numbers are used. Read only.")


class _Stored(nn.Module):
    """What the layers of a compressed model have in common; mixed in before their own class."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError(f"{type(self).__name__} is made from a trained layer: nmflow.compress(model)")

    def extra_repr(self) -> str:
        mine = [super().extra_repr()]
        for local, packed in packed_weights(self).items():
            mine.append(f"{local}={packed.patterns()} in {packed.nbytes:,} of {packed.dense_nbytes:,} bytes")
        return ", ".join(filter(None, mine))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_direct"}  # as of PackedRows


class NMLinear(_Stored, nn.Linear):
    """`nn.Linear` or GPT-2's `Conv1D` with a compressed weight, y = x W^T + b, by the kernel of the registry.

    `weight` gives the dense weight to whoever reads it, in its own shape and dtype. Gradients flow to the input and
    the bias; the weight is fixed. `activation` ("gelu", "gelu_tanh", "relu", "silu") is applied to y while it is
    still in registers; `nmflow.runtime.fuse_activations` sets it.
    """

    weight = _reader("weight")
    weight_nm: PackedWeight
    activation: Activation | None = None
    _direct: tuple[PackedWeight | None, ops.Bound | None] = (None, None)  # the weight of the last call, and its product

    def forward(self, input: Tensor) -> Tensor:
        # Past nn.Module's own lookup, and past the modules between here and the product: at one token both are felt.
        packed, parameters = cast(PackedWeight, self._modules["weight_nm"]), self._parameters
        bias = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401  # it may be stored: costly
        if native_library.recording() or native_library.transformed():
            return packed.linear(input, bias, self.activation)
        last, bound = self._direct
        if last is packed and bound is not None:
            y = bound(input, bias, self.activation)
            if y is not None:
                return y
        y = packed.linear(input, bias, self.activation)
        self.__dict__["_direct"] = packed, packed.bound
        return y

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return f"{text}, activation={self.activation}" if self.activation else text


class NMConv2d(_Stored, nn.Conv2d):
    """`nn.Conv2d` with a compressed weight: every output pixel a token of a product, or torch's own convolution.

    As a product (see `nmflow.runtime.windows`), y lies in memory with the channels last; else the dense weight is
    unpacked once and kept. 1x1 kernels are always products, others where the native kernel is expected to win.
    """

    weight = _reader("weight")
    weight_nm: PackedWeight

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() == 4 and self.is_product(input):
            return self.weight_nm.linear(self.windows(input), self.bias).permute(0, 3, 1, 2)
        return cast(Tensor, self._conv_forward(input, self.weight_nm.dense(), self.bias))

    def is_product(self, input: Tensor | None = None) -> bool:
        """Whether this convolution multiplies (an input like this one) as a linear layer does."""
        if self.groups != 1 or self.padding_mode != "zeros":
            return False
        if self.kernel_size == (1, 1) and not any(self._reversed_padding_repeated_twice):
            return True
        if input is not None and torch.is_grad_enabled() and (input.requires_grad or _needs_grad(self.bias)):
            return False  # windows of a large image are a lot to keep for a backward
        if input is not None and torch.is_autocast_enabled(input.device.type):
            return False
        return all(
            isinstance(rows, PackedRows)
            and pays(rows.pattern, self.out_channels)
            and rows.kernel_for(_REPORTED_TOKENS[-1]) == "native"
            for rows in self.weight_nm
        )

    def windows(self, input: Tensor) -> Tensor:
        """What the product takes, [batch, rows, columns, K]."""
        padding = tuple(self._reversed_padding_repeated_twice)
        return windows(input, self.kernel_size, self.stride, padding, self.dilation)  # type: ignore[arg-type]  # all pairs


def _needs_grad(bias: Tensor | None) -> bool:
    return bias is not None and bias.requires_grad


class _Derived(_Stored):
    """A class derived at run time; pickled by what it is derived from."""

    _nm_derived_from: tuple[tuple[type[nn.Module], ...], tuple[str, ...]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, self._nm_derived_from, self.__getstate__()


_CLASSES: dict[tuple[tuple[type[nn.Module], ...], tuple[str, ...]], type[nn.Module]] = {}


def _derived_class(bases: tuple[type[nn.Module], ...], names: tuple[str, ...]) -> type[nn.Module]:
    """One class per (classes, names), so that equal modules share compiled code. It holds no state."""
    if (bases, names) not in _CLASSES:
        body = {**{name: _reader(name) for name in names}, "_nm_derived_from": (bases, names)}
        _CLASSES[bases, names] = type(f"NM{bases[-1].__name__}", (_Derived, *bases), body)
    return _CLASSES[bases, names]


def _rebuild(bases: tuple[type[nn.Module], ...], names: tuple[str, ...]) -> nn.Module:
    cls = _derived_class(bases, names)
    return cls.__new__(cls)


# -- from ordinary modules and back ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _DenseForm:
    """What a module was: its class and the order of its parameters, which optimizers and files go by."""

    cls: type[nn.Module]
    order: tuple[str, ...]


def store(module: nn.Module, weights: Mapping[str, PackedWeight]) -> None:
    """Turn a module into its runtime layer, in place: `weights` (by local name) take the parameters' places."""
    cls = _runtime_class(module, weights)
    module.__dict__[_DENSE_FORM] = _DenseForm(type(module), tuple(module._parameters))
    for local in weights:
        del module._parameters[local]
    # In front of the children, as parameters are: the first name of a tied weight stays the first.
    module._modules = {**{f"{local}_nm": packed for local, packed in weights.items()}, **module._modules}
    if issubclass(cls, NMLinear) and not isinstance(module, nn.Linear):
        linear = cast(nn.Linear, module)  # a Conv1D: people ask every linear layer for these
        linear.out_features, linear.in_features = weights["weight"].stored.shape[::-1]
    module.__class__ = cls


def restore(module: nn.Module, dense: Mapping[int, nn.Parameter]) -> None:
    """The inverse of `store`: `dense` maps the id of a `PackedWeight` to the parameter that takes its place."""
    form = cast(_DenseForm, module.__dict__.pop(_DENSE_FORM))
    for local, packed in packed_weights(module).items():
        del module._modules[f"{local}_nm"]
        module._parameters[local] = dense[id(packed)]
    module._parameters = {name: module._parameters[name] for name in form.order}
    if isinstance(module, NMLinear) and not issubclass(form.cls, nn.Linear):
        del module.in_features, module.out_features
    module.__class__ = form.cls


def is_stored(module: nn.Module) -> bool:
    """True for a runtime layer."""
    return _DENSE_FORM in module.__dict__


def _runtime_class(module: nn.Module, weights: Mapping[str, PackedWeight]) -> type[nn.Module]:
    cls = type(module)
    weight = weights.get("weight")
    runtime: type[NMLinear | NMConv2d] | None = None
    if weight is not None and _forward_is_linear(module, weight.stored.layout):
        runtime = NMLinear
    elif weight is not None and _forward_is_conv2d(module):
        runtime = NMConv2d
    if runtime is None or any(hasattr(module, name) for name in _OWN_NAMES[runtime]):
        return _derived_class((cls,), tuple(weights))
    # A subclass keeps whatever else it has: a __call__ of its own, methods that its parent calls.
    bases: tuple[type[nn.Module], ...] = (runtime,) if _is_plain(cls) else (runtime, cls)
    others = tuple(local for local in weights if local != "weight")
    return _derived_class(bases, others) if others or len(bases) > 1 else runtime


_OWN_NAMES: dict[type[nn.Module], tuple[str, ...]] = {
    NMLinear: ("activation", "_direct"),
    NMConv2d: ("is_product", "windows"),
}
"""What a runtime layer calls its own; to a module that has such a name already it means something else."""


def _is_plain(cls: type[nn.Module]) -> bool:
    """torch's classes and transformers' own `Conv1D`, of which the runtime layers know all there is."""
    if cls in (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear, nn.Conv2d):
        return True
    return (cls.__module__, cls.__name__) == ("transformers.pytorch_utils", "Conv1D")


def _forward_is_linear(module: nn.Module, layout: str) -> bool:
    """A class with a forward of its own may do more than multiply; it keeps that and reads the weight."""
    cls = type(module)
    if isinstance(module, nn.Linear):
        return cls.forward is nn.Linear.forward and layout == "rows"
    if is_gpt2_conv1d(module):
        conv1d = next(base for base in cls.__mro__ if base.__name__ == "Conv1D")
        return cls.forward is conv1d.forward and layout == "columns"  # type: ignore[attr-defined]  # not in the stubs
    return False


def _forward_is_conv2d(module: nn.Module) -> bool:
    if not isinstance(module, nn.Conv2d):
        return False
    cls = type(module)
    return cls.forward is nn.Conv2d.forward and cls._conv_forward is nn.Conv2d._conv_forward
