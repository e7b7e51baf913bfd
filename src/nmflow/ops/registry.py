"""Which kernel runs a task: every kernel says why not, the first that has no objection is chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

TASKS = ("linear", "project")
"""`linear`: y = x W^T + b from a compressed W. `project`: the mask Φ and W~ from a dense W."""


@dataclass(frozen=True)
class Kernel:
    """One way to compute one task.

    `why_not(**facts)` answers None where the kernel can run, else the reason, a phrase for people. A fact it is
    not told (None) is not held against it. It must not import what it asks about (`importlib.util.find_spec`
    looks without importing); `run` imports at its first call, so that nothing optional is loaded before it is chosen.

    Facts of `linear`: `device` (a type such as "cpu"), `dtype`, `shape` (out, in), `n`, `m`, `v` (rows that share
    their columns), `tokens` (rows of x), `needs_grad`, `autocast`, `same_dtype` (of x, weight and bias), `strided` (x
    is neither sparse nor nested), `transformed` (by torch.func, or for forward-mode derivatives).
    Facts of `project`: `device`, `dtype`, `m`, `v`, `strides` (of every tensor, two or three of each),
    `plain` (all are ordinary tensors).
    """

    name: str
    task: str
    why_not: Callable[..., str | None]
    run: Callable[..., Any]

    def why_not_here(self) -> str | None:
        """Why this kernel can run nothing at all on this machine; None where it can."""
        return self.why_not()


def why_torch(**facts: object) -> str | None:
    """Why only torch's own operations will do for a call of `linear`; None where a kernel of ours may."""
    if facts.get("needs_grad"):
        return "it has no backward"
    if facts.get("autocast"):
        return "autocast chooses the dtype"
    if facts.get("same_dtype") is False:
        return "x, weight and bias must be of one dtype"
    if facts.get("strided") is False:
        return "x is sparse or nested"
    if facts.get("transformed"):
        return "torch's transforms see its own operations alone"
    return None


_KERNELS: list[Kernel] = []


def register(kernel: Kernel) -> None:
    """Add a kernel; it is asked before those registered earlier, so the plain-torch one comes first and is asked last.

    Raises `ValueError` on an unknown task or a name that is taken within the task.
    """
    if kernel.task not in TASKS:
        raise ValueError(f'kernel "{kernel.name}": task "{kernel.task}" is none of {", ".join(TASKS)}')
    if any((kernel.task, kernel.name) == (known.task, known.name) for known in _KERNELS):
        raise ValueError(f'kernel "{kernel.name}": the task "{kernel.task}" has one of that name already')
    _KERNELS.append(kernel)


def kernels() -> tuple[Kernel, ...]:
    """Every kernel, in the order in which `select` asks."""
    return tuple(reversed(_KERNELS))


def select(task: str, **facts: object) -> Kernel:
    """The kernel that runs `task` where these facts hold. Raises `ValueError` listing every kernel's reason.

    >>> select("linear", needs_grad=True).name
    'dense'
    """
    reasons = []
    for kernel in kernels():
        if kernel.task == task:
            reason = kernel.why_not(**facts)
            if reason is None:
                return kernel
            reasons.append(f"{kernel.name}: {reason}")
    raise ValueError(f'no kernel for the task "{task}": {"; ".join(reasons) or "none is registered"}')
