"""Where a run ran: versions, threads, devices and the commit, without a word about the host or its user."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

import nmflow
from nmflow.doctor import version_of

_PACKAGES = ("torch", "numpy", "accelerate", "safetensors", "timm", "transformers", "sentencepiece",
             "scikit-learn")  # fmt: skip
_GIT_SECONDS = 5.0


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """Facts that a run's figures may depend on, for environment.json."""
    device = accelerator.device
    return {
        "nmflow": nmflow.__version__,
        "commit": git_commit(Path(nmflow.__file__).parent),
        "python": platform.python_version(),
        "packages": {name: version_of(name) for name in _PACKAGES},
        "system": platform.system(),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
    }


def git_commit(folder: Path) -> str | None:
    """The commit that the files of `folder` are from, with `-dirty` where they differ; None outside of git."""
    head = _git(folder, "log", "-1", "--format=%H", "--", ".")  # empty where git does not know these files
    if not head:
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    return f"{commit}-dirty" if _git(folder, "status", "--porcelain", "--", ".") else commit


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
