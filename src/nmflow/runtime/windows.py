"""A convolution as a product: what each output pixel sees, laid out as one row; and when that pays."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from nmflow.pattern import Pattern


def windows(
    x_BCHW: Tensor,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
) -> Tensor:
    """[batch, rows out, columns out, kernel rows · kernel columns · C]: the order of the layout `conv`.

    `padding` (left, right, top, bottom) is with zeros. Channels are the innermost, so an input whose channels lie last
    is copied in long runs, and for a 1x1 kernel without stride not at all. Raises `RuntimeError` where the kernel is
    larger than the padded input, as torch's convolution does.
    """
    left, right, top, bottom = padding
    padded = x_BCHW.shape[2] + top + bottom, x_BCHW.shape[3] + left + right
    reach = tuple(spread * (taps - 1) + 1 for taps, spread in zip(kernel, dilation, strict=True))
    if reach[0] > padded[0] or reach[1] > padded[1]:
        raise RuntimeError(
            f"the padded input has {padded[0]} x {padded[1]} entries a channel, the kernel reaches over "
            f"{reach[0]} x {reach[1]}: kernel size can't be greater than actual input size"
        )
    x_BHWC = x_BCHW.permute(0, 2, 3, 1)
    if kernel == (1, 1) and not any(padding):
        return x_BHWC[:, :: stride[0], :: stride[1]].contiguous()
    x_BHWC = F.pad(x_BHWC, (0, 0, *padding)) if any(padding) else x_BHWC.contiguous()
    batch, _, _, channels = x_BHWC.shape
    out = [(size - taken) // step + 1 for size, taken, step in zip(padded, reach, stride, strict=True)]
    of_image, of_row, of_column, of_channel = x_BHWC.stride()
    strides = (of_image, of_row * stride[0], of_column * stride[1], of_row * dilation[0], of_column * dilation[1])
    view = x_BHWC.as_strided((batch, *out, *kernel, channels), (*strides, of_channel))
    return view.reshape(batch, *out, kernel[0] * kernel[1] * channels)


def pays(pattern: Pattern, out_channels: int) -> bool:
    """Whether laying out windows and multiplying sparsely beats torch's dense convolution, on the CPU.

    The layout costs about 28 / out_channels of the dense convolution (each window is read by that many rows), the
    product 1.5 · N/M of it; fitted to what `nmflow bench kernels parts=conv` measures (`benchmarks/README.md`).
    """
    return 28 / out_channels + 1.5 * pattern.n / pattern.m < 1
