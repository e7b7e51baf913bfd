"""Who multiplies with one weight, each as a module: torch's layer, oneDNN's packed weight, torch's CSR, and ours."""

from __future__ import annotations

import warnings
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nmflow
from nmflow.masks import rows_mask
from nmflow.ops import native, native_tune
from nmflow.ops.native_plan import Tiling, default_tiling
from nmflow.pattern import Pattern
from nmflow.runtime.modules import NMLinear, PackedRows

_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2}


def sparse_linear(shape: tuple[int, int], pattern: Pattern, dtype: torch.dtype) -> nn.Linear:
    """An ordinary layer [R, K] with a bias, random weights, N of every M of largest magnitude, the rest zero."""
    rows, axis = shape
    layer = nn.Linear(axis, rows)
    with torch.no_grad():
        layer.weight.normal_(std=axis**-0.5)
        layer.weight.mul_(rows_mask(layer.weight.abs(), pattern, "partial"))
    return layer.to(dtype).requires_grad_(False)


def ours(layer: nn.Linear, pattern: Pattern) -> NMLinear:
    """The layer, compressed."""
    return cast(NMLinear, nmflow.compress(layer, {"weight": str(pattern)}))


class PackedDense(nn.Module):
    """oneDNN's product with a weight that it laid out itself: the best dense one a torch user can get.

    Raises `RuntimeError` or `AttributeError` where this torch or machine has none; see `packed_dense`.
    """

    def __init__(self, layer: nn.Linear, tokens: int) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight, tokens)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], ""))


def packed_dense(layer: nn.Linear, tokens: int) -> PackedDense | None:
    """The layer with its weight packed by oneDNN; None where that is not to be had."""
    try:
        packed = PackedDense(layer, tokens)
        packed(torch.zeros(tokens, layer.in_features, dtype=layer.weight.dtype))
    except (RuntimeError, AttributeError):
        return None
    return packed


class CSRLinear(nn.Module):
    """torch's CSR product as a whole layer: x transposed, multiplied, the bias added, y transposed back."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # "beta state"
            self.weight = layer.weight.to_sparse_csr()
        self.bias_column = layer.bias[:, None]

    def forward(self, x: Tensor) -> Tensor:
        y_RT = torch.mm(self.weight, x.t().contiguous()) + self.bias_column
        return y_RT.t().contiguous()


def csr_linear(layer: nn.Linear) -> CSRLinear | None:
    """The layer with a CSR weight; None where torch has no such product (another dtype, a build without MKL)."""
    if layer.weight.dtype != torch.float32:
        return None
    try:
        sparse = CSRLinear(layer)
        sparse(torch.zeros(1, layer.in_features))
    except (RuntimeError, NotImplementedError):
        return None
    return sparse


def tune(model: nn.Module, tokens: int, seconds: float = 0.3) -> dict[Tiling, float]:
    """Choose the tiling of every compressed weight in `model` for so many tokens; the last one's times, in seconds.

    Weights that share shape, pattern and dtype are tuned once; the choice holds for the process (`native.plan`).
    """
    times: dict[Tiling, float] = {}
    done = set()
    for part in model.modules():
        if isinstance(part, PackedRows):
            packed = prepared(part)
            if (key := packed.forms.key(tokens, torch.get_num_threads())) not in done:
                done.add(key)
                times = native_tune.tune(packed, tokens, seconds)
    return times


def prepared(part: PackedRows) -> native.PackedWeight:
    """The weight as the native product takes it; the layer's calls use these very forms from now on."""
    return native.prepare(part.values, part.offsets, *part.shape, part.pattern.n, part.pattern.m, v=part.pattern.v)


def forget(part: PackedRows, tokens: int) -> Tiling:
    """Undo `tune` for weights like this one, so that new layers take the rule's own tiling, which is returned."""
    forms = prepared(part).forms
    key = forms.key(tokens, torch.get_num_threads())
    native.plan.choices.pop(key, None)
    return default_tiling(key, forms.rv_reach())


def chosen(part: PackedRows, tokens: int) -> tuple[Tiling, int]:
    """The tiling that this weight takes, and the bytes of its packed form."""
    forms = prepared(part).forms
    tiling = forms.tiling(tokens, torch.get_num_threads())
    packed = forms.form(tiling.algorithm, tiling.chunk)
    return tiling, packed.values.nbytes + packed.index.nbytes


def tiling_text(tiling: Tiling) -> str:
    """`tb 64 112x256 rows`: algorithm, columns of a K-block, tokens x rows of a tile, what threads share out."""
    return f"{tiling.algorithm} {tiling.chunk} {tiling.tile_tokens}x{tiling.tile_rows} {tiling.split}"


def check(layer: nn.Linear, compressed: nn.Module, x: Tensor) -> None:
    """Raise `ArithmeticError` where the compressed layer does not give what torch gives: its speed means nothing."""
    agree(str(compressed), compressed(x), F.linear(x.double(), layer.weight.double(), layer.bias.double()))


def agree(what: str, found: Tensor, wanted: Tensor) -> None:
    """Raise `ArithmeticError` where `found` is not what float64 gives, by the tolerance of its dtype."""
    error = float((found.double() - wanted).abs().max() / wanted.abs().max())
    if not error <= _TOLERANCE[found.dtype]:
        raise ArithmeticError(f"{what}: differs from the dense layer by {error:.2g} of its largest output")
