"""The step from W to W~ by Triton: what is launched for which weight.

Shape suffixes: R rows, K entries of the reduction axis.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nmflow.masks import Remainder, rows_mask
from nmflow.ops import projection
from nmflow.ops.gpu import available
from nmflow.pattern import Pattern

LARGEST_M = 1024
"""A block lies in the registers of one program."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ROWS = 2048, 16
"""Entries of a program's tile, and of a thread: four wide loads in flight, and few registers."""
_COLUMNS = 4096, 64
"""The same where rows are neighbours: a thread that holds more of a block has fewer to ask for the rest of it."""
_STRIP = 256
"""Entries of a tile that goes down V rows."""


class Tiling(NamedTuple):
    """How a weight is cut into programs."""

    width: int
    blocks: int
    warps: int
    method: str


def tiling(n: int, m: int, inner: int, columns: bool, entries: int = 0) -> Tiling:
    """Tile (of `entries`, by default what suits) and selection for a pattern, over `inner` blocks, or rows (`columns`).

    >>> tiling(1, 16, 4096, columns=False), tiling(3, 5, 8, columns=False)
    (Tiling(width=16, blocks=128, warps=4, method='first'), Tiling(width=8, blocks=8, warps=1, method='sort'))
    """
    width = _power_of_two(m)
    usual, a_thread = _COLUMNS if columns else _ROWS
    blocks = min(max(1, (entries or usual) // width), _power_of_two(inner))
    if n == 1:
        method = "first"
    elif n == m - 1 and m == width:  # a filled-up block has more than one entry to let go of
        method = "last"
    else:
        method = "topk" if n & (n - 1) == 0 else "sort"
    return Tiling(width, blocks, max(1, width * blocks // (32 * a_thread)), method)


def _power_of_two(number: int) -> int:
    """The smallest that is not below `number`."""
    return 1 << (number - 1).bit_length()


def why_not(**facts: object) -> str | None:
    """Why Triton cannot project; None where it can. Facts as in `nmflow.ops.registry.Kernel`."""
    missing = available.why_not(facts.get("device"))
    if missing:
        return missing
    if facts.get("plain") is False:
        return "a tensor of another class than torch's own may keep its numbers elsewhere"
    dtype, m, strides = facts.get("dtype"), facts.get("m"), facts.get("strides")
    if dtype is not None and dtype not in _DTYPES:
        return f"it takes float32, bfloat16 and float16, not {dtype}"
    if isinstance(m, int) and m > LARGEST_M:
        return f"blocks of {m} are longer than {LARGEST_M} entries"
    if not isinstance(strides, tuple) or len(strides[0]) == 3:  # a convolution is copied to rows that fit
        return None
    if not any(all(stride[dim] == 1 for stride in strides) for dim in (1, 0)):
        return "the entries of a row, or else the rows, must lie next to each other, in every tensor alike"
    return None


def project(
    w_RK: Tensor, pattern: Pattern, decay: float, remainder: Remainder, mask_RK: Tensor, effective_RK: Tensor
) -> Tensor:
    """`project_triton` where it has been seen to agree with plain torch on this device, else plain torch."""
    agrees = agreement(pattern, w_RK.dtype, w_RK.device, w_RK.stride(1) != 1)
    chosen = project_triton if agrees else projection.project
    return chosen(w_RK, pattern, decay, remainder, mask_RK, effective_RK)


@functools.cache
def agreement(pattern: Pattern, dtype: torch.dtype, device: torch.device, columns: bool) -> bool:
    """Whether Triton's projection writes the bits of plain torch's; asked once a process, on random numbers with ties.

    A compiler and a driver stand between a kernel and its result, and a wrong mask would train on without a sound.
    Warns where the answer is no, or where Triton fails.
    """
    generator = torch.Generator().manual_seed(0)
    size = pattern.m * 3 + 1, 48 if pattern.v == 1 else 2 * pattern.v + 1
    w = (4 * torch.randn(size, generator=generator)).round() / 8
    w = (w.t() if columns else w.t().contiguous()).to(device, dtype)
    outputs = [(torch.zeros_like(w, dtype=torch.bool), torch.full_like(w, torch.nan)) for _ in range(2)]
    try:
        flips = [
            int(run(w, pattern, 0.5, "partial", mask, effective))
            for run, (mask, effective) in zip((project_triton, projection.project), outputs, strict=True)
        ]
    except Exception as error:  # whatever a compiler dies of, plain torch can do it
        warnings.warn(f"Triton's projection to {pattern} failed, plain torch is used: {error}", stacklevel=2)
        return False
    if flips[0] == flips[1] and all(torch.equal(ours, theirs) for ours, theirs in zip(*outputs, strict=True)):
        return True
    what = f"Triton's projection to {pattern} of {dtype} is wrong on {device}"
    warnings.warn(f"{what}, plain torch is used", stacklevel=2)
    return False


def project_triton(
    w_RK: Tensor,
    pattern: Pattern,
    decay: float,
    remainder: Remainder,
    mask_RK: Tensor,
    effective_RK: Tensor,
    cast_RK: Tensor | None = None,
) -> Tensor:
    """Write Φ into `mask_RK` and W~ into `effective_RK`; how many entries of the mask changed, on W's device.

        W~ = W ⊙ [Φ + D·(1 - Φ)],    D = `decay`

    Bit for bit what `nmflow.ops.projection.project` writes. `mask_RK` is bool, `effective_RK` of W's dtype,
    `cast_RK` takes W~ rounded to bfloat16. Tensors lie alike: all with the entries of a row next to each other, or all
    with the rows. Raises `ValueError` where M does not divide K, or V does not divide R, under `remainder="error"`.
    Source: Bambhaniya et al. 2025, section 3.
    """
    num_rows, axis = w_RK.shape
    if (axis % pattern.m or num_rows % pattern.v) and remainder != "partial":
        rows_mask(torch.empty(w_RK.shape, device="meta"), pattern, remainder)  # raises where a remainder is refused
        pattern = Pattern.dense()
    flips = torch.zeros((), dtype=torch.int64, device=w_RK.device)
    if pattern.is_dense or not w_RK.numel():
        flips = mask_RK.numel() - mask_RK.count_nonzero()
        mask_RK.fill_(True)
        effective_RK.copy_(w_RK)
        if cast_RK is not None:
            cast_RK.copy_(w_RK)
        return flips
    tensors = [w_RK, mask_RK.view(torch.uint8), effective_RK] + ([] if cast_RK is None else [cast_RK])
    launch = _launch if pattern.v == 1 else _launch_groups
    with available.beside(w_RK):
        launch(tensors, flips, pattern, float(decay))
    for tensor in (mask_RK, effective_RK, cast_RK):
        if tensor is not None and not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)  # written behind autograd's back
    return flips


def _launch(tensors: list[Tensor], flips: Tensor, pattern: Pattern, decay: float) -> None:
    """Each row for itself."""
    from nmflow.ops.gpu.kernels.project import project_kernel

    num_rows, axis = tensors[0].shape
    columns = not all(tensor.stride(1) == 1 or axis == 1 for tensor in tensors)
    num_blocks = -(-axis // pattern.m)
    outer, inner = (num_blocks, num_rows) if columns else (num_rows, num_blocks)
    if not columns and axis % pattern.m == 0 and all(tensor.is_contiguous() for tensor in tensors):
        outer, inner = 1, num_rows * num_blocks  # rows follow each other without a gap
        axis *= num_rows
    cut = tiling(pattern.n, pattern.m, inner, columns)
    tiles = -(-inner // cut.blocks)
    project_kernel[(outer * tiles,)](
        *_four(tensors, None),
        flips,
        decay,
        inner,
        tiles,
        axis,
        *_four([tensor.stride(1 if columns else 0) for tensor in tensors], 0),
        N=pattern.n,
        M=pattern.m,
        WIDTH=cut.width,
        BLOCKS=cut.blocks,
        COLUMNS=columns,
        RAGGED=inner % cut.blocks != 0,
        TAIL=axis % cut.width != 0 or pattern.m != cut.width,
        METHOD=cut.method,
        num_warps=cut.warps,
    )


def _launch_groups(tensors: list[Tensor], flips: Tensor, pattern: Pattern, decay: float) -> None:
    """V rows together; a program goes down a strip of them, narrow, so that there are programs enough."""
    from nmflow.ops.gpu.kernels.project import project_groups_kernel

    num_rows, axis = tensors[0].shape
    cut = tiling(pattern.n, pattern.m, -(-axis // pattern.m), columns=False, entries=_STRIP)
    tiles = -(-axis // (pattern.m * cut.blocks))
    project_groups_kernel[(-(-num_rows // pattern.v) * tiles,)](
        *_four(tensors, None),
        flips,
        decay,
        num_rows,
        tiles,
        axis,
        *_four([tensor.stride(0) for tensor in tensors], 0),
        *_four([tensor.stride(1) for tensor in tensors], 0),
        N=pattern.n,
        M=pattern.m,
        V=pattern.v,
        WIDTH=cut.width,
        BLOCKS=cut.blocks,
        METHOD=cut.method,
        num_warps=max(1, cut.width * cut.blocks // 128),
    )


def _four(given: list[Any], missing: object) -> list[Any]:
    """Of W, mask, W~ and cast, the last of which may be missing."""
    return [*given, *[missing] * (4 - len(given))]
