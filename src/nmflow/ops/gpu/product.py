"""y = act(x W^T + b) by Triton, from a compressed W: the form a GPU reads it in, its tilings, and what is launched.

Letters: T tokens, R rows of W (outputs), K entries of the reduction axis, S slots of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nmflow.ops.dense import Activation
from nmflow.ops.gpu import available

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TOKENS = 8
"""Tokens of a tile where there are several: 16 bytes of bfloat16, one load; more make Triton move every weight between
threads through shared memory."""
UNROLL = 8
"""Slots whose loads are in flight together."""
_REDUCED = 1024
"""Numbers of a program that adds up parts."""


class SlotMajor(NamedTuple):
    """A compressed weight with its outputs next to each other; derived from values and offsets [R, S], once."""

    values: Tensor
    """[S, R]"""
    offsets: Tensor
    """[S, R], uint8, within a block of M"""


class Tiling(NamedTuple):
    """How a product by `gather_linear` is cut into programs."""

    rows: int
    """Outputs of a program."""
    tokens: int
    slots: int
    """Slots of a program; where a row has more, parts of y are added up afterwards."""
    warps: int


class SharedTiling(NamedTuple):
    """How a product by `shared_linear` is cut into programs."""

    rows: int
    """Of the V rows that share their columns, those of a program: a power of two, 16 or more."""
    tokens: int
    chunk: int
    """Slots of one step of the tensor cores."""
    warps: int


def slot_major(values_RS: Tensor, offsets_RS: Tensor) -> SlotMajor:
    """The weight as `gather_linear` reads it."""
    return SlotMajor(values_RS.t().contiguous(), offsets_RS.t().contiguous())


def tilings(num_rows: int, num_slots: int, num_tokens: int) -> list[Tiling]:
    """Sensible tilings, first the one that is likely to be the fastest.

    Rows are split over the slots until a large GPU has programs enough to keep its memory busy.

    >>> tilings(14336, 512, 1)[0], tilings(14336, 512, 1024)[0]
    (Tiling(rows=256, tokens=1, slots=16, warps=1), Tiling(rows=128, tokens=8, slots=512, warps=4))
    """
    tokens = 1 if num_tokens == 1 else _TOKENS
    found = []
    for rows, warps in ((256, 1), (512, 2)) if tokens == 1 else ((128, 4), (256, 8), (512, 16)):
        tiles = -(-num_rows // rows) * -(-num_tokens // tokens)
        for wanted in (2048, 4096, 1024, 1):  # warps over the whole GPU
            parts = max(1, min(wanted // (tiles * warps), num_slots // UNROLL))
            slots = max(1, -(-num_slots // (parts * UNROLL))) * UNROLL
            found.append(Tiling(rows, tokens, slots, warps))
    return list(dict.fromkeys(found))


def shared_tilings(v: int, num_tokens: int) -> list[SharedTiling]:
    """Sensible tilings where `v` rows share their columns, first the one that is likely to be the fastest.

    >>> shared_tilings(64, 8192)[0], shared_tilings(20, 5)[0]
    (SharedTiling(rows=64, tokens=128, chunk=64, warps=4), SharedTiling(rows=32, tokens=16, chunk=64, warps=4))
    """
    rows = max(16, min(128, 1 << (v - 1).bit_length()))
    widest = max(16, 1 << (num_tokens - 1).bit_length())
    found = [
        SharedTiling(rows, min(tokens, widest), chunk, 8 if rows * min(tokens, widest) > 8192 else 4)
        for tokens in (128, 256, 64)
        for chunk in (64, 32)
    ]
    return list(dict.fromkeys(found))


def why_not(**facts: object) -> str | None:
    """Why Triton cannot multiply; None where it can. Facts as in `nmflow.ops.registry.Kernel`."""
    missing = available.why_not(facts.get("device"))
    if missing:
        return missing
    dtype, m = facts.get("dtype"), facts.get("m")
    if dtype is not None and dtype not in DTYPES:
        return f"it takes float32, bfloat16 and float16, not {dtype}"
    if isinstance(m, int) and m > 256:
        return f"blocks of {m} have offsets of more than 8 bits"
    return None


def gather_linear(
    x: Tensor,
    weight: SlotMajor,
    n: int,
    m: int,
    bias: Tensor | None = None,
    activation: Activation | None = None,
    tiling: Tiling | None = None,
) -> Tensor:
    """y = act(x W^T + b), [..., R], of x [..., K]; sums in float32, the parts of a row in a fixed order.

    `tiling` is for tests and tuning.
    """
    from nmflow.ops.gpu.kernels.product import gather_kernel, reduce_kernel

    num_slots, num_rows = weight.values.shape
    num_tokens = x.shape[:-1].numel()
    y = x.new_empty(*x.shape[:-1], num_rows)
    if not y.numel():
        return y
    cut = tiling or tilings(num_rows, num_slots, num_tokens)[0]
    tiled = _in_tiles(x, cut.tokens)
    parts = max(1, -(-num_slots // cut.slots))
    target = y if parts == 1 else x.new_empty(parts, num_tokens, num_rows, dtype=torch.float32)
    with available.beside(x):
        gather_kernel[(-(-num_rows // cut.rows), len(tiled), parts)](
            tiled,
            weight.values,
            weight.offsets,
            _vector(bias),
            target,
            num_rows,
            num_slots,
            num_tokens,
            x.shape[-1],
            N=n,
            M=m,
            ROWS=cut.rows,
            TOKENS=cut.tokens,
            SLOTS=cut.slots,
            UNROLL=UNROLL,
            SPLIT=parts > 1,
            GUARDED=num_rows % cut.rows != 0 or num_slots % cut.slots != 0,
            ACTIVATION=activation if parts == 1 else None,
            num_warps=cut.warps,
        )
        if parts > 1:
            size = num_tokens * num_rows
            reduce_kernel[(-(-size // _REDUCED),)](
                target, _vector(bias), y, num_rows, size, PARTS=parts, BLOCK=_REDUCED, ACTIVATION=activation
            )
    return y


def shared_linear(
    x: Tensor,
    values_RS: Tensor,
    offsets_GS: Tensor,
    n: int,
    m: int,
    v: int,
    bias: Tensor | None = None,
    activation: Activation | None = None,
    tiling: SharedTiling | None = None,
) -> Tensor:
    """y = act(x W^T + b), [..., R], of x [..., K], where every `v` rows of W share their columns, by tensor cores.

    `offsets_GS`, [⌈R/v⌉, S], hold for the rows of a group. float32 is multiplied as torch's own products are: in full,
    or in TF32 where `torch.backends.cuda.matmul.allow_tf32` is set. `tiling` is for tests and tuning.
    """
    from nmflow.ops.gpu.kernels.product import shared_kernel

    num_rows, num_slots = values_RS.shape
    num_tokens = x.shape[:-1].numel()
    y = x.new_empty(*x.shape[:-1], num_rows)
    if not y.numel():
        return y
    cut = tiling or shared_tilings(v, num_tokens)[0]
    row_tiles, tiles = -(-v // cut.rows), -(-num_tokens // cut.tokens)
    x_KT = _transposed(x, tiles * cut.tokens)
    with available.beside(x):
        shared_kernel[(len(offsets_GS) * row_tiles, tiles)](
            x_KT,
            values_RS.contiguous(),
            offsets_GS.contiguous(),
            _vector(bias),
            y,
            num_rows,
            num_slots,
            num_tokens,
            x_KT.stride(0),
            N=n,
            M=m,
            V=v,
            TILES=row_tiles,
            ROWS=cut.rows,
            TOKENS=cut.tokens,
            SLOTS=-(-num_slots // cut.chunk) * cut.chunk,
            CHUNK=cut.chunk,
            GUARDED=num_slots % cut.chunk != 0 or v % cut.rows != 0 or num_rows % v != 0,
            PRECISION="tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
            ACTIVATION=activation,
            num_warps=cut.warps,
        )
    return y


def _vector(bias: Tensor | None) -> Tensor | None:
    """The bias as kernels read it, one number after the other: it may be expanded, or a part of something."""
    return None if bias is None else bias.contiguous()


def _in_tiles(x: Tensor, tokens: int) -> Tensor:
    """x [..., K] as [tile, K, token of the tile], the last tile filled up with whatever lies there."""
    x_TK = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    if tokens == 1:
        return x_TK.contiguous()[:, :, None]
    whole, rest = divmod(len(x_TK), tokens)
    tiled = x.new_empty(whole + (rest > 0), x.shape[-1], tokens)
    tiled[:whole] = x_TK[: whole * tokens].reshape(whole, tokens, x.shape[-1]).transpose(1, 2)
    if rest:
        tiled[whole, :, :rest] = x_TK[whole * tokens :].t()
    return tiled


def _transposed(x: Tensor, width: int) -> Tensor:
    """x [..., K] as [K, T], T filled up to `width` with whatever lies there: no token reads another one's."""
    x_TK = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    x_KT = x.new_empty(x.shape[-1], width)
    x_KT[:, : len(x_TK)] = x_TK.t()
    return x_KT
