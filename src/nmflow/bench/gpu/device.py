"""The GPU that figures were measured on, and what it reaches at most."""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

import nmflow
from nmflow.bench.gpu.products import allowing_tf32
from nmflow.doctor import version_of
from nmflow.ops.gpu import measure

_SIDE = 8192
_MEBIBYTES = 1024
_SECONDS = 0.2


@dataclass(frozen=True)
class GpuSetup:
    """Facts without a word about the host or its user; `device` is None where there was no GPU."""

    device: str | None
    memory_gib: float | None
    capability: str | None
    torch: str
    cuda: str | None
    triton: str | None
    cusparselt: str | None
    python: str
    nmflow: str
    ceilings: dict[str, float] = field(default_factory=dict)
    """What the device reached: TFLOP/s of torch's products of 8192³ by kind, GB/s of a copy, read plus written."""

    def lines(self) -> list[str]:
        """For people, at the head of the figures."""
        software = f"nmflow {self.nmflow}, torch {self.torch}, CUDA {self.cuda}, Triton {self.triton}, "
        software += f"cuSPARSELt {self.cusparselt}, Python {self.python}"
        if self.device is None:
            return ["no CUDA device: nothing was measured", software]
        reached = ", ".join(f"{name} {value:.4g}" for name, value in self.ceilings.items())
        return [
            f"{self.device}, {self.memory_gib:.0f} GiB, capability {self.capability}",
            software,
            f"reached here: {reached}",
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


def examine() -> GpuSetup:
    """Facts and ceilings of the current CUDA device, where there is one; takes about two seconds."""
    there = torch.cuda.is_available()
    facts = torch.cuda.get_device_properties() if there else None
    lt = torch.backends.cusparselt.version() if torch.backends.cusparselt.is_available() else None
    return GpuSetup(
        device=facts.name if facts else None,
        memory_gib=facts.total_memory / 2**30 if facts else None,
        capability=f"{facts.major}.{facts.minor}" if facts else None,
        torch=torch.__version__,
        cuda=torch.version.cuda,
        triton=version_of("triton"),
        cusparselt=None if lt is None else str(lt),
        python=platform.python_version(),
        nmflow=nmflow.__version__,
        ceilings=ceilings("cuda", _SIDE, _MEBIBYTES, _SECONDS) if there else {},
    )


def ceilings(device: str, side: int, mebibytes: int, seconds: float) -> dict[str, float]:
    """TFLOP/s of products [side, side, side] and GB/s of a copy of so many MiB."""
    on_gpu = device != "cpu"
    found = {}
    a, b = (torch.randn(side, side, device=device) for _ in range(2))
    kinds = {"bfloat16": (torch.bfloat16, False), "TF32": (torch.float32, True), "float32": (torch.float32, False)}
    for name, (dtype, tf32) in kinds.items():
        product: Callable[[], object] = functools.partial(torch.mm, a.to(dtype), b.to(dtype))
        with allowing_tf32(tf32):
            taken = measure.medians({name: product}, on_gpu, seconds)[name]
        found[f"{name} TFLOP/s"] = 2 * side**3 / taken / 1e12
    source = torch.zeros(mebibytes << 18, device=device)
    target = torch.empty_like(source)
    taken = measure.medians({"copy": lambda: target.copy_(source)}, on_gpu, seconds)["copy"]
    found["copy GB/s"] = 2 * source.nbytes / taken / 1e9
    return found
