"""Compute kernels behind one registry, and the plain-torch reference that every one of them must match."""

from __future__ import annotations

from nmflow.ops.bound import Bound, bind
from nmflow.ops.dispatch import forms_nbytes, linear, project
from nmflow.ops.projection import apply_mask, as_stored
from nmflow.ops.registry import Kernel, kernels, register, select

__all__ = [
    "Bound",
    "Kernel",
    "apply_mask",
    "as_stored",
    "bind",
    "forms_nbytes",
    "kernels",
    "linear",
    "project",
    "register",
    "select",
]
