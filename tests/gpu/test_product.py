"""Triton's products against the dense weight in float64, on small numbers that every dtype holds exactly.

In the interpreter bfloat16 results are cut off instead of rounded: inputs are such that nothing needs rounding.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nmflow.ops.gpu import product
from nmflow.ops.gpu.product import (
    SharedTiling,
    SlotMajor,
    Tiling,
    gather_linear,
    shared_linear,
    shared_tilings,
    slot_major,
    tilings,
    why_not,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # what fills up x is anything

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def stored(rows: int, axis: int, n: int, m: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Random (values, offsets, the dense weight), made by Python; values are 0, ±1/2, ±1: sums of them are exact."""
    rng = random.Random(seed)
    dense = torch.zeros(rows, axis, dtype=torch.float64)
    values, offsets = [], []
    for row in range(rows):
        for start in range(0, axis, m):
            width = min(m, axis - start)
            for place in sorted(rng.sample(range(width), min(n, width))):
                values.append(rng.randint(-2, 2) / 2)
                offsets.append(place)
                dense[row, start + place] = values[-1]
    return (
        torch.tensor(values, dtype=torch.float64).reshape(rows, -1),
        torch.tensor(offsets, dtype=torch.uint8).reshape(rows, -1),
        dense,
    )


def packed(values: Tensor, offsets: Tensor, dtype: torch.dtype) -> SlotMajor:
    return slot_major(values.to(DEVICE, dtype), offsets.to(DEVICE))


def whole_numbers(*size: int, seed: int = 0) -> Tensor:
    return torch.randint(-2, 3, size, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 8, 17])
@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (1, 16), (3, 7), (1, 128)])
def test_it_is_the_dense_product(n: int, m: int, tokens: int, dtype: torch.dtype) -> None:
    for rows, axis in ((21, 3 * m), (16, 2 * m + m // 2 + 1)):
        values, offsets, dense = stored(rows, axis, n, m)
        x = whole_numbers(tokens, axis)
        bias = whole_numbers(rows, seed=1)
        found = gather_linear(x.to(DEVICE, dtype), packed(values, offsets, dtype), n, m, bias.to(DEVICE, dtype))
        assert found.dtype is dtype
        assert torch.equal(found.cpu().double(), x @ dense.t() + bias)


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("slots", [8, 16, 24])
def test_every_cut_gives_the_same(slots: int, tokens: int) -> None:
    values, offsets, dense = stored(37, 20 * 4, 1, 4)
    x = whole_numbers(tokens, 80)
    weight = packed(values, offsets, torch.float32)
    for rows in (32, 64):
        cut = Tiling(rows, 1 if tokens == 1 else 8, slots, 1)
        found = gather_linear(x.float().to(DEVICE), weight, 1, 4, tiling=cut)
        assert torch.equal(found.cpu().double(), x @ dense.t())


def test_leading_dimensions_and_none() -> None:
    values, offsets, dense = stored(5, 8, 1, 4)
    weight = packed(values, offsets, torch.float32)
    for shape in ((8,), (2, 3, 8), (0, 8), (3, 0, 8)):
        x = whole_numbers(*shape)
        found = gather_linear(x.float().to(DEVICE), weight, 1, 4)
        assert found.shape == (*shape[:-1], 5)
        assert torch.equal(found.cpu().double(), x @ dense.t())
    strided = whole_numbers(8, 3).t()
    assert torch.equal(gather_linear(strided.float().to(DEVICE), weight, 1, 4).cpu().double(), strided @ dense.t())


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("slots", [8, 16])
def test_activations(activation: str, slots: int) -> None:
    values, offsets, dense = stored(9, 64, 1, 4)
    x = whole_numbers(3, 64)
    cut = Tiling(16, 8, slots, 1)
    weight = packed(values, offsets, torch.float32)
    found = gather_linear(x.float().to(DEVICE), weight, 1, 4, None, activation, cut).cpu().double()
    y = x @ dense.t()
    tanh = F.gelu(y, approximate="tanh")
    expected = {"relu": F.relu(y), "gelu": F.gelu(y), "gelu_tanh": tanh, "silu": F.silu(y)}[activation]
    assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("tokens", [1, 3])
def test_what_no_weight_reads_does_not_matter(tokens: int) -> None:
    """NaN in x where no row keeps anything reaches no output, through what only fills up a tile least of all."""
    values, offsets, _ = stored(5, 12, 1, 4)
    offsets = torch.full_like(offsets, 3)
    x = whole_numbers(tokens, 12)
    x[:, [0, 1, 2, 4, 5, 6, 8, 9, 10]] = torch.nan
    found = gather_linear(x.float().to(DEVICE), packed(values, offsets, torch.float32), 1, 4).cpu().double()
    assert torch.equal(found, x[:, 3::4] @ values.t())


def test_nan_that_a_weight_reads_is_handed_on() -> None:
    values, offsets, _ = stored(4, 8, 1, 4)
    x = torch.full((1, 8), torch.nan)
    assert bool(gather_linear(x.to(DEVICE), packed(values, offsets, torch.float32), 1, 4, None, "relu").isnan().all())


def shared(rows: int, axis: int, n: int, m: int, v: int) -> tuple[Tensor, Tensor, Tensor]:
    """(values [R, S], offsets [G, S], the dense weight) of rows that share their columns by `v`."""
    num_groups = -(-rows // v)
    _, offsets, _ = stored(num_groups, axis, n, m, seed=1)
    values = torch.randint(-2, 3, (rows, offsets.shape[1]), generator=torch.Generator().manual_seed(2)).double() / 2
    dense = torch.zeros(rows, axis, dtype=torch.float64)
    for row in range(rows):
        for slot in range(offsets.shape[1]):
            dense[row, slot // n * m + int(offsets[row // v, slot])] = values[row, slot]
    return values, offsets, dense


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16] if DEVICE == "cpu" else DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 19])
@pytest.mark.parametrize(("rows", "v"), [(48, 16), (40, 16), (64, 64), (9, 3), (300, 150)])
def test_shared_columns_give_the_dense_product(rows: int, v: int, tokens: int, dtype: torch.dtype) -> None:
    """In the interpreter not in bfloat16, whose dot products it gets wrong."""
    for n, m, axis in ((1, 4, 4 * 32), (2, 5, 13)):
        values, offsets, dense = shared(rows, axis, n, m, v)
        x, bias = whole_numbers(tokens, axis), whole_numbers(rows, seed=1)
        weight = values.to(DEVICE, dtype), offsets.to(DEVICE)
        found = shared_linear(x.to(DEVICE, dtype), *weight, n, m, v, bias.to(DEVICE, dtype), "relu")
        assert found.dtype is dtype
        assert torch.equal(found.cpu().double(), F.relu(x @ dense.t() + bias))


@pytest.mark.parametrize("cut", [SharedTiling(16, 16, 16, 1), SharedTiling(32, 16, 32, 4)], ids=str)
def test_shared_columns_in_any_cut(cut: SharedTiling) -> None:
    values, offsets, dense = shared(96, 4 * 40, 1, 4, 48)
    x = whole_numbers(2, 17, 160)
    found = shared_linear(x.float().to(DEVICE), values.float().to(DEVICE), offsets.to(DEVICE), 1, 4, 48, tiling=cut)
    assert torch.equal(found.cpu().double(), x @ dense.t())


@pytest.mark.parametrize("slots", [8, 16])
def test_a_bias_that_lies_scattered(slots: int) -> None:
    values, offsets, dense = stored(10, 64, 1, 4)
    weight, x = packed(values, offsets, torch.float32), whole_numbers(2, 64)
    scattered = whole_numbers(20).float().to(DEVICE)[::2]
    for bias in (scattered, scattered[:1].expand(10)):
        found = gather_linear(x.float().to(DEVICE), weight, 1, 4, bias, None, Tiling(16, 8, slots, 1))
        assert torch.equal(found.cpu().double(), x @ dense.t() + bias.cpu())
    values, offsets, dense = shared(10, 64, 1, 4, 5)
    found = shared_linear(x.float().to(DEVICE), values.float().to(DEVICE), offsets.to(DEVICE), 1, 4, 5, scattered)
    assert torch.equal(found.cpu().double(), x @ dense.t() + scattered.cpu())


def test_a_weight_of_no_columns_gives_the_bias() -> None:
    values, offsets = torch.empty(6, 0), torch.empty(6, 0, dtype=torch.uint8)
    bias = whole_numbers(6).float().to(DEVICE)
    for tokens in (1, 3):
        found = gather_linear(torch.empty(tokens, 0, device=DEVICE), packed(values, offsets, torch.float32), 1, 4, bias)
        assert torch.equal(found, bias.expand(tokens, 6))


@pytest.mark.parametrize("tokens", [1, 3])
def test_nothing_is_read_behind_x(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots that only fill up a tile lie behind the axis; NaN lies there."""
    transposed, in_tiles = product._transposed, product._in_tiles

    def framed_tiles(x: Tensor, tokens: int) -> Tensor:
        tiled = in_tiles(x, tokens)
        frame = torch.full((tiled.numel() + 1000,), torch.nan, device=x.device)
        frame[: tiled.numel()] = tiled.flatten()
        return frame[: tiled.numel()].view(tiled.shape)

    def framed(x: Tensor, width: int) -> Tensor:
        frame = torch.full((100, width), torch.nan, device=x.device)
        frame[: x.shape[-1]] = transposed(x, width)
        return frame[: x.shape[-1]]

    monkeypatch.setattr(product, "_transposed", framed)
    monkeypatch.setattr(product, "_in_tiles", framed_tiles)
    x = whole_numbers(tokens, 12)
    values, offsets, dense = shared(8, 12, 1, 4, 4)
    found = shared_linear(x.float().to(DEVICE), values.float().to(DEVICE), offsets.to(DEVICE), 1, 4, 4)
    assert torch.equal(found.cpu().double(), x @ dense.t())
    values, offsets, dense = stored(8, 12, 1, 4)
    found = gather_linear(x.float().to(DEVICE), packed(values, offsets, torch.float32), 1, 4)
    assert torch.equal(found.cpu().double(), x @ dense.t())


def test_a_group_writes_its_own_rows_alone() -> None:
    """Programs of a group that has fewer rows than a tile leave its neighbours' to them."""
    from nmflow.ops.gpu.kernels.product import shared_kernel

    values, offsets, dense = shared(9, 8, 1, 4, 3)
    x = whole_numbers(16, 8)
    y = torch.full((16, 9), 7.0, device=DEVICE)
    weight = values.float().to(DEVICE), offsets.to(DEVICE)
    shared_kernel[(1, 1)](
        x.t().float().contiguous().to(DEVICE), *weight, None, y, 9, 2, 16, 16,
        N=1, M=4, V=3, TILES=1, ROWS=16, TOKENS=16, SLOTS=16, CHUNK=16, GUARDED=True, PRECISION="ieee", ACTIVATION=None,
    )
    assert torch.equal(y[:, :3].cpu().double(), (x @ dense.t())[:, :3])
    assert bool((y[:, 3:] == 7).all())


def test_shared_tilings_hold_the_group() -> None:
    for v in (1, 3, 16, 64, 100, 200):
        for cut in shared_tilings(v, 40):
            assert cut.rows >= min(v, 128)
            assert cut.rows & (cut.rows - 1) == 0


@pytest.mark.parametrize("size", [(14336, 512, 1), (768, 3072 // 16, 196), (5, 3, 1), (64, 1, 40)])
def test_tilings_cover_the_weight(size: tuple[int, int, int]) -> None:
    found: Sequence[Tiling] = tilings(*size)
    assert len(set(found)) == len(found) > 0
    for cut in found:
        assert cut.slots * -(-size[1] // cut.slots) >= size[1]
        assert cut.slots % 8 == 0


def test_why_not_answers_with_a_reason() -> None:
    for facts in (
        {"device": "cpu"},
        {"device": "cuda", "dtype": torch.float64},
        {"device": "cuda", "m": 512},
    ):
        assert why_not(**facts)
