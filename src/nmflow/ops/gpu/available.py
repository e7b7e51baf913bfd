"""Whether Triton can run, and on which tensors; asked without importing it."""

from __future__ import annotations

import functools
import importlib.util
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def why_not(device: object = None) -> str | None:
    """Why Triton's kernels cannot run on a device of this type (None: on any here); None where they can."""
    if device not in (None, "cuda"):
        return f"it runs on cuda, not on {device}"
    if not _installed():
        return "Triton is not installed; pip install triton (torch for CUDA brings it)"
    return None if torch.cuda.is_available() else "there is no CUDA device"


def beside(tensor: Tensor) -> AbstractContextManager[object]:
    """Where a launch must stand: Triton runs on the current device, whatever device its tensors are on."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None
