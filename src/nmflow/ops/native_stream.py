"""The product with a dense weight for a few tokens, by the native library: as fast as the weight comes from memory."""

from __future__ import annotations

from ctypes import POINTER, Structure, byref, c_int32, c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor

from nmflow.ops import native
from nmflow.ops.dense import Activation
from nmflow.ops.native_library import DTYPES, ISAS, Library, checked, loaded, plain, recording, transformed, why_not

MOST_TOKENS = 4
"""More than these share a reading of the weight better in torch's blocked product."""


class _Dense(Structure):
    """`nmflow_dense` of native/stream.h."""

    _fields_ = [
        ("w", c_void_p),
        *((name, c_int64) for name in ("rows", "cols", "w_stride")),
        *((name, c_int32) for name in ("dtype", "isa", "activation")),
    ]


def streams(x: Tensor, weight_RK: Tensor, bias: Tensor | None) -> bool:
    """Whether `stream` takes these tensors and is the better product: few tokens, float32, nothing to learn from.

    (torch's own product in bfloat16 reads as fast.)
    """
    if why_not() is not None or loaded().best_isa == 0 or recording() or transformed():
        return False
    rows, axis = weight_RK.shape
    if not axis or x.shape[-1:] != (axis,) or not 0 < x.numel() <= MOST_TOKENS * axis or weight_RK.stride(1) != 1:
        return False
    given = (x, weight_RK) if bias is None else (x, weight_RK, bias)
    if not plain(*given) or any(t.dtype is not x.dtype or not t.is_cpu for t in given):
        return False
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        return False
    return x.dtype == torch.float32 and (bias is None or bias.shape == (rows,)) and not torch.is_autocast_enabled("cpu")


def stream(
    x: Tensor, weight_RK: Tensor, bias: Tensor | None = None, activation: Activation | None = None, isa: str = "auto"
) -> Tensor:
    """y = act(x W^T + b), x [..., K], W [R, K] with the entries of a row side by side; sums are float32.

    Takes what `streams` says yes to, and any number of tokens; checks nothing. There is no backward.
    """
    native_library = _library()
    rows, axis = weight_RK.shape
    x_TK = x.reshape(-1, axis).contiguous()
    y = x.new_empty((*x.shape[:-1], rows))
    bias = None if bias is None else bias.contiguous()
    number = -1 if isa == "auto" else ISAS.index(isa)
    dense = _Dense(
        weight_RK.data_ptr(), rows, axis, weight_RK.stride(0), DTYPES[x.dtype], number, native.ACTIVATIONS[activation]
    )
    where = None if bias is None else bias.data_ptr()
    status = native_library.handle.nmflow_stream(
        byref(dense), x_TK.data_ptr(), axis, where, y.data_ptr(), rows, x_TK.shape[0], native_library.parallel_for
    )
    checked(status, f"the product of {x_TK.shape[0]} tokens with a dense weight {(rows, axis)}")
    return y


@cache
def _library() -> Library:
    found = loaded()
    found.handle.nmflow_stream.argtypes = [
        POINTER(_Dense), *(c_void_p, c_int64, c_void_p), *(c_void_p, c_int64, c_int64, c_void_p)
    ]  # fmt: skip
    return found
