"""A convolution goes through a run as the linear layer of its rows would, however its weight lies in memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from projections import convolution, rows_of, survivors, weights
from torch import Tensor, nn

import nmflow
from nmflow.layout import rows_in_place, to_rows
from nmflow.ops import as_stored
from nmflow.ops.projection import by_rows, project
from nmflow.pattern import Pattern

TOTAL = 20


def contiguous(weight: Tensor) -> Tensor:
    return weight.clone()


def channels_last(weight: Tensor) -> Tensor:
    return weight.clone(memory_format=torch.channels_last)


def cut_out(weight: Tensor) -> Tensor:
    """Of a larger kernel: its rows cannot be viewed, so they are copied and written back."""
    return torch.zeros(*weight.shape[:3], 5)[..., :3].copy_(weight)


LIE = [contiguous, channels_last, cut_out]


@pytest.mark.parametrize("lie", LIE, ids=lambda lie: lie.__name__)
@pytest.mark.parametrize(
    "recipe",
    [
        *map(nmflow.recipe, ["mdgf-linear", "mdgf-exponential", "sdgf-stepwise", "sdgf-geometric", "sr-ste", "idp"]),
        nmflow.recipe("mdgf-linear", pruned_gradient="decay"),
        nmflow.recipe("mdgf-linear", pruned_gradient="masked"),
        nmflow.recipe("mdgf-exponential", freeze=True),
    ],
    ids=str,
)
def test_a_convolution_is_the_linear_layer_of_its_rows(recipe: nmflow.Recipe, lie: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    filters, rows = nn.Conv2d(32, 6, 3, bias=False), nn.Linear(288, 6, bias=False)
    filters.weight = nn.Parameter(lie(filters.weight.detach()))
    models = [nn.Sequential(filters), nn.Sequential(rows)]
    runs = [nmflow.Sparsifier(model, {"0": "1:16"}, recipe, TOTAL) for model in models]
    densities = set()
    for step in range(1, TOTAL + 1):
        w_RK, out_RK = torch.randn(6, 288), torch.randn(6, 288)
        with torch.no_grad():
            runs[0].dense_weight("0.weight").copy_(convolution(w_RK, 9).view(6, 32, 3, 3))
            runs[1].dense_weight("0.weight").copy_(w_RK)
        for run in runs:
            run.step(step)
        assert torch.equal(rows_of(filters.weight.detach().flatten(2)), rows.weight), f"W~ at step {step}"
        (filters.weight * convolution(out_RK, 9).view(6, 32, 3, 3)).sum().backward()
        (rows.weight * out_RK).sum().backward()
        for run in runs:
            run.edit_gradients()
        found, expected = (run.dense_weight("0.weight").grad for run in runs)
        assert found is not None
        assert expected is not None
        assert torch.equal(rows_of(found.flatten(2)), expected), f"dL/dW at step {step}"
        densities.add(round(float(rows.weight.count_nonzero()) / rows.weight.numel(), 3))
        for run in runs:
            run.dense_weight("0.weight").grad = None
    assert min(densities) == 0.062
    kept = [run.finalize().density for run in runs]
    assert kept[0] == kept[1]
    assert torch.equal(rows_of(filters.weight.detach().flatten(2)), rows.weight)


def test_rows_are_shown_in_place_or_not_at_all() -> None:
    weight = torch.randn(6, 32, 3, 3)
    rows_RK = rows_of(weight.flatten(2))
    for lie, dims in [(contiguous, 3), (channels_last, 2), (cut_out, None)]:
        given = lie(weight)
        shown = rows_in_place(given, "conv")
        assert dims == (None if shown is None else shown.dim())
        if shown is not None:
            assert shown.data_ptr() == given.data_ptr()
            assert torch.equal(shown, as_stored(rows_RK, shown))
        assert torch.equal(to_rows(given, "conv"), rows_RK)
    part = weight[:, :16]                                                   # rows with gaps between them
    assert torch.equal(rows_in_place(part, "conv"), part.flatten(2))
    assert rows_in_place(torch.randn(6, 32, 1, 1), "conv").shape == (6, 32)
    assert rows_in_place(torch.randn(6, 1, 3, 3), "conv").shape == (6, 9)
    assert rows_in_place(torch.randn(0, 32, 3, 3), "conv").numel() == 0


@pytest.mark.parametrize("kind", ["tied", "special"])
def test_kernels_that_know_rows_alone_take_convolutions_by_copies(kind: str) -> None:
    rows = weights(kind, 5, 9 * 40, torch.float32)
    keep = survivors(rows, 2, 16)
    w = convolution(rows, 9)
    mask, effective = torch.ones_like(w, dtype=torch.bool), torch.full_like(w, 7.0)
    flips = by_rows(project)(w, Pattern(2, 16), 0.0, "partial", mask, effective)
    assert int(flips) == int((~keep).sum())
    assert torch.equal(rows_of(mask), keep)
    assert torch.equal(rows_of(effective).nan_to_num(1.5), torch.where(keep, rows, 0.0).nan_to_num(1.5))
