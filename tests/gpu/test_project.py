"""Triton's projection against a stable sort, block by block, and against the bits it must leave alone.

Triton's interpreter (3.9) cuts bfloat16 off instead of rounding it, and knows no denormal ones: there bfloat16 is
scaled by what needs no rounding.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from projections import BITS, NAN, lying, same_bits, survivors, weights
from torch import nn

from nmflow import Sparsifier, attach
from nmflow.attach import attached_weights
from nmflow.ops import projection
from nmflow.ops.gpu import project
from nmflow.ops.gpu.project import LARGEST_M, agreement, project_triton, why_not
from nmflow.pattern import Pattern

INTERPRETED = not torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LIE = ["rows", "columns"]
QUICK = ["1:2", "1:4", "2:4", "3:4", "1:8", "7:8", "1:16", "1:128", "1:3", "3:5", "5:7", "6:6", "dense"]
SLOW = ["4:8", "4:16", "8:16", "15:16", "4:32", "8:64", "16:128", "64:128", "127:128", "9:19", "17:33", "100:300"]


def check(kind: str, shape: tuple[int, int], dtype: torch.dtype, pattern: str, decay: float, lie: str) -> None:
    """Projects into poisoned outputs and compares mask, flips and W~ with the oracle."""
    form = Pattern.parse(pattern)
    w = lying(weights(kind, *shape, dtype), lie)
    keep = survivors(w, form.n, form.m)
    before = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5
    mask, effective = lying(before.to(DEVICE), lie).clone(), lying(torch.full_like(w, NAN).to(DEVICE), lie)
    flips = project_triton(w.to(DEVICE), form, decay, "partial", mask, effective)
    mask, effective = mask.cpu(), effective.cpu()
    assert torch.equal(mask, keep), f"mask of {pattern}"
    assert torch.equal(mask.view(torch.uint8), keep.view(torch.uint8))  # True is 1, not merely non-zero
    assert int(flips) == int((before != keep).sum())
    assert torch.equal(effective[keep].view(BITS[dtype]), w[keep].view(BITS[dtype]))
    assert same_bits(effective[~keep], w[~keep] * decay if decay else torch.zeros_like(w[~keep]))


@pytest.mark.parametrize("lie", LIE)
@pytest.mark.parametrize("pattern", [*QUICK, *(pytest.param(slow, marks=pytest.mark.slow) for slow in SLOW)])
def test_it_is_the_stable_sort(pattern: str, lie: str) -> None:
    m = Pattern.parse(pattern).m
    for dtype in DTYPES:
        exact = INTERPRETED and dtype == torch.bfloat16
        cases = [("random", 0.5 if exact else 0.37), ("special", 0.0 if exact else 0.37), ("tied", 0.0)]
        for (kind, decay), axis in zip(cases, (4 * m, 2 * m + m // 2 + 1, 4 * m), strict=True):
            check(kind, (3, axis), dtype, pattern, decay, lie)


@settings(max_examples=15, deadline=None)
@given(
    lie=st.sampled_from(LIE),
    rows=st.integers(1, 5),
    axis=st.integers(1, 60),
    nm=st.integers(1, 20).flatmap(lambda m: st.tuples(st.integers(1, m), st.just(m))),
    kind=st.sampled_from(["random", "tied", "special"]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    decay=st.sampled_from([0.0, 0.37, 1.0]),
)
def test_any_size(
    lie: str, rows: int, axis: int, nm: tuple[int, int], kind: str, dtype: torch.dtype, decay: float
) -> None:
    check(kind, (rows, axis), dtype, f"{nm[0]}:{nm[1]}", decay, lie)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_payloads_and_signs_do_not_rank(dtype: torch.dtype) -> None:
    top = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}[dtype]
    sign = -(2**31) if dtype == torch.float32 else -(2**15)
    bits = [top + 1, top + 3 + sign, top, top + 7]  # the third is infinity
    w = torch.tensor([bits * 2], dtype=BITS[dtype]).view(dtype)
    for pattern in ("1:4", "2:4", "3:4"):
        form = Pattern.parse(pattern)
        mask = torch.zeros(1, 8, dtype=torch.bool, device=DEVICE)
        project_triton(w.to(DEVICE), form, 0.0, "error", mask, torch.empty_like(w, device=DEVICE))
        assert torch.equal(mask.cpu(), survivors(w, form.n, form.m))


@pytest.mark.parametrize("lie", LIE)
@pytest.mark.parametrize("pattern", ["1:4v4", "2:4v3", "3:7v2", "7:8v5"])
def test_rows_that_share_their_columns(pattern: str, lie: str) -> None:
    """The oracle adds numbers in row order, one at a time."""
    form = Pattern.parse(pattern)
    for dtype, decay in ((torch.float32, 0.37), (torch.float16, 0.0), (torch.bfloat16, 0.0)):
        for kind, shape in (("random", (2 * form.v, 3 * form.m)), ("tied", (form.v + 1, 2 * form.m + 1))):
            w = weights(kind, *shape, dtype)
            scores = torch.zeros(-(-shape[0] // form.v), shape[1])
            for row in range(shape[0]):
                scores[row // form.v] += w[row].float().abs()
            keep = survivors(scores, form.n, form.m).repeat_interleave(form.v, 0)[: shape[0]]
            before = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5
            mask, effective = lying(before.to(DEVICE), lie).clone(), lying(torch.full_like(w, NAN).to(DEVICE), lie)
            flips = project_triton(lying(w, lie).to(DEVICE), form, decay, "partial", mask, effective)
            assert torch.equal(mask.cpu(), keep)
            assert int(flips) == int((before != keep).sum())
            assert same_bits(effective.cpu(), torch.where(keep, w, w * decay if decay else torch.zeros_like(w)))


def test_groups_that_v_does_not_divide_are_the_remainders() -> None:
    w = torch.randn(3, 8, device=DEVICE)
    mask, effective = torch.zeros_like(w, dtype=torch.bool), torch.full_like(w, 7.0)
    with pytest.raises(ValueError, match="3 rows, 2 does not divide them"):
        project_triton(w, Pattern(1, 4, 2), 0.0, "error", mask, effective)
    assert bool((effective == 7).all())
    assert int(project_triton(w, Pattern(1, 4, 2), 0.0, "skip", mask, effective)) == 24


def test_tiles_that_are_not_full() -> None:
    check("random", (37, 128), torch.float32, "1:4", 0.37, "rows")  # 1184 blocks in tiles of 512
    check("random", (1300, 8), torch.float32, "1:4", 0.37, "columns")  # 1300 rows in tiles of 1024


@pytest.mark.parametrize("lie", LIE)
def test_nothing_beside_the_outputs_is_written(lie: str) -> None:
    shape = (5, 100) if lie == "rows" else (45, 20)
    inside = (slice(1, 4), slice(30, 73)) if lie == "rows" else (slice(1, 44), slice(6, 9))
    frame, mask_frame = torch.full(shape, 7.0, device=DEVICE), torch.full(shape, 7, dtype=torch.uint8, device=DEVICE)
    w = lying(weights("random", 3, 43, torch.float32), lie)
    mask, effective = mask_frame.view(torch.bool)[inside], frame[inside]
    if lie == "columns":
        mask, effective = mask.t(), effective.t()
    project_triton(w.to(DEVICE), Pattern(1, 4), 0.0, "partial", mask, effective)
    assert torch.equal(mask.cpu(), survivors(w, 1, 4))
    assert torch.equal(effective.cpu(), w * survivors(w, 1, 4))
    effective.fill_(7.0)
    mask_frame[inside] = 7
    assert bool((frame == 7).all())
    assert bool((mask_frame == 7).all())


def test_a_bfloat16_copy() -> None:
    w = weights("random", 3, 33, torch.float32).bfloat16().float()  # rounds to itself
    effective, cast = torch.empty_like(w, device=DEVICE), torch.empty(3, 33, dtype=torch.bfloat16, device=DEVICE)
    mask = torch.zeros(3, 33, dtype=torch.bool, device=DEVICE)
    project_triton(w.to(DEVICE), Pattern(1, 4), 0.5, "partial", mask, effective, cast)
    assert same_bits(cast, effective.bfloat16())


def test_autograd_sees_that_the_outputs_were_written() -> None:
    w, mask, effective = torch.ones(2, 8), torch.zeros(2, 8, dtype=torch.bool), torch.zeros(2, 8)
    w, mask, effective = w.to(DEVICE), mask.to(DEVICE), effective.to(DEVICE)
    versions = w._version, mask._version, effective._version
    project_triton(w, Pattern(1, 4), 0.0, "error", mask, effective)
    assert w._version == versions[0]
    assert mask._version > versions[1]
    assert effective._version > versions[2]


def test_the_remainder_is_the_mask_functions() -> None:
    w = torch.randn(2, 9, device=DEVICE)
    mask, effective = torch.zeros_like(w, dtype=torch.bool), torch.full_like(w, 7.0)
    with pytest.raises(ValueError, match="9 entries, 4 does not divide it"):
        project_triton(w, Pattern(2, 4), 0.0, "error", mask, effective)
    assert bool((effective == 7).all())
    assert int(project_triton(w, Pattern(2, 4), 0.0, "skip", mask, effective)) == 18
    assert bool(mask.all())
    assert torch.equal(effective, w)


def test_why_not_answers_with_a_reason() -> None:
    for facts in (
        {"device": "cpu"},
        {"device": "cuda", "dtype": torch.float64},
        {"device": "cuda", "m": LARGEST_M + 1},
        {"device": "cuda", "strides": ((1, 64), (64, 1))},
    ):
        assert why_not(**facts)


@pytest.mark.parametrize("lie", LIE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_used_once_it_has_agreed_with_plain_torch(dtype: torch.dtype, lie: str) -> None:
    for pattern in (Pattern(2, 4), Pattern(1, 8, 3)):
        assert agreement(pattern, dtype, torch.device(DEVICE), lie == "columns")


def test_a_kernel_that_errs_or_fails_is_told_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(w: torch.Tensor, *arguments: object) -> torch.Tensor:
        flips = project_triton(w, *arguments)
        arguments[3].view(-1)[-1] ^= True  # the mask
        return flips

    def failing(*arguments: object) -> torch.Tensor:
        raise RuntimeError("ptxas died")

    w = weights("random", 3, 8, torch.float32).to(DEVICE)
    for kernel, words in ((wrong, "is wrong on"), (failing, "ptxas died")):
        agreement.cache_clear()
        monkeypatch.setattr(project, "project_triton", kernel)
        mask, effective = torch.zeros_like(w, dtype=torch.bool), torch.empty_like(w)
        with pytest.warns(UserWarning, match=words):
            project.project(w, Pattern(1, 4), 0.0, "error", mask, effective)
        assert torch.equal(mask.cpu(), survivors(w.cpu(), 1, 4))
    agreement.cache_clear()


def test_a_sparsifier_steps_as_with_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same masks, decays, flips and weights over a whole recipe, fused slices and columns among them."""

    def run() -> tuple[list[object], list[torch.Tensor]]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.MultiheadAttention(16, 2), nn.Linear(16, 24)).to(DEVICE)
        sparsifier = Sparsifier(model, {"0.in_proj_weight": "1:4", "1.weight": "1:8"}, "mdgf-linear", 6)
        reports, effective = [], []
        for _ in range(6):
            with torch.no_grad():
                for weight, _ in attached_weights(model).values():
                    weight += 0.1 * torch.randn(weight.shape).to(DEVICE)
            sparsifier.step()
            reports.append(sparsifier.report())
            effective += [each.effective.clone() for _, each in attached_weights(model).values()]
        return reports, effective

    monkeypatch.setattr(attach, "project", project_triton)
    by_triton = run()
    monkeypatch.setattr(attach, "project", projection.project)
    plain = run()
    assert str(by_triton[0]) == str(plain[0])
    for ours, theirs in zip(by_triton[1], plain[1], strict=True):
        assert torch.equal(ours, theirs)
