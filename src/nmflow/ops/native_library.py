"""Where the native library is found, what it is told, and why it may be missing."""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.autograd import forward_ad

import nmflow

ISAS = ("portable", "avx2", "avx512")
"""Instruction sets, the better the higher; the place in the tuple is the library's number for it."""

DTYPES = {torch.float32: 0, torch.bfloat16: 1}

PLAIN = (torch.Tensor, torch.nn.Parameter)
"""Tensors that are their memory. The address of any other (a view on a stored weight, a traced one) means nothing."""

UNSUPPORTED = 2
"""The library's status where it has no kernel for what was asked."""

_ABI_VERSION = 9
_TROUBLE = {1: "a number is out of range", UNSUPPORTED: "there is no kernel for this", 3: "no memory for scratch space"}


class Layout(ctypes.Structure):
    """`nmflow_layout` of native/nmflow.h."""

    _fields_ = [
        *((name, c_int64) for name in ("rows", "cols", "n", "m")),
        *((name, c_int32) for name in ("dtype", "isa", "algorithm", "chunk", "value_bits", "lanes", "index_bits")),
        *((name, c_int64) for name in ("kept", "values_size", "index_size")),
    ]


class Weight(ctypes.Structure):
    """`nmflow_weight` of native/nmflow.h."""

    _fields_ = [
        ("layout", Layout),
        *((name, c_void_p) for name in ("values", "index")),
        *((name, c_int32) for name in ("activation", "split", "tile_tokens", "tile_rows")),
    ]


@dataclass(frozen=True)
class Library:
    handle: ctypes.CDLL
    path: Path
    best_isa: int
    has_bf16: bool
    parallel_for: int | None
    """Address of libtorch's `torch_parallel_for`; None: every product runs on one thread."""


def why_not(**facts: object) -> str | None:
    """Why the native product cannot run (facts as in `nmflow.ops.registry.Kernel`); None where it can."""
    if isinstance(_FOUND, str):
        return _FOUND
    device, dtype, m = facts.get("device"), facts.get("dtype"), facts.get("m")
    if device is not None and device != "cpu":
        return f"it runs on cpu, not on {device}"
    if dtype is not None and dtype not in DTYPES:
        return f"it takes float32 and bfloat16, not {dtype}"
    if isinstance(m, int) and m > 65536:
        return f"blocks of {m} are wider than 16-bit offsets reach"
    return None


def describe() -> dict[str, object]:
    """What was found, for people: the file, its best instruction set here, bfloat16, whose threads.

    Raises `RuntimeError` where the library is missing.
    """
    found = loaded()
    return {
        "path": str(found.path),
        "isa": ISAS[found.best_isa],
        "bf16": found.has_bf16,
        "threads": "torch" if found.parallel_for else "one (this torch has no torch_parallel_for)",
    }


def loaded() -> Library:
    """The loaded library. Raises `RuntimeError` saying why where there is none."""
    if isinstance(_FOUND, str):
        raise RuntimeError(_FOUND)
    return _FOUND


def recording() -> bool:
    """Whether calls are being written down (compile, export, jit.trace, a mode that watches torch's operators), and
    what torch does not see would be lost."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
    )


def transformed() -> bool:
    """Whether a tensor may stand for more than its numbers: in torch.func's transforms and forward-mode derivatives."""
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


def plain(*tensors: torch.Tensor | None) -> bool:
    """Whether all of these that are not None may be handed over by address: they are what their memory holds."""
    return all(
        tensor is None or (type(tensor) in PLAIN and tensor.layout is torch.strided and not tensor.is_neg())
        for tensor in tensors
    )


def _find() -> Library | str:
    """The library, or why there is none. `NMFLOW_NATIVE` names the file; else the newest of those that lie in a folder
    of the package (an editable installation has two) or were built by hand in build/ of a checkout."""
    named = os.environ.get("NMFLOW_NATIVE")
    if named:
        return _open(Path(named)) if Path(named).is_file() else f"NMFLOW_NATIVE names {named}, which is no file"
    places = [Path(folder) / "_native.so" for folder in nmflow.__path__]
    places.append(Path(__file__).parents[3] / "build" / "_native.so")
    built = [path for path in places if path.is_file()]
    if not built:
        return "the native library was not built (no C++ compiler at installation?); install one, then nmflow again"
    return _open(max(built, key=lambda path: path.stat().st_mtime))


def _open(path: Path) -> Library | str:
    try:
        handle = ctypes.CDLL(str(path))
        version = handle.nmflow_abi_version()
    except (OSError, AttributeError) as error:
        return f"{path} cannot be loaded: {error}"
    if version != _ABI_VERSION:
        return f"{path} has version {version} of the interface, this nmflow speaks {_ABI_VERSION}; build it again"
    handle.nmflow_layout_init.argtypes = [POINTER(Layout)]
    handle.nmflow_pack.argtypes = [POINTER(Layout), *[c_void_p] * 5]
    # The weight as a plain address: the cheapest argument there is, and at one token the call is half the time.
    handle.nmflow_linear.argtypes = [
        *(c_void_p, c_void_p, c_int64, c_void_p), *(c_void_p, c_int64, c_int64, c_void_p)
    ]
    return Library(handle, path, handle.nmflow_best_isa(), bool(handle.nmflow_has_bf16()), _torch_parallel_for())


def _torch_parallel_for() -> int | None:
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib", "torch_cpu.dll"):
        if (folder / name).is_file():
            function = getattr(ctypes.CDLL(str(folder / name)), "torch_parallel_for", None)
            return ctypes.cast(function, c_void_p).value if function is not None else None
    return None


def checked(status: int, what: str) -> None:
    """Raise `RuntimeError` where the library's `status` is not 0."""
    if status:
        raise RuntimeError(f"{what}: {_TROUBLE.get(status, f'status {status}')}")


_FOUND = _find()  # at import, so that a compiled graph reads an answer and does not search
