"""y = act(x W^T + b) on the GPU's 2:4 cores, by torch's cuSPARSELt: which weights fit, their form, the call.

N of every M with N <= 2 and M a multiple of 4 leaves at most two in every four, so 1:4 to 1:128 are valid 2:4, for at
most twice the dense speed. The form holds 9/16 of the dense bytes whatever N:M is, beside the compressed ones.

Letters: T tokens, R rows of W (outputs), K entries of the reduction axis.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nmflow.ops.dense import Activation, activate

DTYPES = (torch.bfloat16, torch.float16)
_FROM = (8, 0)
"""The first GPUs with 2:4 cores."""
_SIDES = 16
"""What rows and columns of W must be a multiple of."""
_TOKENS = 8
"""What tokens are filled up to a multiple of."""


class Algorithm(NamedTuple):
    """One of cuSPARSELt's algorithms. What a number means depends on its version, the GPU and the sizes."""

    number: int


def why_not(**facts: Any) -> str | None:
    """Why the 2:4 cores cannot multiply; None where they can. Facts as in `nmflow.ops.registry.Kernel`."""
    device, dtype, shape = facts.get("device"), facts.get("dtype"), facts.get("shape")
    if device not in (None, "cuda"):
        return f"it runs on cuda, not on {device}"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if not torch.backends.cusparselt.is_available():
        return "this torch is built without cuSPARSELt"
    if torch.cuda.get_device_capability() < _FROM:
        return "this GPU has no 2:4 cores; they come with capability 8.0"
    return why_no_weight(dtype, shape, facts.get("n"), facts.get("m"))


def why_no_weight(dtype: Any = None, shape: Any = None, n: int | None = None, m: int | None = None) -> str | None:
    """Why a weight does not fit; None where it does, and of what is not told.

    >>> why_no_weight(torch.bfloat16, (4096, 1024), 1, 8), why_no_weight(n=4, m=8)
    (None, '4:8 may keep more than two of four')
    """
    if dtype is not None and dtype not in DTYPES:
        return f"it takes bfloat16 and float16, not {dtype}"
    if n is not None and m is not None and (n > 2 or m % 4):
        return f"{n}:{m} may keep more than two of four"
    if shape is not None and any(side % _SIDES for side in shape):
        return f"sides of {shape[0]}x{shape[1]} must be multiples of {_SIDES}"
    return None


def packed(dense_RK: Tensor) -> Tensor:
    """The weight as the 2:4 cores read it. It is trusted to be 2:4: compressing does not look."""
    return torch._cslt_compress(dense_RK.contiguous())


def algorithms(x: Tensor, weight: Tensor) -> list[Algorithm]:
    """Those that there are for this x and weight, the one that cuSPARSELt's own search prefers first.

    Its search is not relied on further: algorithms of some versions are wrong at some sizes (pytorch issue 155333).
    """
    try:
        found = torch._C._cusparselt.mm_search(  # type: ignore[attr-defined]  # no stub
            weight, _filled_up(x).t(), None, None, None, True
        )
        best, count = int(found[0]), int(found[-1])
    except (AttributeError, RuntimeError):  # an older torch, or a size for which nothing is found
        return [Algorithm(0)]
    return [Algorithm(number) for number in dict.fromkeys([best, *range(count)])]


def two_four_linear(
    x: Tensor,
    weight: Tensor,
    num_rows: int,
    bias: Tensor | None = None,
    activation: Activation | None = None,
    algorithm: Algorithm = Algorithm(0),  # noqa: B008  # a constant
) -> Tensor:
    """y = act(x W^T + b), [..., R], of x [..., K]; sums in float32, rounded once before the activation."""
    if not x.shape[:-1].numel():
        return x.new_empty(*x.shape[:-1], num_rows)
    filled = _filled_up(x)
    y_TR = torch._cslt_sparse_mm(
        weight,
        filled.t(),
        bias=None if bias is None else bias.contiguous(),
        transpose_result=True,
        alg_id=algorithm.number,
    )
    return activate(y_TR[: x.shape[:-1].numel()].reshape(*x.shape[:-1], num_rows), activation)


def _filled_up(x: Tensor) -> Tensor:
    """x as [T, K], tokens of zeros added up to a multiple of 8."""
    x_TK = x.reshape(-1, x.shape[-1]).contiguous()
    missing = -len(x_TK) % _TOKENS
    return F.pad(x_TK, (0, 0, 0, missing)) if missing else x_TK
