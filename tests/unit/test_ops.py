"""The kernel registry, and the plain-torch product against a double loop over Python numbers."""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nmflow.ops import Kernel, kernels, linear, register, registry, select
from nmflow.ops.reference import expand

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def stored(rows: int, axis: int, n: int, m: int, seed: int) -> tuple[Tensor, Tensor, list[list[float]]]:
    """Random (values, offsets) of an N:M weight and the dense weight as lists, all from Python numbers.

    Values are small multiples of 1/4, exact in every dtype.
    """
    rng = random.Random(seed)
    values, offsets, dense = [], [], []
    for _ in range(rows):
        row_values, row_offsets, row = [], [], [0.0] * axis
        for start in range(0, axis, m):
            width = min(m, axis - start)
            for place in sorted(rng.sample(range(width), min(n, width))):
                value = rng.randint(-8, 8) / 4
                row_values.append(value)
                row_offsets.append(place)
                row[start + place] = value
        values.append(row_values)
        offsets.append(row_offsets)
        dense.append(row)
    kept = len(values[0]) if values else 0
    offset_dtype = torch.uint8 if m <= 256 else torch.uint16
    return (
        torch.tensor(values, dtype=torch.float64).reshape(rows, kept),
        torch.tensor(offsets, dtype=torch.int64).reshape(rows, kept).to(offset_dtype),
        dense,
    )


def product(x: list[list[float]], dense: list[list[float]], bias: list[float] | None) -> list[list[float]]:
    return [
        [
            sum(a * b for a, b in zip(token, row, strict=True)) + (bias[r] if bias else 0.0)
            for r, row in enumerate(dense)
        ]
        for token in x
    ]


@settings(deadline=None)
@given(
    rows=st.integers(1, 5),
    axis=st.integers(1, 40),
    nm=st.integers(1, 12).flatmap(lambda m: st.tuples(st.integers(1, m), st.just(m))),
    dtype=st.sampled_from(DTYPES),
    with_bias=st.booleans(),
    seed=st.integers(0, 999),
)
def test_the_reference_equals_a_double_loop(
    rows: int, axis: int, nm: tuple[int, int], dtype: torch.dtype, with_bias: bool, seed: int
) -> None:
    values, offsets, dense = stored(rows, axis, *nm, seed)
    rng = random.Random(seed)
    x = [[rng.randint(-4, 4) / 2 for _ in range(axis)] for _ in range(3)]
    bias = [float(r) - 1 for r in range(rows)] if with_bias else None
    given_bias = torch.tensor(bias, dtype=dtype) if bias else None
    found = linear(torch.tensor(x, dtype=dtype), values.to(dtype), offsets, (rows, axis), *nm, given_bias)
    assert found.dtype is dtype
    expected = torch.tensor(product(x, dense, bias), dtype=torch.float64)
    coarse = dtype in (torch.bfloat16, torch.float16)  # sums are rounded to 8 or 11 bits
    torch.testing.assert_close(found.double(), expected, rtol=0.02 if coarse else 1e-6, atol=1e-6)


@pytest.mark.parametrize("lead", [(), (0,), (7,), (2, 3), (2, 0, 3), (1, 1, 1, 2)], ids=str)
def test_any_leading_dimensions(lead: tuple[int, ...]) -> None:
    values, offsets, dense = stored(5, 10, 2, 4, seed=1)
    x = torch.randn(*lead, 10, dtype=torch.float64)
    found = linear(x, values, offsets, (5, 10), 2, 4)
    assert found.shape == (*lead, 5)
    weight = torch.tensor(dense, dtype=torch.float64)
    torch.testing.assert_close(found, torch.einsum("...k,rk->...r", x, weight))


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (0, 0)], ids=str)
def test_empty_weights(shape: tuple[int, int]) -> None:
    kept = shape[1] // 4
    empty = torch.zeros(shape[0], kept), torch.zeros(shape[0], kept, dtype=torch.uint8)
    found = linear(torch.ones(3, shape[1]), *empty, shape, 1, 4, torch.full((shape[0],), 2.0))
    assert found.tolist() == [[2.0] * shape[0]] * 3


def test_sixteen_bit_offsets() -> None:
    values, offsets, dense = stored(3, 1400, 2, 600, seed=5)
    assert offsets.dtype is torch.uint16
    assert int(offsets.to(torch.int32).max()) > 255
    assert expand(values, offsets, 1400, 2, 600).tolist() == dense


def test_gradients_reach_input_and_bias() -> None:
    values, offsets, dense = stored(4, 12, 1, 4, seed=3)
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(5, 4, dtype=torch.float64)
    linear(x, values, offsets, (4, 12), 1, 4, bias).backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ torch.tensor(dense, dtype=torch.float64))
    torch.testing.assert_close(bias.grad, upstream.sum(0))


def test_compiles_to_one_graph() -> None:
    values, offsets, _ = stored(4, 12, 1, 4, seed=3)
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 12, dtype=torch.float64)
    torch.testing.assert_close(compiled(x, values, offsets, (4, 12), 1, 4), linear(x, values, offsets, (4, 12), 1, 4))


# ---------------------------------------------------------------------------------------------- registry
@pytest.fixture
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain torch alone, whatever else this machine can run."""
    always = [kernel for kernel in registry._KERNELS if kernel.name == "dense"]
    monkeypatch.setattr(registry, "_KERNELS", always)


def doubled(x: Tensor, values: Tensor, offsets: Tensor, shape: tuple[int, int], *rest: object) -> Tensor:
    return x.new_full((*x.shape[:-1], shape[0]), 2.0)


def not_one(n: int | None = None, **facts: object) -> str | None:
    return None if n in (None, 1) else f"takes one of every M, not {n}"


PICKY = Kernel("picky", "linear", not_one, doubled)


@pytest.mark.usefixtures("_own_registry")
def test_a_later_kernel_is_asked_first_and_its_no_passes_on() -> None:
    register(PICKY)
    assert [kernel.name for kernel in kernels() if kernel.task == "linear"] == ["picky", "dense"]
    assert select("linear", n=1).name == "picky"
    assert select("linear", n=2).name == "dense"
    values, offsets, dense = stored(2, 8, 1, 4, seed=0)
    assert linear(torch.ones(3, 8), values, offsets, (2, 8), 1, 4).tolist() == [[2.0, 2.0]] * 3
    values, offsets, dense = stored(2, 8, 2, 4, seed=0)
    x = torch.ones(1, 8, dtype=torch.float64)
    assert linear(x, values, offsets, (2, 8), 2, 4).tolist() == [[sum(row) for row in dense]]


@pytest.mark.usefixtures("_own_registry")
def test_a_kernel_is_told_what_it_may_decide_by() -> None:
    told: dict[str, object] = {}

    def listen(**facts: object) -> str:
        told.update(facts)
        return "only listens"

    register(Kernel("listener", "linear", listen, doubled))
    values, offsets, _ = stored(2, 8, 1, 4, seed=0)
    linear(torch.ones(3, 5, 8, dtype=torch.float64), values, offsets, (2, 8), 1, 4)
    assert told == {
        "device": "cpu", "dtype": torch.float64, "shape": (2, 8), "n": 1, "m": 4, "v": 1, "tokens": 15,
        "needs_grad": False, "autocast": False, "same_dtype": True, "strided": True, "transformed": False,
    }  # fmt: skip


def test_what_this_machine_can_run() -> None:
    assert next(kernel for kernel in kernels() if kernel.name == "dense").why_not_here() is None
    assert PICKY.why_not_here() is None
    nowhere = replace(PICKY, why_not=lambda **facts: "needs a GPU")
    assert nowhere.why_not_here() == "needs a GPU"


def test_every_reason_is_listed_where_none_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    grumpy = Kernel("grumpy", "linear", lambda **facts: "does not feel like it", doubled)
    monkeypatch.setattr(registry, "_KERNELS", [PICKY, grumpy])
    with pytest.raises(ValueError, match=r"grumpy: does not feel like it; picky: takes one of every M, not 3"):
        select("linear", n=3)
    monkeypatch.setattr(registry, "_KERNELS", [])
    with pytest.raises(ValueError, match="none is registered"):
        select("linear", n=3)


@pytest.mark.usefixtures("_own_registry")
def test_registering_refuses_what_would_confuse() -> None:
    with pytest.raises(ValueError, match='task "conv" is none of linear, project'):
        register(replace(PICKY, task="conv"))
    register(PICKY)
    with pytest.raises(ValueError, match="has one of that name already"):
        register(PICKY)


def test_nothing_optional_is_imported_before_it_is_chosen() -> None:
    """Asking every kernel about this machine loads none of the optional packages."""
    code = (
        "import sys, nmflow.ops as ops\n"
        "[kernel.why_not_here() for kernel in ops.kernels()]\n"
        "print([name for name in ('triton', 'timm', 'transformers', 'torchvision', 'numba') if name in sys.modules])"
    )
    bare = subprocess.run(
        [sys.executable, "-c", "import torch, sys; print([n for n in ('triton',) if n in sys.modules])"],
        capture_output=True, text=True, check=True,
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() in ("[]", bare.stdout.strip())
