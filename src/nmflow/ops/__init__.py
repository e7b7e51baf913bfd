"""Compute kernels behind one registry, and the plain-torch reference that every one of them must match."""

from __future__ import annotations

from nmflow.ops.bound import BoundLinear
from nmflow.ops.dispatch import linear, project
from nmflow.ops.projection import apply_mask
from nmflow.ops.registry import Kernel, kernels, register, select

__all__ = ["BoundLinear", "Kernel", "apply_mask", "kernels", "linear", "project", "register", "select"]
