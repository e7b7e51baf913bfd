"""What the machine reaches at most by the native library: multiply-adds and reading, to hold a kernel's speed against.

Each answers with the best of several tries: a ceiling is what is possible, other work on the machine only lowers it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from ctypes import POINTER, byref, c_double, c_float, c_int32, c_int64, c_void_p, cast
from functools import cache

import torch

from nmflow.ops.native_library import DTYPES, ISAS, UNSUPPORTED, Library, checked, loaded

_ROUNDS = 400_000
"""Of five to ten cycles: about a millisecond. Waking a thread is nothing beside it, and other work seldom gets in."""


def fma_gflops(dtype: torch.dtype = torch.float32, isa: str | None = None, seconds: float = 0.5) -> float | None:
    """Multiply-adds in registers on torch's threads, 10^9 operations a second (one multiply-add is two).

    bfloat16: dot products of pairs with float32 sums; None where the machine has none. `isa`: as in `native.prepare`.
    Raises `RuntimeError` where the library is missing, `ValueError` on another dtype or instruction set.
    """
    if dtype not in DTYPES:
        raise ValueError(f"multiply-adds are measured in float32 and bfloat16, not {dtype}")
    native, number, threads = _library(), _number(isa), torch.get_num_threads()
    flops, best = c_double(), 0.0
    end = time.perf_counter() + seconds
    while best == 0.0 or time.perf_counter() < end:
        start = time.perf_counter()
        status = native.handle.nmflow_spin(number, DTYPES[dtype], _ROUNDS, threads, _threads(native), byref(flops))
        took = time.perf_counter() - start
        if status == UNSUPPORTED:
            return None
        checked(status, "multiply-adds to measure their speed")
        best = max(best, flops.value / took / 1e9)
    return best


def read_gbs(mebibytes: int = 256, isa: str | None = None, tries: int = 8, alone: bool = False) -> float:
    """Reading memory that no cache holds, on torch's threads or `alone` on this one, 10^9 bytes a second."""
    read, best = reader(mebibytes, isa, alone), 0.0
    for _ in range(tries):
        start = time.perf_counter()
        nbytes = read()
        best = max(best, nbytes / (time.perf_counter() - start) / 1e9)
    return best


def reader(mebibytes: int, isa: str | None = None, alone: bool = False) -> Callable[[], int]:
    """Takes memory; each call reads all of it once, on torch's threads or on this one, and answers how many bytes."""
    native, number, threads = _library(), _number(isa), 1 if alone else torch.get_num_threads()
    parallel_for = None if alone else _threads(native)
    x = torch.ones(mebibytes << 18)
    sums = c_double()
    address = cast(x.data_ptr(), POINTER(c_float))

    def read() -> int:
        status = native.handle.nmflow_read(number, address, x.numel(), threads, parallel_for, byref(sums))
        checked(status, "reading memory to measure its speed")
        if sums.value != x.numel():
            raise RuntimeError(f"reading {x.numel()} ones gave {sums.value}; the measurement read something else")
        return x.nbytes

    return read


def copy_gbs(mebibytes: int = 128, tries: int = 8) -> float:
    """torch's own copy of such memory, bytes read plus bytes written, 10^9 a second; needs no library."""
    x = torch.ones(mebibytes << 18)
    y = torch.empty_like(x)
    best = 0.0
    for _ in range(tries):
        start = time.perf_counter()
        y.copy_(x)
        best = max(best, 2 * x.nbytes / (time.perf_counter() - start) / 1e9)
    return best


def _number(isa: str | None) -> int:
    if isa is not None and isa not in ISAS:
        raise ValueError(f'isa "{isa}": one of {", ".join(ISAS)}')
    return -1 if isa is None else ISAS.index(isa)


def _threads(native: Library) -> int | None:
    return native.parallel_for if torch.get_num_threads() > 1 else None


@cache
def _library() -> Library:
    native = loaded()
    if not hasattr(native.handle, "nmflow_spin"):
        raise RuntimeError(f"{native.path} was built without measurements; build it again")
    native.handle.nmflow_spin.argtypes = [c_int32, c_int32, c_int64, c_int64, c_void_p, POINTER(c_double)]
    native.handle.nmflow_read.argtypes = [c_int32, POINTER(c_float), c_int64, c_int64, c_void_p, POINTER(c_double)]
    return native
