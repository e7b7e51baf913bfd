"""The step from W to W~ by the native library: mask, decay and the count of flips in one pass over a CPU weight.

Shape suffixes: R rows, K entries of the reduction axis, B bytes of a row at one bit an entry, ⌈K / 8⌉; of a convolution
C channels and T taps, K = T·C.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_float, c_int32, c_int64, c_void_p
from functools import cache
from typing import cast

import torch
from torch import Tensor

from nmflow.masks import Remainder, rows_mask
from nmflow.ops import native_library
from nmflow.pattern import Pattern

LARGEST_M = 32768
"""`NMFLOW_PROJECT_LARGEST_M` of native/project.h."""

PANEL_ROWS = 64
"""`panel_rows` of native/project_kernel.hpp."""

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ISAS = {"auto": -1, "portable": 0, "avx2": 1, "avx512": 2}
_TROUBLE = {
    1: "a number is out of range",
    2: "this machine, or this build, lacks the instruction set",
    3: "there is no memory for scratch space, or torch's threads did not run it",
}


class _Projection(ctypes.Structure):
    """`nmflow_projection` of native/project.h."""

    _fields_ = [
        *((name, c_int64) for name in ("rows", "cols", "n", "m", "shared")),
        *(("dtype", c_int32), ("isa", c_int32), ("decay", c_float), ("stream", c_int32), ("columns", c_int32)),
        ("taps", c_int32),
        *((name, c_void_p) for name in ("w", "mask", "effective", "cast", "bits")),
        *((name, c_int64) for name in ("w_stride", "mask_stride", "effective_stride", "cast_stride", "bits_stride")),
    ]


def why_not(**facts: object) -> str | None:
    """Why the native projection cannot run; None where it can.

    Facts: `device` (a type such as "cpu"), `dtype`, `m`, `v`, and of all tensors of the call `strides` and `plain`.
    """
    missing = native_library.why_not() or _why_no_entry()
    if missing:
        return missing
    if facts.get("plain") is False:
        return "a tensor of another class than torch's own may keep its numbers elsewhere"
    device, dtype, m, strides = (facts.get(name) for name in ("device", "dtype", "m", "strides"))
    if device is not None and device != "cpu":
        return f"it runs on cpu, not on {device}"
    if dtype is not None and dtype not in _DTYPES:
        return f"it takes float32, bfloat16 and float16, not {dtype}"
    if isinstance(m, int) and m > LARGEST_M:
        return f"blocks of {m} are longer than {LARGEST_M} entries"
    if not isinstance(strides, tuple):
        return None
    if len(strides[0]) == 3:
        gapless = all(stride[2] == 1 and stride[1] == strides[0][1] for stride in strides)
        return None if gapless else "the taps of a channel must lie next to each other, in every tensor alike"
    if all(stride[1] == 1 for stride in strides):
        return None
    if not all(stride[0] == 1 for stride in strides):
        return "the entries of a row, or else the rows, must lie next to each other, in every tensor alike"
    return _why_not_panels(cast("int | None", facts.get("v")) or 1)


def _why_not_panels(v: int) -> str | None:
    """Why V rows that are neighbours in memory cannot share their columns."""
    fits = PANEL_ROWS % v == 0
    return None if fits else f"where rows lie next to each other, those that share columns must divide {PANEL_ROWS}"


def project_native(
    w: Tensor,
    pattern: Pattern,
    decay: float,
    remainder: Remainder,
    mask: Tensor | None,
    effective: Tensor | None,
    cast: Tensor | None = None,
    bits_RB: Tensor | None = None,
    isa: str = "auto",
) -> int:
    """Write Φ into `mask` and W~ into `effective`; return how many entries of the mask changed.

        W~ = W ⊙ [Φ + D·(1 - Φ)],    D = `decay`

    W is [R, K], or [R, C, T]: the weight of a convolution as it is stored, whose entry (c, t) of a row counts as
    number t·C + c of K = T·C. V rows that share their columns are summed as `nmflow.groups.summed` does.

    Bit for bit what `nmflow.ops.projection.project` writes (a NaN may have another payload where D scales it).
    `mask` is bool, `effective` of W's dtype and may be W itself, `cast` takes W~ rounded to bfloat16 for a
    float32 W, `bits_RB` (uint8) the mask at one bit an entry: entry k in bit k mod 8 of byte ⌊k / 8⌋, 0 behind the
    last one. Any of them may be None. W, mask, W~ and cast lie alike: all with the entries of a row next to each
    other, or all with the rows (a transposed view, such as GPT-2's weights give); the bits of a row always do. Of a
    convolution the entries of a row lie without a gap.
    `isa` names an instruction set, for tests and benchmarks.

    Raises `ValueError` on tensors that do not fit and, under `remainder="error"`, where M does not divide K or V the
    rows, before anything is written, and `RuntimeError` where the library is missing or cannot do it.
    Source: Bambhaniya et al. 2025, section 3.
    """
    outputs = {"mask": mask, "effective": effective, "cast": cast, "bits": bits_RB}
    columns = _check(w, pattern, outputs)
    library = _library()
    num_rows, axis = w.shape[0], w.shape[1:].numel()
    if (axis % pattern.m or num_rows % pattern.v) and remainder != "partial":
        rows_mask(torch.empty(num_rows, axis, device="meta"), pattern, remainder)  # raises where it is refused
        pattern = Pattern.dense()
    job = _Projection(
        rows=num_rows,
        cols=axis,
        n=1 if pattern.is_dense else pattern.n,
        m=1 if pattern.is_dense else pattern.m,
        shared=1 if pattern.is_dense else pattern.v,
        dtype=_DTYPES[w.dtype],
        isa=_ISAS[isa],
        decay=decay,
        stream=-1,
        columns=columns,
        taps=w.shape[2:].numel(),
        w=w.data_ptr(),
        w_stride=w.stride(1 if columns else 0),
    )
    for name, tensor in outputs.items():
        if tensor is not None:
            setattr(job, name, tensor.data_ptr())
            setattr(job, f"{name}_stride", tensor.stride(1 if columns and name != "bits" else 0))
    flips = c_int64()
    parallel_for = library.parallel_for if torch.get_num_threads() > 1 else None
    status: int = library.handle.nmflow_project(byref(job), parallel_for, byref(flips))
    if status:
        raise RuntimeError(f"projection to {pattern} in {isa}: {_TROUBLE.get(status, f'status {status}')}")
    for tensor in outputs.values():
        if tensor is not None and not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)  # written behind autograd's back
    return flips.value


def _check(w: Tensor, pattern: Pattern, outputs: dict[str, Tensor | None]) -> bool:
    """Whether the rows are what lies next to each other. Raises every reason at once why these cannot be projected."""
    given = {"w": w, **{name: tensor for name, tensor in outputs.items() if tensor is not None}}
    dtypes = {"w": w.dtype, "mask": torch.bool, "effective": w.dtype, "cast": torch.bfloat16, "bits": torch.uint8}
    wrong = []
    if w.dim() not in (2, 3):
        wrong.append(f"w has {w.dim()} dimensions, not those of [R, K] or [R, C, T]")
    if w.dtype not in _DTYPES:
        wrong.append(f"w is {w.dtype}; float32, bfloat16 and float16 can be projected")
    if "cast" in given and w.dtype != torch.float32:
        wrong.append(f"cast is for a float32 w, not for {w.dtype}")
    if pattern.m > LARGEST_M and not pattern.is_dense:
        wrong.append(f"{pattern}: blocks are longer than {LARGEST_M} entries")
    for name, tensor in given.items():
        packed = (w.shape[0], -(-w.shape[1:].numel() // 8)) if name == "bits" and w.dim() else None
        if tensor.device.type != "cpu" or tensor.layout != torch.strided:
            wrong.append(f"{name} is a {tensor.layout} tensor on {tensor.device}, not a strided one on cpu")
        elif not native_library.plain(tensor):
            wrong.append(f"{name} is a {type(tensor).__name__}, which may keep its numbers elsewhere")
        elif packed is None and tensor.shape != w.shape:
            wrong.append(f"{name} has shape {tuple(tensor.shape)}, w {tuple(w.shape)}")
        elif packed is not None and tensor.shape != packed:
            wrong.append(f"{name} has shape {tuple(tensor.shape)}, {packed} is that of w's mask in bits")
        elif tensor.dtype != dtypes[name]:
            wrong.append(f"{name} is {tensor.dtype}, not {dtypes[name]}")
    if wrong:
        raise ValueError("; ".join(wrong))
    bits = given.pop("bits", None)
    columns = w.dim() == 2 and not all(_adjacent(tensor, 1) for tensor in given.values())
    if w.dim() == 3:
        wrong += [
            f"{name}: the entries of a row of a convolution lie apart; make it contiguous"
            for name, tensor in given.items()
            if not (len(tensor) == 0 or tensor[0].is_contiguous())
        ]
        wrong += [_overlap(name, tensor, False) for name, tensor in given.items() if name != "w"]
    elif columns and not all(_adjacent(tensor, 0) for tensor in given.values()):
        wrong += [
            f"{name}: the entries of a row are {tensor.stride(1)} apart; use contiguous rows, "
            "or tensors that all have their rows next to each other"
            for name, tensor in given.items()
            if not _adjacent(tensor, 1)
        ]
    else:
        wrong += [_overlap(name, tensor, columns) for name, tensor in given.items() if name != "w"]
    if columns and (reason := _why_not_panels(pattern.v)):
        wrong.append(f"{pattern}: {reason}")
    if bits is not None:
        wrong += [_overlap("bits", bits, False) if _adjacent(bits, 1) else "bits: the bytes of a row lie apart"]
    if any(wrong):
        raise ValueError("; ".join(filter(None, wrong)))
    return columns


def _adjacent(tensor: Tensor, dim: int) -> bool:
    return tensor.shape[dim] <= 1 or tensor.stride(dim) == 1


def _overlap(name: str, tensor: Tensor, columns: bool) -> str:
    """Why the lines of an output, its rows or columns, lie on top of each other; "" where they do not."""
    line, along = (1, 0) if columns else (0, 1)
    length = tensor.shape[along:].numel() if line == 0 else tensor.shape[along]
    if tensor.shape[line] <= 1 or tensor.stride(line) >= length:
        return ""
    lines = "columns" if columns else "rows"
    return f"{lines} of {name} overlap: they are {tensor.stride(line)} apart and {length} long"


@cache
def _library() -> native_library.Library:
    library = native_library.loaded()
    missing = _why_no_entry()
    if missing:
        raise RuntimeError(missing)
    library.handle.nmflow_project.argtypes = [POINTER(_Projection), c_void_p, POINTER(c_int64)]
    return library


def _why_no_entry() -> str | None:
    library = native_library.loaded()
    if hasattr(library.handle, "nmflow_project"):
        return None
    return f"{library.path} was built without the projection; build it again"
