"""y = x W^T on a GPU from a compressed W: every kept weight gathers its own entry of x.

Values and offsets lie slot-major, [S, R], neighbouring outputs next to each other: a thread owns whole outputs, reads
its weights 16 bytes at a time, and sums without asking another one. x lies in tiles of tokens, [tile, K, token]: those
of one entry are one load, and all that a warp may gather from a block of M lies together, in few cache lines.

Letters: T tokens, R rows of W (outputs), K entries of the reduction axis, S slots of a row.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _activated(y, ACTIVATION: tl.constexpr):
    """The activations that may follow a product, of float32."""
    if ACTIVATION == "relu":
        y = tl.where(y > 0, y, tl.where(y != y, y, 0.0))
    elif ACTIVATION == "gelu":
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # tanh(z) = 2·sigmoid(2z) - 1
        y = y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    elif ACTIVATION == "silu":
        y = y * tl.sigmoid(y)
    return y


@triton.jit
def gather_kernel(
    x_ptr,
    values_ptr,
    offsets_ptr,
    bias_ptr,
    y_ptr,
    num_rows,  # R
    num_slots,  # S
    num_tokens,  # T
    axis,  # K
    N: tl.constexpr,
    M: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    SLOTS: tl.constexpr,
    UNROLL: tl.constexpr,
    SPLIT: tl.constexpr,
    GUARDED: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """One tile of y, [T, R]; where SPLIT, of the float32 part of y that SLOTS slots make, [parts, T, R].

    x is as long as the tiles of tokens are. GUARDED: a tile is not full of rows or slots.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first_token = tl.program_id(1) * TOKENS
    first = tl.program_id(2) * SLOTS
    in_rows = row < num_rows
    tile_ptr = x_ptr + tl.program_id(1).to(tl.int64) * axis * TOKENS
    if TOKENS == 1:
        token = first_token
        stored, written = in_rows, row
        total = tl.zeros((ROWS,), dtype=tl.float32)
    else:
        token = first_token + tl.arange(0, TOKENS)[None, :]
        stored, written = in_rows[:, None] & (token < num_tokens), row[:, None]
        total = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
    for start in range(0, SLOTS, UNROLL):
        for step in tl.static_range(UNROLL):
            slot = first + start + step
            at = slot.to(tl.int64) * num_rows + row
            block_ptr = tile_ptr + slot // N * (M * TOKENS)
            guard = tl.full((ROWS,), True, tl.int1)  # the compiler drops a guard that is always true
            if GUARDED:
                guard = in_rows & (slot + tl.zeros((ROWS,), tl.int32) < num_slots)
            value = tl.load(values_ptr + at, mask=guard, other=0.0)
            offset = tl.load(offsets_ptr + at, mask=guard, other=0)
            if TOKENS > 1:
                value, offset, guard = value[:, None], offset[:, None], guard[:, None]
            at_x = offset.to(tl.int32) * TOKENS
            at_x = at_x if TOKENS == 1 else at_x + tl.arange(0, TOKENS)[None, :]
            x = tl.load(block_ptr + at_x, mask=guard, other=0.0)
            total += value.to(tl.float32) * x.to(tl.float32)
    out_ptr = y_ptr + (token * num_rows + written)
    if SPLIT:
        tl.store(out_ptr + tl.program_id(2).to(tl.int64) * num_tokens * num_rows, total, mask=stored)
    else:
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + row, mask=in_rows, other=0.0).to(tl.float32)
            total += bias if TOKENS == 1 else bias[:, None]
        tl.store(out_ptr, _activated(total, ACTIVATION).to(y_ptr.dtype.element_ty), mask=stored)


@triton.jit
def reduce_kernel(
    parts_ptr,
    bias_ptr,
    y_ptr,
    num_rows,
    size,  # T · R
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """y = act(sum of the parts + b), the parts added in their order, so that every run gives the same bits."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts_ptr + part * size + at, mask=inside, other=0.0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + at % num_rows, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, _activated(total, ACTIVATION).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def shared_kernel(
    x_ptr,
    values_ptr,
    offsets_ptr,
    bias_ptr,
    y_ptr,
    num_rows,
    num_slots,
    num_tokens,
    x_stride,
    N: tl.constexpr,
    M: tl.constexpr,
    V: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    SLOTS: tl.constexpr,
    CHUNK: tl.constexpr,
    GUARDED: tl.constexpr,
    PRECISION: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """One tile of y where V rows share their columns: the entries of x are gathered once for all of them.

    Values lie as they are stored, [R, S], offsets [⌈R/V⌉, S]. A program takes ROWS of the V rows of a group (TILES
    programs a group) and goes over all slots, SLOTS of them with what fills up the last CHUNK. GUARDED: rows or slots
    are fewer than that.
    """
    group = tl.program_id(0) // TILES
    line = tl.program_id(0) % TILES * ROWS + tl.arange(0, ROWS)
    row = group * V + line
    in_rows = (line < V) & (row < num_rows)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    total = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
    weight_ptr = values_ptr + row[:, None].to(tl.int64) * num_slots
    offset_ptr = offsets_ptr + group.to(tl.int64) * num_slots
    for start in range(0, SLOTS, CHUNK):
        slot = start + tl.arange(0, CHUNK)
        in_slots, guard = tl.full((CHUNK,), True, tl.int1), tl.full((ROWS, CHUNK), True, tl.int1)
        if GUARDED:
            in_slots = slot < num_slots
            guard = in_rows[:, None] & in_slots[None, :]
        column = slot // N * M + tl.load(offset_ptr + slot, mask=in_slots, other=0).to(tl.int32)
        weight = tl.load(weight_ptr + slot[None, :], mask=guard, other=0.0)
        x_at = x_ptr + column[:, None].to(tl.int64) * x_stride + token[None, :]
        x = tl.load(x_at, mask=in_slots[:, None], other=0.0)
        total = tl.dot(weight, x, total, input_precision=PRECISION)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + row, mask=in_rows, other=0.0).to(tl.float32)[:, None]
    y_at = y_ptr + token[None, :].to(tl.int64) * num_rows + row[:, None]
    stored = in_rows[:, None] & (token < num_tokens)[None, :]
    tl.store(y_at, _activated(total, ACTIVATION).to(y_ptr.dtype.element_ty), mask=stored)
