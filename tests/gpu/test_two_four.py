"""The 2:4 path: which weights are 2:4, and the call of torch's cuSPARSELt, here by a stand-in for its two operators.

The stand-in computes on the CPU what torch's documentation of the operators says, from a form that holds two of every
four; whether cuSPARSELt does the same is seen on a GPU alone.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_linear import DEVICE
from test_product import stored, whole_numbers
from torch import Tensor
from torch import library as operators

from nmflow import ops
from nmflow.ops.gpu import linear, measure, two_four
from nmflow.ops.gpu.choice import Plan, Way
from nmflow.ops.gpu.linear import Weight
from nmflow.ops.gpu.two_four import Algorithm, two_four_linear, why_no_weight

HAS_CORES = two_four.why_not() is None


def compress(dense: Tensor) -> Tensor:
    """Rows, columns, then of every four entries two with their places: as many numbers as the dense one."""
    assert dense.is_contiguous()
    fours = dense.reshape(-1, 4)
    places = (fours != 0).float().topk(2, dim=1).indices
    assert torch.equal(torch.zeros_like(fours).scatter(1, places, fours.gather(1, places)), fours)
    kept = fours.gather(1, places)
    sides = torch.tensor(dense.shape, dtype=dense.dtype)
    return torch.cat([sides, kept.flatten(), places.to(dense.dtype).flatten()])


def multiply(
    weight: Tensor,
    dense_KT: Tensor,
    bias: Tensor | None = None,
    alpha: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    transpose_result: bool = False,
    alg_id: int = 0,
    split_k: int = 1,
    split_k_mode: int = -1,
) -> Tensor:
    rows, axis = int(weight[0]), int(weight[1])
    kept, places = weight[2:].reshape(2, -1, 2)
    w = torch.zeros(rows * axis // 4, 4, dtype=weight.dtype).scatter(1, places.long(), kept).reshape(rows, axis)
    if dense_KT.shape[1] % 8 or not dense_KT.shape[1]:
        raise RuntimeError("tokens must be a multiple of 8, and some")
    assert dense_KT.t().is_contiguous(), "cuSPARSELt reads memory, not strides"
    assert bias is None or bias.is_contiguous()
    if alg_id > 2:
        raise RuntimeError("no such algorithm")
    y_RT = w.float() @ dense_KT.float() + (0 if bias is None else bias.float()[:, None])
    y_RT = (y_RT * (1.01 if alg_id == 1 else 1)).to(weight.dtype)
    return y_RT.t().contiguous() if transpose_result else y_RT


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where the 2:4 path can be called: on a GPU, or on the stand-in; of that, algorithm 1 is wrong and 3 fails."""
    monkeypatch.setattr(linear, "plan", Plan())
    if HAS_CORES:
        yield "cuda"
        return
    library = operators.Library("aten", "IMPL")
    library.impl("_cslt_compress", compress, "CPU")
    library.impl("_cslt_sparse_mm", multiply, "CPU")
    monkeypatch.setattr(two_four, "why_not", lambda **facts: why_no_weight(facts["dtype"], facts["shape"]))
    monkeypatch.setattr(two_four, "algorithms", lambda x, weight: [Algorithm(number) for number in (2, 0, 1, 3)])
    yield "cpu"
    library._destroy()


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (1, 12), (2, 16), (2, 128), (1, 64)])
def test_two_of_a_multiple_of_four_are_two_of_four(n: int, m: int) -> None:
    """The claim on which everything here rests, for any places within a block and any tail."""
    assert why_no_weight(n=n, m=m) is None
    _, _, dense = stored(64, m * 3 + 4 * random.Random(m).randint(0, m // 4), n, m, seed=n)
    assert int((dense.reshape(64, -1, 4) != 0).sum(-1).max()) <= 2


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"n": 3, "m": 4}, "3:4 may keep more than two of four"),
        ({"n": 2, "m": 6}, "2:6 may keep more"),
        ({"n": 4, "m": 16}, "4:16 may keep more"),
        ({"dtype": torch.float32}, "bfloat16 and float16, not torch.float32"),
        ({"shape": (24, 32)}, "sides of 24x32 must be multiples of 16"),
        ({"shape": (32, 40)}, "sides of 32x40"),
    ],
)
def test_what_does_not_fit_is_told(facts: dict[str, Any], reason: str) -> None:
    assert reason in str(why_no_weight(**facts))
    assert why_no_weight(torch.bfloat16, (32, 48), 2, 8) is None


def test_on_a_cpu_there_are_no_cores() -> None:
    assert two_four.why_not(device="cpu") == "it runs on cuda, not on cpu"
    if not torch.cuda.is_available():
        assert two_four.why_not() == "there is no CUDA device"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [(8,), (3,), (2, 5), (), (0,)])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_the_product_is_that_of_the_dense_weight(
    cores: str, dtype: torch.dtype, tokens: tuple[int, ...], activation: None
) -> None:
    values, offsets, dense = stored(32, 48, 2, 8)
    weight = Weight(values.to(cores, dtype), offsets.to(cores), (32, 48), 2, 8)
    x, bias = whole_numbers(*tokens, 48), whole_numbers(64).to(cores, dtype)[::2]
    wanted = x @ dense.t() + bias.cpu().double()
    y = two_four_linear(x.to(cores, dtype), weight.two_four(), 32, bias, activation)
    assert y.dtype == dtype
    assert torch.equal(y.cpu().double(), wanted.relu() if activation else wanted)


def test_a_scattered_x_is_read_as_it_lies(cores: str) -> None:
    values, offsets, dense = stored(16, 32, 1, 8)
    weight = Weight(values.bfloat16().to(cores), offsets.to(cores), (16, 32), 1, 8)
    x = whole_numbers(32, 8).t()
    y = two_four_linear(x.bfloat16().to(cores), weight.two_four(), 16)
    assert torch.equal(y.cpu().double(), x @ dense.t())
    assert ops.forms_nbytes(weight.values) == weight.two_four().nbytes


def test_a_changed_weight_is_packed_anew(cores: str) -> None:
    values, offsets, dense = stored(16, 32, 1, 8)
    weight = Weight(values.bfloat16().to(cores), offsets.to(cores), (16, 32), 1, 8)
    x = whole_numbers(8, 32)
    for factor in (1, 2):
        y = linear.multiply(Way("2:4", Algorithm(0)), x.bfloat16().to(cores), weight)
        assert torch.equal(y.cpu().double(), factor * x @ dense.t())
        weight.values.mul_(2)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning", "ignore:.*left out:UserWarning")
def test_tuning_tries_every_algorithm_and_keeps_the_right_ones(cores: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values, offsets, _ = stored(32, 64, 1, 8)
    weight = Weight(values.bfloat16().to(cores), offsets.to(cores), (32, 64), 1, 8)
    monkeypatch.setattr(measure, "candidates", lambda key: [])
    found = measure.tune(weight, 64, seconds=0.0)
    tried = {way.cut for way in found if way.kernel == "2:4"}
    assert tried
    if cores == "cpu":
        assert tried == {Algorithm(0), Algorithm(2)}
    assert not any(way.kernel == "2:4" for way in measure.tune(weight, 63, seconds=0.0))  # too few to be worth it


@pytest.mark.skipif(not HAS_CORES, reason="needs a GPU with 2:4 cores: torch's search runs there alone")
def test_the_search_names_algorithms() -> None:
    values, offsets, _ = stored(64, 64, 2, 4)
    weight = Weight(values.bfloat16().to(DEVICE), offsets.to(DEVICE), (64, 64), 2, 4)
    found = two_four.algorithms(torch.randn(64, 64).bfloat16().to(DEVICE), weight.two_four())
    assert len(found) == len(set(found))
    assert Algorithm(0) in found
