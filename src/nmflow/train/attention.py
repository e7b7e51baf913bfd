"""Attention of mixed precision on CPUs: of short sequences in float32, where torch's kernel is quicker."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch import library as operators

SHORT = 256
"""Keys up to which float32 is quicker, forward and backward together (`benchmarks/attention.py`)."""


@contextmanager
def attention_in_float32() -> Iterator[None]:
    """While it lasts, `scaled_dot_product_attention` under CPU autocast is in float32 for up to `SHORT` keys.

        softmax(Q Kᵀ / √d) V  in float32; what goes in may be bfloat16, and what comes out is, as it would be without

    Autocast's own rule is bfloat16 for all of it. Torch's backward pass of that (seen in 2.13 and 2.15) takes more than
    twice as long where sequences are short, and rounds more. Layers that write attention out by themselves, and other
    devices, are as before.
    """
    with operators._scoped_library("aten", "IMPL") as rules:  # torch's table of operators, for the whole process
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Warning only once for all operators")  # torch 2.13 says it
            rules.impl("scaled_dot_product_attention", _attention, "AutocastCPU", allow_override=True)
        yield


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    given = query.dtype if query.dtype == torch.float64 else torch.get_autocast_dtype("cpu")  # which leaves that alone
    dtype = torch.float32 if given != torch.float64 and key.shape[-2] <= SHORT else given
    mask = attn_mask.to(dtype) if attn_mask is not None and attn_mask.is_floating_point() else attn_mask
    query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    with torch.autocast("cpu", enabled=False):
        found = F.scaled_dot_product_attention(
            query, key, value, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    return found.to(given)
