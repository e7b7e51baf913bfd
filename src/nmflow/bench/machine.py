"""Where figures were measured: the facts of the machine that they depend on, and what it reaches at most."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import nmflow
from nmflow.ops import native_library, native_measure


@dataclass(frozen=True)
class Machine:
    """Facts without a word about the host or its user."""

    cpu: str
    cores: int
    """That this process may use."""
    threads: int
    ram_gib: float | None
    system: str
    python: str
    torch: str
    nmflow: str
    isa: str
    """The best instruction set of the native library here."""
    bf16: bool
    """The machine multiplies bfloat16 itself."""
    load: float | None
    """Mean number of processes that wanted a core in the minute before."""


@dataclass(frozen=True)
class Ceilings:
    """What the machine reached, on the threads of the benchmark; 10^9 a second."""

    fma_gflops: float
    """float32 multiply-adds in registers, by the native library; a multiply-add is two operations."""
    bf16_gflops: float | None
    """bfloat16 dot products with float32 sums, likewise; None where the machine has none."""
    read_gbs: float
    """Reading 256 MiB, by the native library."""
    copy_gbs: float
    """Copying 128 MiB by torch, bytes read plus bytes written."""
    read_alone_gbs: float | None = None
    """Reading by one thread. Where all read little more, their cores share one way to memory, as those of one die do.
    None in older results."""

    def gflops(self, dtype: torch.dtype) -> float:
        """The peak of a product in `dtype`; float32's where bfloat16 has none of its own."""
        return self.bf16_gflops or self.fma_gflops if dtype == torch.bfloat16 else self.fma_gflops


@dataclass(frozen=True)
class Setup:
    """The machine and its ceilings, as every result carries them."""

    machine: Machine
    ceilings: Ceilings

    def lines(self) -> list[str]:
        """For people, at the head of the figures."""
        machine, ceilings = self.machine, self.ceilings
        ram = "" if machine.ram_gib is None else f", {machine.ram_gib:.0f} GiB"
        load = "" if machine.load is None else f", load {machine.load:.2f}"
        bf16 = "" if ceilings.bf16_gflops is None else f" (bfloat16 dot products {ceilings.bf16_gflops:.0f})"
        alone = "" if ceilings.read_alone_gbs is None else f" (one thread {ceilings.read_alone_gbs:.0f})"
        return [
            f"{machine.cpu}, {machine.cores} cores, {machine.threads} threads{ram}, {machine.isa}{load}",
            f"nmflow {machine.nmflow}, torch {machine.torch}, Python {machine.python}, {machine.system}",
            f"reached here: {ceilings.fma_gflops:.0f} GFLOP/s in float32{bf16}, "
            f"read {ceilings.read_gbs:.0f} GB/s{alone}, copy {ceilings.copy_gbs:.0f} GB/s",
        ]

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Setup:
        """The inverse of `dataclasses.asdict`."""
        return cls(Machine(**found["machine"]), Ceilings(**found["ceilings"]))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


def require_native() -> None:
    """Raise `ValueError` saying how to get the native library, where there is none to measure."""
    missing = native_library.why_not()
    if missing:
        raise ValueError(
            f"nothing to measure: {missing}. Reinstall nmflow where there is a C++ compiler, or build it in a copy "
            "of the source: cmake -S native -B build && cmake --build build"
        )


def examine(mebibytes: int = 256) -> Setup:
    """Facts and ceilings with torch's present threads, measured on `mebibytes` of memory; takes about a second."""
    described = native_library.describe()
    machine = Machine(
        cpu=_cpu(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        ram_gib=_ram_gib(),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        torch=torch.__version__,
        nmflow=nmflow.__version__,
        isa=str(described["isa"]),
        bf16=bool(described["bf16"]),
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    )
    peak = native_measure.fma_gflops()
    assert peak is not None  # every instruction set has multiply-adds in float32
    ceilings = Ceilings(
        fma_gflops=peak,
        bf16_gflops=native_measure.fma_gflops(torch.bfloat16),
        read_gbs=native_measure.read_gbs(mebibytes),
        copy_gbs=native_measure.copy_gbs(mebibytes // 2),
        read_alone_gbs=native_measure.read_gbs(mebibytes, alone=True),
    )
    return Setup(machine, ceilings)


def _cpu() -> str:
    """The processor's name where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "Processor") and value.strip():
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _ram_gib() -> float | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (AttributeError, ValueError, OSError):
        return None
