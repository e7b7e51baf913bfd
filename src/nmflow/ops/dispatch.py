"""Tasks by whichever registered kernel takes them: the product with a compressed weight, and the step from W to W~.

A GPU's kernels and the native library, where there are any, are asked first; plain torch is always there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from nmflow.masks import Remainder
from nmflow.ops import dense as dense  # registers plain torch, which is always there
from nmflow.ops import native, native_library, native_project
from nmflow.ops import projection as projection
from nmflow.ops.dense import Activation
from nmflow.ops.gpu import linear as gpu_linear
from nmflow.ops.gpu import project as gpu_project
from nmflow.ops.registry import Kernel, register, select, why_torch
from nmflow.pattern import Pattern


def linear(
    x: Tensor,
    values_RS: Tensor,
    offsets_GS: Tensor,
    shape: tuple[int, int],
    n: int,
    m: int,
    bias: Tensor | None = None,
    activation: Activation | None = None,
    v: int = 1,
) -> Tensor:
    """y = act(x W^T + b), W [R, K] = `shape` in compressed form; arguments as in `nmflow.ops.reference.linear`.

    Raises `ValueError` with every kernel's reason where none takes it.
    """
    kernel = select_linear(x, values_RS, shape, n, m, bias, v)
    return cast(Tensor, kernel.run(x, values_RS, offsets_GS, shape, n, m, bias, activation, v))


def select_linear(
    x: Tensor, values_RS: Tensor, shape: tuple[int, int], n: int, m: int, bias: Tensor | None, v: int = 1
) -> Kernel:
    """The kernel that `linear` runs."""
    lead = x.shape[:-1]
    compiling = torch.compiler.is_compiling()
    return select(
        "linear",
        device=x.device.type,
        dtype=values_RS.dtype,
        shape=shape,
        n=n,
        m=m,
        v=v,
        tokens=math.prod(lead) if compiling else lead.numel(),  # a symbol, in a graph for any number of tokens
        needs_grad=torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)),
        autocast=torch.is_autocast_enabled(x.device.type),
        same_dtype=x.dtype == values_RS.dtype and (bias is None or bias.dtype == x.dtype),
        strided=x.layout is torch.strided and not x.is_nested,
        transformed=not compiling and native_library.transformed(),
    )


def forms_nbytes(values_RS: Tensor) -> int:
    """Bytes of the forms that kernels made of a compressed weight so far, in memory beside values and offsets.

    A form is made at the first product that reads it (one token and many may read two), and goes with the values.
    """
    return sum(each.forms_nbytes(values_RS) for each in (dense, native, gpu_linear))


def project(
    w: Tensor, pattern: Pattern, decay: float, remainder: Remainder, mask: Tensor, effective: Tensor
) -> Tensor | int:
    """Write Φ into `mask` and W~ into `effective`; how many entries of the mask changed.

    All three are [R, K] or all are [R, C, T], the weight of a convolution as it is stored (see `rows_in_place`).
    Arguments as in `nmflow.ops.projection.project`.
    """
    kernel = select(
        "project",
        device=w.device.type,
        dtype=w.dtype,
        m=pattern.m,
        v=pattern.v,
        strides=(w.stride(), mask.stride(), effective.stride()),
        plain=native_library.plain(w, mask, effective),
    )
    return cast("Tensor | int", kernel.run(w, pattern, decay, remainder, mask, effective))


def _why_not_native_linear(**facts: Any) -> str | None:
    reason = why_torch(**facts) or native_library.why_not(**facts)
    told = {name: facts.get(name) for name in ("shape", "n", "m", "dtype", "tokens")}
    if reason is None and None not in told.values() and not torch.compiler.is_compiling():  # the operator asks then
        return native.why_dense(**told)  # type: ignore[arg-type]  # facts have no types, the registry's word for it
    return reason


def _why_not_on_gpu(kernel: str) -> Callable[..., str | None]:
    return lambda **facts: why_torch(**facts) or gpu_linear.why_not(kernel, **facts)


def _by(operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`linear` by an implementation of the torch operator."""

    def run(
        x: Tensor,
        values_RS: Tensor,
        offsets_GS: Tensor,
        shape: tuple[int, int],
        n: int,
        m: int,
        bias: Tensor | None = None,
        activation: Activation | None = None,
        v: int = 1,
    ) -> Tensor:
        # While a graph is traced, and for tensors that are more than numbers, torch's; else without torch between.
        traced = native_library.recording() or not native_library.plain(x, bias)
        chosen = torch.ops.nmflow.linear if traced else operator
        return cast(Tensor, chosen(x, values_RS, offsets_GS, bias, *shape, n, m, activation, v))

    return run


def _why_not_native_project(**facts: object) -> str | None:
    return native_project.why_not(**facts)


def _native_project(
    w: Tensor, pattern: Pattern, decay: float, remainder: Remainder, mask: Tensor, effective: Tensor
) -> int:
    return native_project.project_native(w, pattern, decay, remainder, mask, effective)


register(Kernel("native", "linear", _why_not_native_linear, _by(native.operator)))
register(Kernel("native", "project", _why_not_native_project, _native_project))
register(Kernel("cusparselt", "linear", _why_not_on_gpu("cusparselt"), _by(gpu_linear.operator)))
register(Kernel("triton", "linear", _why_not_on_gpu("triton"), _by(gpu_linear.operator)))
register(Kernel("triton", "project", gpu_project.why_not, projection.by_rows(gpu_project.project)))
native.OPERATORS.impl("linear", gpu_linear.operator, "CUDA")  # type: ignore[no-untyped-call]  # not annotated
