"""The native library from Python: whether it can run here, one-time packing, the product, and its torch operator.

Shape suffixes: R rows (outputs), K entries of the reduction axis (inputs), S stored entries of a row.
"""

from __future__ import annotations

import ctypes
import os
import time
import weakref
from ctypes import POINTER, c_int32, c_int64, c_void_p
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from nmflow.ops.native_plan import Key, NativePlan, Tiling, bucket, candidates, default_tiling
from nmflow.ops.reference import linear as reference_linear

Activation = Literal["relu", "gelu", "gelu_tanh", "silu"]
ISAS = ("portable", "avx2", "avx512")

_ABI_VERSION = 1
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_ALGORITHMS = {"tb": 0, "rv": 1}
_SPLITS = {"rows": 0, "tokens": 1}
_ACTIVATIONS: dict[str | None, int] = {None: 0, **{name: i + 1 for i, name in enumerate(get_args(Activation))}}
_TROUBLE = {1: "a number is out of range", 2: "there is no kernel for this", 3: "no memory for scratch space"}


# --------------------------------------------------------------------------------------------- the library
class _Layout(ctypes.Structure):
    """`nmflow_layout` of native/nmflow.h."""

    _fields_ = [
        *((name, c_int64) for name in ("rows", "cols", "n", "m")),
        *((name, c_int32) for name in ("dtype", "isa", "algorithm", "chunk", "lanes", "index_bytes")),
        *((name, c_int64) for name in ("kept", "values_size", "index_size")),
    ]


class _Weight(ctypes.Structure):
    """`nmflow_weight` of native/nmflow.h."""

    _fields_ = [
        ("layout", _Layout),
        *((name, c_void_p) for name in ("values", "index")),
        *((name, c_int32) for name in ("activation", "split", "tile_tokens", "tile_rows")),
    ]


@dataclass(frozen=True)
class _Library:
    handle: ctypes.CDLL
    path: Path
    best_isa: int
    has_bf16: bool
    parallel_for: int | None
    """Address of libtorch's `torch_parallel_for`; None: every product runs on one thread."""


def why_not(**facts: object) -> str | None:
    """Why the native product cannot run (facts as in `nmflow.ops.registry.Kernel`); None where it can."""
    found = _find()
    if isinstance(found, str):
        return found
    device, dtype, m = facts.get("device"), facts.get("dtype"), facts.get("m")
    if device is not None and device != "cpu":
        return f"it runs on cpu, not on {device}"
    if dtype is not None and dtype not in _DTYPES:
        return f"it takes float32 and bfloat16, not {dtype}"
    if isinstance(m, int) and m > 65536:
        return f"blocks of {m} are wider than 16-bit offsets reach"
    return None


def describe() -> dict[str, object]:
    """What was found, for people: the file, its best instruction set here, bfloat16, whose threads.

    Raises `RuntimeError` where the library is missing.
    """
    library = _library()
    return {
        "path": str(library.path),
        "isa": ISAS[library.best_isa],
        "bf16": library.has_bf16,
        "threads": "torch" if library.parallel_for else "one (this torch has no torch_parallel_for)",
    }


def _library() -> _Library:
    found = _find()
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


@cache
def _find() -> _Library | str:
    """The library, or why there is none. `NMFLOW_NATIVE` names the file; else beside the package, else build/."""
    named = os.environ.get("NMFLOW_NATIVE")
    package = Path(__file__).parents[1]
    places = [Path(named)] if named else [*sorted(package.glob("_native*.so")), package.parents[1] / "build/_native.so"]
    for path in places:
        if path.is_file():
            return _open(path)
    if named:
        return f"NMFLOW_NATIVE names {named}, which is no file"
    return "the native library was not built (no compiler at installation?); cmake -S native -B build builds it"


def _open(path: Path) -> _Library | str:
    try:
        handle = ctypes.CDLL(str(path))
        version = handle.nmflow_abi_version()
    except (OSError, AttributeError) as error:
        return f"{path} cannot be loaded: {error}"
    if version != _ABI_VERSION:
        return f"{path} has version {version} of the interface, this nmflow speaks {_ABI_VERSION}; build it again"
    handle.nmflow_layout_init.argtypes = [POINTER(_Layout)]
    handle.nmflow_pack.argtypes = [POINTER(_Layout), *[c_void_p] * 5]
    # The weight as a plain address: the cheapest argument there is, and at one token the call is half the time.
    handle.nmflow_linear.argtypes = [
        *(c_void_p, c_void_p, c_int64, c_void_p), *(c_void_p, c_int64, c_int64, c_void_p)
    ]
    return _Library(handle, path, handle.nmflow_best_isa(), bool(handle.nmflow_has_bf16()), _torch_parallel_for())


def _torch_parallel_for() -> int | None:
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib", "torch_cpu.dll"):
        if (folder / name).is_file():
            function = getattr(ctypes.CDLL(str(folder / name)), "torch_parallel_for", None)
            return ctypes.cast(function, c_void_p).value if function is not None else None
    return None


def _checked(status: int, what: str) -> None:
    if status:
        raise RuntimeError(f"{what}: {_TROUBLE.get(status, f'status {status}')}")


# ---------------------------------------------------------------------------------------------- the weight
@dataclass(frozen=True)
class _Packed:
    """One layout of a weight and the memory it lies in."""

    layout: _Layout
    values: Tensor
    index: Tensor


@dataclass(frozen=True)
class _Call:
    """Everything of a call but the tensors that change. The packed ones are held so that their addresses stay good."""

    address: int
    weight: _Weight
    packed: _Packed


class _Forms:
    """The packed forms of one weight, made as they are needed. Holds the storage of the canonical tensors, not them."""

    def __init__(self, values_RS: Tensor, offsets_RS: Tensor, shape: tuple[int, int], n: int, m: int, isa: int) -> None:
        self.values_RS, self.offsets_RS = values_RS.detach().contiguous(), offsets_RS.detach().contiguous()
        self.shape, self.n, self.m, self.isa = shape, n, m, isa
        self.versions = _versions(values_RS, offsets_RS)
        self.packed: dict[tuple[str, int], _Packed] = {}
        self.calls: dict[tuple[object, ...], _Call] = {}

    def key(self, tokens: int, threads: int) -> Key:
        dtype = str(self.values_RS.dtype).removeprefix("torch.")
        return Key(*self.shape, self.n, self.m, dtype, bucket(tokens), threads)

    def form(self, algorithm: str, chunk: int) -> _Packed:
        found = self.packed.get((algorithm, chunk))
        if found is None:
            found = self.packed[algorithm, chunk] = self._pack(algorithm, chunk)
        return found

    def _pack(self, algorithm: str, chunk: int) -> _Packed:
        library = _library()
        layout = _Layout(
            *self.shape, self.n, self.m, _DTYPES[self.values_RS.dtype], self.isa, _ALGORITHMS[algorithm], chunk
        )
        what = f"packing a weight {self.shape} at {self.n}:{self.m} for {algorithm}"
        _checked(library.handle.nmflow_layout_init(layout), what)
        values, index = _aligned(layout.values_size), _aligned(layout.index_size)
        pointers = [each.data_ptr() for each in (self.values_RS, self.offsets_RS, values, index)]
        _checked(library.handle.nmflow_pack(layout, *pointers, library.parallel_for), what)
        return _Packed(layout, values, index)

    def remember(self, tokens: int, threads: int, activation: str | None) -> _Call:
        """The call for this many tokens, from now on found in `calls` under their bucket."""
        call = self.call_of(self.tiling(tokens, threads), activation)
        self.calls[bucket(tokens), threads, activation] = call
        return call

    def tiling(self, tokens: int, threads: int) -> Tiling:
        key = self.key(tokens, threads)
        return plan.choices.get(key) or default_tiling(key, self.rv_reach())

    def rv_reach(self) -> int:
        """Widest block that RV takes without a gather; 0 where there is no RV."""
        library = _library()
        isa = library.best_isa if self.isa < 0 else self.isa
        if self.values_RS.dtype == torch.bfloat16:
            return 64 if isa == 2 and library.has_bf16 and self.m <= 64 else 0
        return (0, 8, 128)[isa]

    def call_of(self, tiling: Tiling, activation: str | None) -> _Call:
        """A call with these tiles; packs what is not packed yet."""
        packed = self.form(tiling.algorithm, tiling.chunk)
        weight = _Weight(
            packed.layout,
            packed.values.data_ptr(),
            packed.index.data_ptr(),
            _ACTIVATIONS[activation],
            _SPLITS[tiling.split],
            tiling.tile_tokens,
            tiling.tile_rows,
        )
        return _Call(ctypes.addressof(weight), weight, packed)


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """An N:M weight made ready for the native product; `values` and `offsets` are the canonical form it came from."""

    values: Tensor
    offsets: Tensor
    out_features: int
    in_features: int
    n: int
    m: int
    forms: _Forms = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed forms made so far, the canonical one not counted."""
        return sum(form.values.nbytes + form.index.nbytes for form in self.forms.packed.values())


plan = NativePlan()
"""The choices every product consults; `tune` adds to it, and NativePlan.load(...) may replace its `choices`."""

_FORMS: weakref.WeakKeyDictionary[Tensor, _Forms] = WeakTensorKeyDictionary()


def prepare(
    values_RS: Tensor,
    offsets_RS: Tensor,
    out_features: int,
    in_features: int,
    n: int,
    m: int,
    dtype: torch.dtype | None = None,
    isa: str | None = None,
) -> PackedWeight:
    """Make a compressed weight ready for `linear`.

        W[r, m·⌊s / n⌋ + offsets[r, s]] = values[r, s],    0 elsewhere

    `values_RS` [R, S] float32 or bfloat16 (cast to `dtype` where that is given), `offsets_RS` [R, S] uint8, or uint16
    where m > 256. `isa` ("portable", "avx2", "avx512") overrides the best one of this machine.

    Raises `ValueError` where shapes, dtypes or offsets do not fit (all of it at once), `RuntimeError` where the
    library is missing or has no such instruction set.
    """
    values_RS = values_RS if dtype is None else values_RS.to(dtype)
    problems = _problems(values_RS, offsets_RS, out_features, in_features, n, m)
    if isa is not None and isa not in ISAS:
        problems.append(f'isa "{isa}": one of {", ".join(ISAS)}')
    if problems:
        raise ValueError("a weight for the native product: " + "; ".join(problems))
    number = -1 if isa is None else ISAS.index(isa)
    if number > _library().best_isa:
        raise RuntimeError(f"this machine has no {isa}, its best is {ISAS[_library().best_isa]}")
    forms = _Forms(values_RS, offsets_RS, (out_features, in_features), n, m, number)
    _FORMS[values_RS] = forms
    return PackedWeight(values_RS, offsets_RS, out_features, in_features, n, m, forms)


def _problems(values_RS: Tensor, offsets_RS: Tensor, rows: int, axis: int, n: int, m: int) -> list[str]:
    if not 1 <= n <= m <= 65536:
        return [f"the pattern {n}:{m} is none with 1 <= n <= m <= 65536"]
    tail = axis % m
    size = (rows, axis // m * n + min(n, tail))
    wanted = torch.uint8 if m <= 256 else torch.uint16
    problems = [
        f"{what} have shape {tuple(tensor.shape)}, [{rows}, {axis}] at {n}:{m} has {size}"
        for what, tensor in (("values", values_RS), ("offsets", offsets_RS))
        if tuple(tensor.shape) != size
    ]
    if values_RS.dtype not in _DTYPES:
        problems.append(f"values have dtype {values_RS.dtype}; float32 and bfloat16 are taken")
    if offsets_RS.dtype != wanted:
        problems.append(f"offsets have dtype {offsets_RS.dtype}, not {wanted}")
    if any(tensor.device.type != "cpu" for tensor in (values_RS, offsets_RS)):
        problems.append("values and offsets must lie on the cpu")
    if not problems and offsets_RS.numel():
        whole = axis // m * n
        wide = offsets_RS.to(torch.int32)
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
        y = torch.ops.nmflow.linear(
            x, packed.values, packed.offsets, bias, packed.out_features, packed.in_features, packed.n, packed.m, activation
        )
        return cast(Tensor, y) if out is None else out.copy_(y)
    _check_call(x, packed, bias, activation)
    return _run(x, packed.forms, bias, activation, out)


def _check_call(x: Tensor, packed: PackedWeight, bias: Tensor | None, activation: str | None) -> None:
    dtype = packed.values.dtype
    if x.dtype is not dtype or (bias is not None and bias.dtype is not dtype):
        raise TypeError(f"the weight is {dtype}, x {x.dtype}, the bias {None if bias is None else bias.dtype}; cast them")
    if x.shape[-1:] != (packed.in_features,):
        raise ValueError(f"x has shape {tuple(x.shape)}; its last dimension must be in_features = {packed.in_features}")
    if bias is not None and bias.shape != (packed.out_features,):
        raise ValueError(f"the bias has shape {tuple(bias.shape)}, the weight {packed.out_features} outputs")
    if not x.is_cpu or (bias is not None and not bias.is_cpu):
        raise ValueError(f"x lies on {x.device}; the native product takes tensors on the cpu")
    if activation not in _ACTIVATIONS:
        raise ValueError(f'activation "{activation}": one of {", ".join(get_args(Activation))}, or None')
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        raise RuntimeError("the native product has no backward; use torch.no_grad(), or the reference kernel to train")


def _run(x: Tensor, forms: _Forms, bias: Tensor | None, activation: str | None, out: Tensor | None) -> Tensor:
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
    threads = torch.get_num_threads()
    call = forms.calls.get(((tokens - 1).bit_length(), threads, activation))
    if call is None:
        call = forms.remember(tokens, threads, activation)
    library = _library()
    status = library.handle.nmflow_linear(
        call.address,
        x.data_ptr(),
        x_stride,
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        y_stride,
        tokens,
        library.parallel_for,
    )
    if status:
        _checked(status, f"the product of {tokens} tokens with a weight [{rows}, {axis}]")
    return out


def _row_stride(out: Tensor, tokens: int, rows: int, dtype: torch.dtype) -> int:
    if out.dtype is not dtype or not out.is_cpu or out.shape[-1:] != (rows,) or out.numel() != tokens * rows:
        raise ValueError(f"out is {tuple(out.shape)} of {out.dtype}; {tokens} tokens give [..., {rows}] of {dtype}")
    if out.is_contiguous():
        return rows
    if out.dim() != 2 or out.stride(1) != 1:
        raise ValueError(f"out has strides {out.stride()}; rows may lie apart, the entries of a row may not")
    return out.stride(0)


def tune(
    packed: PackedWeight, tokens: int, seconds: float = 0.3, activation: Activation | None = None
) -> dict[Tiling, float]:
    """Time the tilings worth trying at `tokens` tokens on torch's present threads and keep the best in `plan`.

    Returns the fastest time of each in seconds. Candidates far behind the best are dropped after one round.
    Packed forms that only lost candidates used are freed.
    """
    forms = packed.forms
    key = forms.key(tokens, torch.get_num_threads())
    x = torch.randn(tokens, packed.in_features).to(packed.values.dtype)
    out = x.new_empty(tokens, packed.out_features)
    keep = set(forms.packed)
    best: dict[Tiling, float] = {}
    library = _library()

    def timed(tiling: Tiling, repeats: int) -> float:
        call = forms.call_of(tiling, activation)
        run = (call.address, x.data_ptr(), x.stride(0), None, out.data_ptr(), out.stride(0), tokens)
        times = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            _checked(library.handle.nmflow_linear(*run, library.parallel_for), f"tuning {tiling}")
            times.append(time.perf_counter() - start)
        return min(times[1:])

    tilings = candidates(key, forms.rv_reach())
    for tiling in tilings:
        best[tiling] = timed(tiling, 2)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        leader = min(best.values())
        for tiling in [each for each in tilings if best[each] < 1.15 * leader]:
            best[tiling] = min(best[tiling], timed(tiling, 3))
    winner = min(best, key=lambda tiling: best[tiling])
    plan.choices[key] = winner
    keep.add((winner.algorithm, winner.chunk))
    for form in set(forms.packed) - keep:
        del forms.packed[form]
    forms.calls.clear()
    return best


# --------------------------------------------------------------------------------------- the torch operator
_OPERATORS = torch.library.Library("nmflow", "FRAGMENT")
_OPERATORS.define(
    "linear(Tensor x, Tensor values, Tensor offsets, Tensor? bias, int out_features, int in_features, int n, int m, "
    "str? activation) -> Tensor"
)


def _operator(
    x: Tensor,
    values: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    out_features: int,
    in_features: int,
    n: int,
    m: int,
    activation: Activation | None,
) -> Tensor:
    """`torch.ops.nmflow.linear`: takes the canonical form, so that an exported program runs on any machine."""
    if why_not(device="cpu", dtype=x.dtype, m=m) is not None:
        return activate(reference_linear(x, values, offsets, (out_features, in_features), n, m, bias), activation)
    forms = _FORMS.get(values)
    if forms is None or forms.versions != _versions(values, offsets):
        forms = prepare(values, offsets, out_features, in_features, n, m).forms
    return _run(x, forms, bias, activation, None)


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
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


_OPERATORS.impl("linear", _operator, "CPU")
torch.library.register_fake("nmflow::linear", _fake, lib=_OPERATORS)


def activate(y: Tensor, activation: Activation | None) -> Tensor:
    """The epilogue in plain torch."""
    if activation is None:
        return y
    if activation == "gelu_tanh":
        return F.gelu(y, approximate="tanh")
    return cast(Tensor, {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}[activation](y))


def _versions(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(-1 if tensor.is_inference() else tensor._version for tensor in tensors)


def _aligned(size: int) -> Tensor:
    """Bytes at a multiple of 64, as many as a cache line and a vector have."""
    whole = torch.empty(size + 64, dtype=torch.uint8)
    skip = -whole.data_ptr() % 64
    return whole[skip : skip + size]
