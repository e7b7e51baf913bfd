"""What this machine can run, and why not the rest: the facts, gathered without changing or printing anything."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import nmflow

_REQUIRED = (
    "torch", "numpy", "accelerate", "safetensors", "pydantic", "pyyaml", "click", "rich", "matplotlib",
    "scikit-learn", "scipy",
)  # fmt: skip
_OPTIONAL = {
    "timm": "models by model=timm:NAME",
    "transformers": "its models; nothing of nmflow itself needs it",
    "tensorboard": "curves by tensorboard=true",
    "sentencepiece": "vocabularies of data=translation",
    "sacrebleu": "BLEU of data=translation",
    "lightning": "a callback for its Trainer",
    "datasets": "GLUE as the hub has it, in data=glue:PATH",
    "triton": "masks and products on GPUs, torch.compile there",
}
_EXTRAS = {"timm": "timm", "transformers": "transformers", "tensorboard": "tensorboard",
           "sentencepiece": "translation", "sacrebleu": "translation", "lightning": "lightning",
           "datasets": "datasets"}  # fmt: skip
"""Which of our extras brings a package."""
_COMPILERS = ("c++", "g++", "clang++", "cl")


@dataclass(frozen=True)
class Package:
    """A package, its version (None: not installed) and what it is for."""

    name: str
    version: str | None
    purpose: str
    required: bool


@dataclass(frozen=True)
class KernelFact:
    """A kernel of the registry; `why_not` is None where it runs here."""

    name: str
    task: str
    why_not: str | None


@dataclass(frozen=True)
class Facts:
    """Everything `nmflow doctor` knows."""

    nmflow: str
    python: str
    system: str
    cores: int
    torch: str | None
    threads: int | None
    """Threads that torch computes with."""
    cpu: str | None
    """The vector instructions that torch uses, such as AVX2."""
    devices: tuple[str, ...]
    compiler: str | None
    packages: tuple[Package, ...]
    kernels: tuple[KernelFact, ...]
    missing: tuple[str, ...]
    """What cannot run here, why, and what would help; a sentence each."""
    choices: tuple[str, ...] = ()
    """What a plan has chosen for which weight and number of tokens, and what the others took; a line each."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


def examine(plan: str | os.PathLike[str] | None = None) -> Facts:
    """Look at this machine, and at a plan that `nmflow.tune` wrote. Optional packages are looked up, not imported.

    Raises `ValueError` where the plan is none.
    """
    choices = () if plan is None else _choices(Path(plan))
    packages = _packages()
    versions = {package.name: package.version for package in packages}
    torch = _torch_facts() if versions["torch"] else _TorchFacts(None, None, None, (), None, ())
    compiler = next((found for name in _COMPILERS if (found := shutil.which(name))), None)
    return Facts(
        nmflow=nmflow.__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        cores=_cores(),
        torch=torch.version,
        threads=torch.threads,
        cpu=torch.cpu,
        devices=torch.devices,
        compiler=compiler,
        packages=packages,
        kernels=torch.kernels,
        missing=(*_missing_packages(packages), *_missing_hardware(torch, compiler)),
        choices=choices,
    )


def _choices(plan: Path) -> tuple[str, ...]:
    from nmflow.ops import native_plan, plan_file
    from nmflow.ops.gpu import choice

    try:
        is_native = plan_file.kind_of(plan.read_text(encoding="utf-8")) == native_plan.FORMAT
        return tuple((native_plan.NativePlan if is_native else choice.Plan).load(plan).lines())
    except ValueError as error:
        raise ValueError(f"{plan}: {error}") from None


@dataclass(frozen=True)
class _TorchFacts:
    version: str | None
    threads: int | None
    cpu: str | None
    devices: tuple[str, ...]
    no_accelerator: str | None
    kernels: tuple[KernelFact, ...]


def _torch_facts() -> _TorchFacts:
    import torch

    from nmflow.ops import kernels

    accelerators = _accelerators()
    built_for = (torch.version.cuda and f"CUDA {torch.version.cuda}") or (torch.version.hip and "ROCm")
    why = f"torch is built for {built_for} and finds no such device" if built_for else "torch is a CPU build"
    return _TorchFacts(
        version=torch.__version__,
        threads=torch.get_num_threads(),
        cpu=torch.backends.cpu.get_cpu_capability(),
        devices=("cpu", *accelerators),
        no_accelerator=None if accelerators else why,
        kernels=tuple(KernelFact(kernel.name, kernel.task, kernel.why_not_here()) for kernel in kernels()),
    )


def _accelerators() -> list[str]:
    import torch

    devices = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        memory = facts.total_memory / 2**30
        devices.append(f"cuda:{index} {facts.name}, {memory:.0f} GiB, capability {facts.major}.{facts.minor}")
    if torch.backends.mps.is_available():
        devices.append("mps")
    return devices


def _packages() -> tuple[Package, ...]:
    names = [(name, "", True) for name in _REQUIRED]
    names += [(name, purpose, False) for name, purpose in _OPTIONAL.items()]
    return tuple(Package(name, version_of(name), purpose, required) for name, purpose, required in names)


def version_of(name: str) -> str | None:
    """Of an installed package; None where it is missing."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _missing_packages(packages: tuple[Package, ...]) -> list[str]:
    missing = []
    for package in packages:
        if package.version is None and package.required:
            missing.append(f"{package.name} is not installed, and nmflow needs it: pip install {package.name}")
        elif package.version is None and package.name in _EXTRAS:
            extra = _EXTRAS[package.name]
            missing.append(f"{package.name} is not installed ({package.purpose}): pip install 'nmflow[{extra}]'")
    return missing


def _missing_hardware(torch: _TorchFacts, compiler: str | None) -> list[str]:
    missing = []
    if torch.no_accelerator:
        missing.append(f"no accelerator: {torch.no_accelerator}")
    if compiler is None:
        missing.append(
            f"no C++ compiler (of {', '.join(_COMPILERS)}): torch.compile's default backend cannot run on the CPU, "
            'backend="aot_eager" can'
        )
    missing += [
        f"kernel {kernel.name} ({kernel.task}): {kernel.why_not}" for kernel in torch.kernels if kernel.why_not
    ]
    return missing


def _cores() -> int:
    """Cores this process may use, which a container may have fewer of than the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
