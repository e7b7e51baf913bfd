"""The native library from Python: whether it can run here, one-time packing, the product, and its torch operator.

Shape suffixes: R rows (outputs), K entries of the reduction axis (inputs), S stored entries of a row, G = ⌈R / V⌉
groups of V rows that share their offsets. The library knows offsets of a row alone: shared ones are spread over the
rows for as long as packing takes.
"""

from __future__ import annotations

import ctypes
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch import library as operators
from torch.utils.weak import WeakTensorKeyDictionary

from nmflow.groups import num_groups, spread
from nmflow.ops.dense import Activation, activate, state, unpacked
from nmflow.ops.native_library import DTYPES, ISAS, PLAIN, UNSUPPORTED, Layout, Weight, checked, loaded, plain
from nmflow.ops.native_library import describe as describe
from nmflow.ops.native_library import why_not as why_not
from nmflow.ops.native_plan import DENSE, Key, NativePlan, Tiling, bucket, default_tiling, expect_dense
from nmflow.ops.reference import expand
from nmflow.pattern import Pattern

_ALGORITHMS = {"tb": 0, "rv": 1}
_SPLITS = {"rows": 0, "tokens": 1}
_SHORT_BITS = 24
"""Of a packed float32 whose exponent lies elsewhere; see `value_bits` in native/nmflow.h."""
ACTIVATIONS: dict[str | None, int] = {None: 0, **{name: i + 1 for i, name in enumerate(get_args(Activation))}}


# ---------------------------------------------------------------------------------------------- the weight
@dataclass(frozen=True)
class _Packed:
    """One layout of a weight and the memory it lies in."""

    layout: Layout
    values: Tensor
    index: Tensor


@dataclass(frozen=True, slots=True)
class Call:
    """Everything of a call but the tensors that change. The packed ones are held so that their addresses stay good."""

    address: int
    weight: Weight
    packed: _Packed


class _Forms:
    """The packed forms of one weight, made as they are needed. Holds the storage of the canonical tensors, not them."""

    def __init__(
        self, values_RS: Tensor, offsets_GS: Tensor, shape: tuple[int, int], n: int, m: int, isa: int, v: int
    ) -> None:
        self.values_RS, self.offsets_GS = values_RS.detach().contiguous(), offsets_GS.detach().contiguous()
        self.shape, self.n, self.m, self.v, self.isa, self.dtype = shape, n, m, v, isa, values_RS.dtype
        self.state = state(values_RS, offsets_GS)
        self.offsets = offsets_GS.detach()  # its memory is held, so that nothing else takes the address it is known by
        self.plan_changes = plan.changes
        self.packed: dict[tuple[str, int], _Packed] = {}
        self.calls: dict[tuple[object, ...], Call] = {}

    @property
    def nbytes(self) -> int:
        return sum(form.values.nbytes + form.index.nbytes for form in self.packed.values())

    def key(self, tokens: int, threads: int) -> Key:
        dtype = str(self.values_RS.dtype).removeprefix("torch.")
        return Key(*self.shape, self.n, self.m, dtype, bucket(tokens), threads)

    def form(self, algorithm: str, chunk: int) -> _Packed:
        found = self.packed.get((algorithm, chunk))
        if found is None:
            found = self.packed[algorithm, chunk] = self._pack(algorithm, chunk)
        return found

    def _pack(self, algorithm: str, chunk: int) -> _Packed:
        # Few columns are for one token, where bytes are the time: values in 24 bits, if this machine and they allow it.
        shorter = algorithm == "rv" and chunk > 0
        packed = self._packed_as(algorithm, chunk, _SHORT_BITS) if shorter else UNSUPPORTED
        if packed == UNSUPPORTED:
            packed = self._packed_as(algorithm, chunk, 0)
        if isinstance(packed, int):
            checked(packed, f"packing a weight {self.shape} at {self.n}:{self.m} for {algorithm}")
        return cast(_Packed, packed)

    def _layout(self, algorithm: str, chunk: int, value_bits: int) -> Layout | int:
        """The layout, complete, or the library's status."""
        dtype = DTYPES[self.values_RS.dtype]
        layout = Layout(*self.shape, self.n, self.m, dtype, self.isa, _ALGORITHMS[algorithm], chunk, value_bits)
        return cast(int, loaded().handle.nmflow_layout_init(layout)) or layout

    def _packed_as(self, algorithm: str, chunk: int, value_bits: int) -> _Packed | int:
        """The form, or the library's status."""
        native, layout = loaded(), self._layout(algorithm, chunk, value_bits)
        if isinstance(layout, int):
            return layout
        values, index = _aligned(layout.values_size), _aligned(layout.index_size)
        offsets_RS = spread(self.offsets_GS, self.v, self.shape[0])
        pointers = [each.data_ptr() for each in (self.values_RS, offsets_RS, values, index)]
        if status := native.handle.nmflow_pack(layout, *pointers, native.parallel_for):
            return cast(int, status)
        return _Packed(layout, values, index)

    def remember(self, tokens: int, threads: int, activation: str | None) -> Call:
        """The call for this many tokens, from now on found in `calls` under their bucket."""
        call = self.call_of(self.tiling(tokens, threads), activation)
        self.calls[bucket(tokens), threads, activation] = call
        return call

    def tiling(self, tokens: int, threads: int) -> Tiling:
        key = self.key(tokens, threads)
        chosen = plan.choices.get(key, DENSE)
        # A plan may have been measured on a machine that has kernels which this one lacks.
        usable = chosen != DENSE and isinstance(self._layout(chosen.algorithm, chosen.chunk, 0), Layout)
        return chosen if usable else default_tiling(key, self.rv_reach())

    def rv_reach(self) -> int:
        """Widest block that RV takes without a gather; 0 where there is no RV."""
        native = loaded()
        isa = native.best_isa if self.isa < 0 else self.isa
        if self.values_RS.dtype == torch.bfloat16:
            return 64 if isa == 2 and native.has_bf16 and self.m <= 64 else 0
        return (0, 8, 128)[isa]

    def call_of(self, tiling: Tiling, activation: str | None) -> Call:
        """A call with these tiles; packs what is not packed yet."""
        packed = self.form(tiling.algorithm, tiling.chunk)
        weight = Weight(
            packed.layout,
            packed.values.data_ptr(),
            packed.index.data_ptr(),
            ACTIVATIONS[activation],
            _SPLITS[tiling.split],
            tiling.tile_tokens,
            tiling.tile_rows,
        )
        return Call(ctypes.addressof(weight), weight, packed)


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """An N:M weight made ready for the native product; `values` and `offsets` are the canonical form it came from."""

    values: Tensor
    offsets: Tensor
    out_features: int
    in_features: int
    n: int
    m: int
    v: int
    forms: _Forms = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed forms made so far, the canonical one not counted."""
        return self.forms.nbytes


plan = NativePlan()
"""The choices every product consults; `native_tune` adds to it, and `adopt` those of NativePlan.load(...)."""

_FORMS: MutableMapping[Tensor, _Forms] = WeakTensorKeyDictionary()
"""What the operator packed, while the tensor of values lives."""


def prepare(
    values_RS: Tensor,
    offsets_GS: Tensor,
    out_features: int,
    in_features: int,
    n: int,
    m: int,
    dtype: torch.dtype | None = None,
    isa: str | None = None,
    v: int = 1,
) -> PackedWeight:
    """Make a compressed weight ready for `linear`.

        W[r, m·⌊s / n⌋ + offsets[⌊r / v⌋, s]] = values[r, s],    0 elsewhere

    `values_RS` [R, S] float32 or bfloat16 (cast to `dtype` where that is given), `offsets_GS` [⌈R / v⌉, S] uint8, or
    uint16 where m > 256. `isa` ("portable", "avx2", "avx512") overrides the best one of this machine.

    Raises `ValueError` where shapes, dtypes or offsets do not fit (all of it at once), `RuntimeError` where the
    library is missing or has no such instruction set.
    """
    values_RS = values_RS if dtype is None else values_RS.to(dtype)
    problems = _problems(values_RS, offsets_GS, out_features, in_features, n, m, v)
    if isa is not None and isa not in ISAS:
        problems.append(f'isa "{isa}": one of {", ".join(ISAS)}')
    if problems:
        raise ValueError("a weight for the native product: " + "; ".join(problems))
    number = -1 if isa is None else ISAS.index(isa)
    if number > loaded().best_isa:
        raise RuntimeError(f"this machine has no {isa}, its best is {ISAS[loaded().best_isa]}")
    forms = _Forms(values_RS, offsets_GS, (out_features, in_features), n, m, number, v)
    _FORMS[values_RS] = forms
    return PackedWeight(values_RS, offsets_GS, out_features, in_features, n, m, v, forms)


def _problems(values_RS: Tensor, offsets_GS: Tensor, rows: int, axis: int, n: int, m: int, v: int) -> list[str]:
    if not 1 <= n <= m <= 65536 or v < 1:
        return [f"the pattern {n}:{m}v{v} is none with 1 <= n <= m <= 65536, 1 <= v"]
    tail = axis % m
    stored = axis // m * n + min(n, tail)
    wanted = torch.uint8 if m <= 256 else torch.uint16
    problems = [
        f"{what} have shape {tuple(tensor.shape)}, [{rows}, {axis}] at {Pattern(n, m, v)} has {size}"
        for what, tensor, size in (
            ("values", values_RS, (rows, stored)),
            ("offsets", offsets_GS, (num_groups(rows, v), stored)),
        )
        if tuple(tensor.shape) != size
    ]
    if values_RS.dtype not in DTYPES:
        problems.append(f"values have dtype {values_RS.dtype}; float32 and bfloat16 are taken")
    if offsets_GS.dtype != wanted:
        problems.append(f"offsets have dtype {offsets_GS.dtype}, not {wanted}")
    if any(tensor.device.type != "cpu" for tensor in (values_RS, offsets_GS)):
        problems.append("values and offsets must lie on the cpu")
    if not problems and offsets_GS.numel():
        whole = axis // m * n
        wide = offsets_GS.to(torch.int32)
        if bool((wide[:, :whole] >= m).any()) or bool((wide[:, whole:] >= max(tail, 1)).any()):
            problems.append("an offset lies outside its block")
    return problems


# ---------------------------------------------------------------------------------------------- the product
def linear(
    x: Tensor,
    packed: PackedWeight,
    bias: Tensor | None = None,
    activation: Activation | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """y = act(x W^T + b), x [..., K] of any strides, y [..., R] of x's dtype; sums are float32.

    `activation`: "relu", "gelu" (exact), "gelu_tanh", "silu" or None. `out` [..., R] is written and returned where
    given. Threads are torch's. There is no backward: grad must be off, or x need none.

    Raises `TypeError` where dtypes differ, `ValueError` where shapes or devices do, `RuntimeError` where x needs grad.
    """
    if torch.compiler.is_compiling():
        shape = packed.out_features, packed.in_features
        nm = packed.n, packed.m
        y = torch.ops.nmflow.linear(x, packed.values, packed.offsets, bias, *shape, *nm, activation, packed.v)
        return cast(Tensor, y) if out is None else out.copy_(y)
    _check(x, packed.forms, bias, activation)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        raise RuntimeError("the native product has no backward; use torch.no_grad(), or the reference kernel to train")
    return run(x, packed.forms, bias, activation, out)


def _check(x: Tensor, forms: _Forms, bias: Tensor | None, activation: str | None) -> None:
    dtype, (rows, axis) = forms.dtype, forms.shape
    if not plain(x, bias):
        raise TypeError("x and bias must be plain tensors; torch.ops.nmflow.linear takes subclasses apart")
    if x.dtype is not dtype or (bias is not None and bias.dtype is not dtype):
        others = f"x {x.dtype}" + ("" if bias is None else f", the bias {bias.dtype}")
        raise TypeError(f"the weight is {dtype}, {others}; cast them")
    if x.shape[-1:] != (axis,):
        raise ValueError(f"x has shape {tuple(x.shape)}; its last dimension must be in_features = {axis}")
    if bias is not None and bias.shape != (rows,):
        raise ValueError(f"the bias has shape {tuple(bias.shape)}, the weight {rows} outputs")
    if not x.is_cpu or (bias is not None and not bias.is_cpu):
        raise ValueError(f"x lies on {x.device}; the native product takes tensors on the cpu")
    if activation not in ACTIVATIONS:
        raise ValueError(f'activation "{activation}": one of {", ".join(get_args(Activation))}, or None')


def run(x: Tensor, forms: _Forms, bias: Tensor | None, activation: str | None, out: Tensor | None) -> Tensor:
    """`linear` without its checks: at one token every line here is felt."""
    rows, axis = forms.shape
    if x.is_contiguous() and axis:
        tokens, x_stride = x.numel() // axis, axis
    else:
        x_TK = x.reshape(x.shape[:-1].numel(), axis)
        if x_TK.stride(1) != 1:
            x_TK = x_TK.contiguous()
        tokens, x_stride = x_TK.shape[0], x_TK.stride(0)
        shape, x = x.shape, x_TK
        if out is None:
            out = x.new_empty((*shape[:-1], rows))
    if out is None:
        out, y_stride = x.new_empty((*x.shape[:-1], rows)), rows
    else:
        y_stride = _row_stride(out, tokens, rows, x.dtype)
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    if forms.plan_changes != plan.changes:
        forms.calls.clear()
        forms.plan_changes = plan.changes
    threads = torch.get_num_threads()
    call = forms.calls.get(((tokens - 1).bit_length(), threads, activation))
    if call is None:
        call = forms.remember(tokens, threads, activation)
    native = loaded()
    status = native.handle.nmflow_linear(
        call.address,
        x.data_ptr(),
        x_stride,
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        y_stride,
        tokens,
        native.parallel_for,
    )
    if status:
        checked(status, f"the product of {tokens} tokens with a weight [{rows}, {axis}]")
    return out


def _row_stride(out: Tensor, tokens: int, rows: int, dtype: torch.dtype) -> int:
    if out.dtype is not dtype or not out.is_cpu or out.shape[-1:] != (rows,) or out.numel() != tokens * rows:
        raise ValueError(f"out is {tuple(out.shape)} of {out.dtype}; {tokens} tokens give [..., {rows}] of {dtype}")
    if out.is_contiguous():
        return rows
    if out.dim() != 2 or out.stride(1) != 1:
        raise ValueError(f"out has strides {out.stride()}; rows may lie apart, the entries of a row may not")
    return out.stride(0)


def why_dense(
    shape: tuple[int, int], n: int, m: int, dtype: torch.dtype, tokens: int, isa: str | None = None
) -> str | None:
    """Why torch's dense product is the better one for a weight and so many tokens on torch's present threads; None
    where the native one is. Measured (`native_tune`) where the plan knows it, by `expect_dense` where not."""
    name = str(dtype).removeprefix("torch.")
    key = Key(*shape, n, m, name, bucket(max(tokens, 1)), torch.get_num_threads())
    chosen = plan.choices.get(key)
    if chosen is None:
        isa = isa or ISAS[loaded().best_isa]
        return f"the dense product is expected to be faster ({n}:{m}, {isa})" if expect_dense(key, isa) else None
    return "the dense product was faster when it was measured" if chosen == DENSE else None


# --------------------------------------------------------------------------------------- the torch operator
OPERATORS = operators.Library("nmflow", "FRAGMENT")  # type: ignore[no-untyped-call]  # not annotated
OPERATORS.define(  # type: ignore[no-untyped-call]  # not annotated
    "linear(Tensor x, Tensor values, Tensor offsets, Tensor? bias, int out_features, int in_features, int n, int m, "
    "str? activation, int v=1) -> Tensor"
)


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
    """`torch.ops.nmflow.linear`: takes the canonical form, so that an exported program runs on any machine."""
    # The dispatcher has done what a class of one's own asks for, and gives the result its class again.
    x = x if type(x) in PLAIN else x.as_subclass(Tensor)
    bias = bias if bias is None or type(bias) in PLAIN else bias.as_subclass(Tensor)
    shape = out_features, in_features
    dense = why_not(device="cpu", dtype=x.dtype, m=m) or why_dense(shape, n, m, x.dtype, x.shape[:-1].numel())
    if dense is not None:
        return activate(F.linear(x, unpacked(values, offsets, in_features, n, m, v), bias), activation)
    forms = _forms_of(values, offsets, shape, n, m, v)
    _check(x, forms, bias, activation)
    return run(x, forms, bias, activation, None)


def call_for(
    x: Tensor,
    values: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    shape: tuple[int, int],
    n: int,
    m: int,
    activation: Activation | None,
    v: int = 1,
) -> Call:
    """The call that `operator` makes for such an x, checked; good while values and offsets stay as they are."""
    forms = _forms_of(values, offsets, shape, n, m, v)
    _check(x, forms, bias, activation)
    return forms.remember(x.shape[:-1].numel(), torch.get_num_threads(), activation)


def _forms_of(values: Tensor, offsets: Tensor, shape: tuple[int, int], n: int, m: int, v: int) -> _Forms:
    """What was packed of this weight, or a new packing of it."""
    forms = _FORMS.get(values)
    asked = shape, n, m, v, state(values, offsets)
    if forms is None or (forms.shape, forms.n, forms.m, forms.v, forms.state) != asked:
        forms = prepare(values, offsets, *shape, n, m, v=v).forms
    return forms


def forms_nbytes(values: Tensor) -> int:
    """Bytes of the forms that were packed of these values so far."""
    forms = _FORMS.get(values)
    return 0 if forms is None else forms.nbytes


def _fake(
    x: Tensor,
    values: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    out_features: int,
    in_features: int,
    n: int,
    m: int,
    activation: str | None,
    v: int = 1,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, offsets, bias, ctx.rows, ctx.axis, ctx.n, ctx.m, ctx.activation, ctx.v = inputs
    ctx.save_for_backward(x, values, offsets, bias)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Of x and the bias; the weight is fixed. Layers take torch's product where gradients flow, but a graph that was
    recorded without them keeps the operator."""
    x, values, offsets, bias = ctx.saved_tensors
    if ctx.activation is not None:
        shape = ctx.rows, ctx.axis, ctx.n, ctx.m
        with torch.enable_grad():
            z = torch.ops.nmflow.linear(x.detach(), values, offsets, bias, *shape, None, ctx.v).requires_grad_()
            (grad,) = torch.autograd.grad(activate(z, ctx.activation), z, grad)
    of_x = of_bias = None
    if ctx.needs_input_grad[0]:
        of_x = grad @ expand(values, offsets, ctx.axis, ctx.n, ctx.m, ctx.v)
    if bias is not None and ctx.needs_input_grad[3]:
        of_bias = grad.reshape(-1, ctx.rows).sum(0)
    return of_x, None, None, of_bias, *(None,) * 6


operators.register_autograd("nmflow::linear", _backward, setup_context=_remember, lib=OPERATORS)
OPERATORS.impl("linear", operator, "CPU")  # type: ignore[no-untyped-call]  # not annotated
operators.register_fake("nmflow::linear", _fake, lib=OPERATORS)


def _aligned(size: int) -> Tensor:
    """Bytes at a multiple of 64, as many as a cache line and a vector have."""
    whole = torch.empty(size + 64, dtype=torch.uint8)
    skip = -whole.data_ptr() % 64
    return whole[skip : skip + size]
