"""Where the reduction axis of a weight lies: every weight seen as rows [R, K] with blocks along K.

R counts output rows, K the entries that one output sums over. Masks, checks and files all work on this one
form, so that a pattern means the same in each of them.
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

Layout = Literal["rows", "columns", "conv"]
"""`rows`: [out, in], as in `nn.Linear`; `columns`: [in, out], as in GPT-2's `Conv1D`;
`conv`: [out, in/groups, *kernel], flattened so that blocks run along input channels first."""

LAYOUTS: tuple[str, ...] = get_args(Layout)


def to_rows(weight: Tensor, layout: Layout) -> Tensor:
    """View (where possible) a weight as [R, K], K the reduction axis. A vector is one row.

    `conv` flattens in the order (kernel, in): the order of SR-STE's channels-last layout, in which a block
    holds neighbouring input channels of one pixel.
    """
    if weight.dim() < 2:
        return weight.reshape(1, -1)
    if layout == "columns":
        return weight.transpose(0, 1)
    shape = rows_shape(tuple(weight.shape), layout)
    return (weight.movedim(1, -1) if layout == "conv" else weight).reshape(shape)


def from_rows(rows: Tensor, shape: tuple[int, ...], layout: Layout) -> Tensor:
    """The inverse of `to_rows`: give rows [R, K] the shape of the weight they came from."""
    if len(shape) >= 2 and layout == "columns":
        return rows.transpose(0, 1)
    if len(shape) >= 2 and layout == "conv":
        return rows.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
    return rows.reshape(shape)


def write_back(rows: Tensor, tensor: Tensor, layout: Layout) -> None:
    """Make what was written into `rows = to_rows(tensor, layout)` stand in `tensor`: they may be a copy of it."""
    if rows.data_ptr() != tensor.data_ptr():
        tensor.copy_(from_rows(rows, tuple(tensor.shape), layout))


def rows_in_place(weight: Tensor, layout: Layout) -> Tensor | None:
    """The rows of a weight as a view, never a copy; None where no view shows them.

    [R, K] as `to_rows` gives it, or of a convolution [R, C, T] as it is stored: C channels of T taps each, whose
    entries count as K = T·C, the channels of one tap first.
    """
    if layout != "conv" or weight.dim() < 3:
        rows = to_rows(weight, layout)
        return rows if rows.data_ptr() == weight.data_ptr() else None
    try:
        return weight.movedim(1, -1).view(rows_shape(tuple(weight.shape), layout))
    except RuntimeError:
        return weight.flatten(2) if weight[0].is_contiguous() else None


def rows_shape(shape: tuple[int, ...], layout: Layout) -> tuple[int, int]:
    """(R, K) of a weight of this shape, without the weight.

    >>> rows_shape((64, 32, 3, 3), "conv"), rows_shape((768, 2304), "columns"), rows_shape((5,), "rows")
    ((64, 288), (2304, 768), (1, 5))
    """
    if len(shape) < 2:
        return 1, _product(shape)
    if layout == "columns":
        return shape[1], shape[0]
    if layout == "conv":
        return shape[0], _product(shape[1:])
    return _product(shape[:-1]), shape[-1]


def _product(sizes: tuple[int, ...]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product
