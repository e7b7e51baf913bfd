"""The product with a compressed weight, by whichever registered kernel takes it."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from nmflow.ops import reference as reference  # registers the kernel that is always there
from nmflow.ops.registry import select


def linear(
    x: Tensor,
    values_RS: Tensor,
    offsets_RS: Tensor,
    shape: tuple[int, int],
    n: int,
    m: int,
    bias: Tensor | None = None,
) -> Tensor:
    """y = x W^T + b, W [R, K] = `shape` in compressed form; arguments as in `nmflow.ops.reference.linear`.

    Raises `ValueError` with every kernel's reason where none takes it.
    """
    kernel = select(
        "linear",
        device=x.device.type,
        dtype=values_RS.dtype,
        shape=shape,
        n=n,
        m=m,
        tokens=x.shape[:-1].numel(),
    )
    return cast(Tensor, kernel.run(x, values_RS, offsets_RS, shape, n, m, bias))
