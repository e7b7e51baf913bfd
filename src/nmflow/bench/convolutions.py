"""How convolutions are timed: windows and a sparse product against torch's convolution, by layers of ResNet-50."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nmflow
from nmflow.bench import contenders
from nmflow.bench.cells import CONV, CONV_LAST, OURS, ConvCell
from nmflow.bench.timing import in_turns
from nmflow.layout import from_rows, to_rows
from nmflow.masks import rows_mask
from nmflow.pattern import Pattern
from nmflow.runtime.modules import NMConv2d

CONV_LAYERS = (
    *((64, 64, 3, 1, 56), (128, 128, 3, 1, 28), (256, 256, 3, 1, 14), (512, 512, 3, 1, 7), (256, 256, 3, 2, 28)),
    *((64, 256, 1, 1, 56), (256, 64, 1, 1, 56), (512, 128, 1, 1, 28), (1024, 256, 1, 1, 14), (2048, 512, 1, 1, 7)),
)
"""(channels in, channels out, kernel, stride, side of the input) of layers that ResNet-50 has."""
CONV_PATTERNS = ("2:4", "1:4", "1:8", "1:16", "1:32")


def measure_conv(layer: tuple[int, int, int, int, int], pattern: str, dtype: str, rounds: int) -> ConvCell:
    """Time one convolution of one image as a product, whatever the layer itself would choose.

    The product is given its channels last, as the layer before it leaves them; torch's convolution is timed with
    either order.
    """
    channels, out_channels, kernel, stride, side = layer
    form, kind = Pattern.parse(pattern), getattr(torch, dtype)
    dense = nn.Conv2d(channels, out_channels, kernel, stride, kernel // 2).requires_grad_(False)
    rows_RK = to_rows(dense.weight, "conv").clone()
    rows_RK *= rows_mask(rows_RK.abs(), form, "partial")
    dense.weight.copy_(from_rows(rows_RK, tuple(dense.weight.shape), "conv"))
    dense = dense.to(kind)
    compressed = cast(NMConv2d, nmflow.compress(dense, {"weight": pattern}))
    x = torch.randn(1, channels, side, side).to(kind)
    x_last = x.to(memory_format=torch.channels_last)

    def product() -> Tensor:
        return compressed.weight_nm.linear(compressed.windows(x_last), compressed.bias).permute(0, 3, 1, 2)

    contenders.tune(compressed, compressed.windows(x_last).shape[:-1].numel())
    wanted = F.conv2d(x.double(), dense.weight.double(), cast(Tensor, dense.bias).double(), stride, kernel // 2)
    contenders.agree(f"{compressed} as a product", product(), wanted)
    sides: dict[str, Callable[[], object]] = {OURS: product, CONV: lambda: dense(x), CONV_LAST: lambda: dense(x_last)}
    timed = in_turns(sides, rounds)
    return ConvCell(
        layer=layer,
        pattern=pattern,
        dtype=dtype,
        us={name: timed.median(name) * 1e6 for name in sides},
        over={name: timed.ratio(OURS, name) for name in (CONV, CONV_LAST)},
        product=compressed.is_product(x),
        disturbed=timed.disturbed,
    )
