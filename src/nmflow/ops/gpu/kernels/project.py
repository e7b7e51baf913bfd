"""The step from W to W~ on a GPU: mask, decay, cast and the count of flips in one pass, for blocks of up to 1024.

Where V rows share their columns, a group of rows is read twice, once for its scores and once, from the cache, for W~.

A program holds a tile of blocks, [BLOCKS, WIDTH], WIDTH the power of two that M fits into. Magnitudes are compared as
the integers that their bits are: for IEEE numbers that order is the order of magnitudes, and NaN costs no branch.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _magnitude(w):
    """Bits of abs(w), as int32: they are ordered as the numbers are, and every NaN is made the same, above infinity."""
    if w.dtype == tl.float32:
        bits = tl.minimum(w.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0x7F800001)
    elif w.dtype == tl.bfloat16:
        bits = tl.minimum(w.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF, 0x7F81)
    else:
        bits = tl.minimum(w.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF, 0x7C01)
    return bits


@triton.jit
def _keep(keys, lane, N: tl.constexpr, WIDTH: tl.constexpr, METHOD: tl.constexpr):
    """Φ of a tile: in every line of `keys` the N highest, ties to the lowest index."""
    if METHOD == "first":  # N = 1: the first of the highest
        highest = tl.max(keys, axis=1, keep_dims=True)
        keep = lane == tl.min(tl.where(keys == highest, lane, WIDTH), axis=1, keep_dims=True)
    elif METHOD == "last":  # N = M - 1: all but the last of the lowest
        lowest = tl.min(keys, axis=1, keep_dims=True)
        keep = lane != tl.max(tl.where(keys == lowest, lane, -1), axis=1, keep_dims=True)
    else:  # all above the N-th, and of those equal to it as many as there is room for
        if METHOD == "topk":
            nth = tl.min(tl.topk(keys, N), axis=1, keep_dims=True)
        else:
            nth = tl.max(tl.where(lane == N - 1, tl.sort(keys, descending=True), -1), axis=1, keep_dims=True)
        above = (keys > nth).to(tl.int32)
        tied = (keys == nth).to(tl.int32)
        room = N - tl.sum(above, axis=1, keep_dims=True)
        keep = (above + tied * (tl.cumsum(tied, axis=1) <= room).to(tl.int32)) > 0
    return keep


@triton.jit
def _at(pointer, outer, first, line, lane, stride, M: tl.constexpr, COLUMNS: tl.constexpr):
    """Where a tile's entries lie: `outer` counts rows, or, where the rows are neighbours, blocks along the axis."""
    if COLUMNS:
        return pointer + outer * M * stride + first + lane.to(tl.int64) * stride + line
    return pointer + outer * stride + first * M + (line * M + lane)


@triton.jit
def project_kernel(
    w_ptr,
    mask_ptr,
    effective_ptr,
    cast_ptr,
    flips_ptr,
    decay,  # D
    inner,  # what tiles run over: blocks of a row, or rows
    tiles,  # tiles for one `outer`
    axis,  # K
    w_stride,  # from row to row, or from column to column
    mask_stride,
    effective_stride,
    cast_stride,
    N: tl.constexpr,
    M: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RAGGED: tl.constexpr,
    TAIL: tl.constexpr,
    METHOD: tl.constexpr,
):
    """Write Φ, W~ = W ⊙ [Φ + D·(1 - Φ)] and W~ rounded to bfloat16, each where there is a pointer; add up the flips.

    RAGGED: the last tile is not full. TAIL: a block is shorter than WIDTH, all of them or the last of a row.
    """
    program = tl.program_id(0)
    outer = (program // tiles).to(tl.int64)
    first = (program % tiles).to(tl.int64) * BLOCKS
    line = tl.arange(0, BLOCKS)[:, None]
    lane = tl.arange(0, WIDTH)[None, :]
    inside = tl.full((BLOCKS, WIDTH), True, tl.int1)  # the compiler drops a guard that is always true
    if RAGGED:
        inside &= first + line < inner
    if TAIL:
        inside &= (lane < M) & ((outer if COLUMNS else first + line) * M + lane < axis)

    w = tl.load(_at(w_ptr, outer, first, line, lane, w_stride, M, COLUMNS), mask=inside, other=0.0)
    keep = _keep(tl.where(inside, _magnitude(w), -1), lane, N, WIDTH, METHOD)

    bits = keep.to(tl.uint8)
    mask_at = _at(mask_ptr, outer, first, line, lane, mask_stride, M, COLUMNS)
    changed = tl.where(inside, tl.load(mask_at, mask=inside, other=0) != bits, False).to(tl.int32)
    tl.store(mask_at, bits, mask=inside)
    tl.atomic_add(flips_ptr, tl.sum(tl.sum(changed, axis=1), axis=0).to(tl.int64))

    pruned = tl.where(decay == 0.0, 0.0, w.to(tl.float32) * decay)  # a pruned NaN or inf is gone where D is 0
    effective = tl.where(keep, w, pruned.to(w.dtype))
    tl.store(_at(effective_ptr, outer, first, line, lane, effective_stride, M, COLUMNS), effective, mask=inside)
    if cast_ptr is not None:
        at = _at(cast_ptr, outer, first, line, lane, cast_stride, M, COLUMNS)
        tl.store(at, effective.to(tl.bfloat16), mask=inside)


@triton.jit
def project_groups_kernel(
    w_ptr,
    mask_ptr,
    effective_ptr,
    cast_ptr,
    flips_ptr,
    decay,  # D
    num_rows,  # R
    tiles,  # of a group
    axis,  # K
    w_stride,  # from row to row
    mask_stride,
    effective_stride,
    cast_stride,
    w_step,  # from entry to entry of a row
    mask_step,
    effective_step,
    cast_step,
    N: tl.constexpr,
    M: tl.constexpr,
    V: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    METHOD: tl.constexpr,
):
    """`project_kernel` where V rows share their columns: scores are added one row after the other, in row order."""
    program = tl.program_id(0)
    first_row = (program // tiles).to(tl.int64) * V
    lane = tl.arange(0, WIDTH)[None, :]
    entry = ((program % tiles) * BLOCKS + tl.arange(0, BLOCKS)[:, None]).to(tl.int64) * M + lane
    inside = (lane < M) & (entry < axis)
    scores = tl.zeros((BLOCKS, WIDTH), dtype=tl.float32)
    for step in range(V):
        row = first_row + step
        w = tl.load(w_ptr + row * w_stride + entry * w_step, mask=inside & (row + 0 * entry < num_rows), other=0.0)
        scores += tl.abs(w.to(tl.float32))
    keep = _keep(tl.where(inside, _magnitude(scores), -1), lane, N, WIDTH, METHOD)
    bits = keep.to(tl.uint8)
    changed = tl.zeros((BLOCKS, WIDTH), dtype=tl.int32)
    for step in range(V):
        row = first_row + step
        here = inside & (row + 0 * entry < num_rows)
        mask_at = mask_ptr + row * mask_stride + entry * mask_step
        changed += tl.where(here, tl.load(mask_at, mask=here, other=0) != bits, False).to(tl.int32)
        tl.store(mask_at, bits, mask=here)
        w = tl.load(w_ptr + row * w_stride + entry * w_step, mask=here, other=0.0)
        pruned = tl.where(decay == 0.0, 0.0, w.to(tl.float32) * decay)
        effective = tl.where(keep, w, pruned.to(w.dtype))
        tl.store(effective_ptr + row * effective_stride + entry * effective_step, effective, mask=here)
        if cast_ptr is not None:
            tl.store(cast_ptr + row * cast_stride + entry * cast_step, effective.to(tl.bfloat16), mask=here)
    tl.atomic_add(flips_ptr, tl.sum(tl.sum(changed, axis=1), axis=0).to(tl.int64))
