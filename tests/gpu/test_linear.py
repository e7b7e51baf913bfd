"""Which product a layer runs on a GPU: what was measured and found right, else dense; here in the interpreter."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_product import DEVICE, shared, stored, whole_numbers
from torch import Tensor

from nmflow import compress, nm_mask, ops, tune
from nmflow.ops.bound import BoundOnGpu
from nmflow.ops.gpu import available, choice, linear, measure, product
from nmflow.ops.gpu.choice import DENSE, Key, Plan, Way, candidates
from nmflow.ops.gpu.linear import Weight
from nmflow.ops.gpu.product import SharedTiling, Tiling
from nmflow.ops.gpu.two_four import Algorithm

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
GATHER = Way("gather", Tiling(16, 8, 8, 1))


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The interpreter's device counts as one that Triton runs on, and nothing has been measured."""
    if DEVICE == "cpu":
        monkeypatch.setattr(available, "why_not", lambda device=None: None)
    monkeypatch.setattr(linear, "plan", Plan())
    return


def weight(rows: int = 20, axis: int = 32, v: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    values, offsets, dense = stored(rows, axis, 1, 4) if v == 1 else shared(rows, axis, 1, 4, v)
    return values.float().to(DEVICE), offsets.to(DEVICE), dense


def key(rows: int = 20, axis: int = 32, v: int = 1, tokens: int = 3) -> Key:
    return linear.key_of(DEVICE, torch.float32, (rows, axis), 1, 4, v, tokens)


def multiply(x: Tensor, values: Tensor, offsets: Tensor, v: int = 1) -> Tensor:
    found = ops.linear(x.float().to(DEVICE), values, offsets, (len(values), x.shape[1]), 1, 4, v=v)
    return found.cpu().double()


def kernel_of(tokens: int = 3, v: int = 1) -> str:
    facts = {"device": DEVICE, "dtype": torch.float32, "shape": (20, 32), "n": 1, "m": 4, "v": v}
    return ops.select("linear", tokens=tokens, **facts).name


def test_what_was_not_measured_is_dense_and_says_so() -> None:
    facts = {"device": DEVICE, "dtype": torch.float32, "shape": (20, 32), "n": 1, "m": 4, "v": 1, "tokens": 3}
    assert "has not been measured" in str(linear.why_not("triton", **facts))
    linear.plan.choices[key()] = DENSE
    assert kernel_of() != "triton"
    linear.plan.choices[key()] = GATHER
    assert kernel_of() == "triton"
    assert kernel_of(tokens=4) == "triton"  # 3 and 4 share a choice
    assert kernel_of(tokens=5) != "triton"


@pytest.mark.parametrize(
    ("way", "v"), [(GATHER, 1), (GATHER, 5), (Way("shared", SharedTiling(16, 16, 16, 1)), 5), (DENSE, 1)], ids=str
)
def test_the_plan_names_the_product(way: Way, v: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values, offsets, dense = weight(v=v)
    x = whole_numbers(3, 32)
    ran = []
    for name in ("gather_linear", "shared_linear"):
        real = getattr(product, name)
        monkeypatch.setattr(product, name, lambda *a, name=name, real=real: (ran.append(name), real(*a))[1])
    linear.plan.choices[key(v=v)] = way
    found = linear.operator(x.float().to(DEVICE), values, offsets, None, 20, 32, 1, 4, None, v)
    assert torch.equal(found.cpu().double(), x @ dense.t())
    assert ran == ([] if way == DENSE else [f"{way.kernel}_linear"])
    assert torch.equal(multiply(x, values, offsets, v), x @ dense.t())


def test_what_was_measured_of_a_weight_is_known() -> None:
    linear.plan.choices |= {key(): GATHER, key(tokens=4096)._replace(graph=True): DENSE, key(rows=24): GATHER}
    assert sorted(linear.measured(key(tokens=1))) == [4, 4096]


def test_a_changed_weight_is_read_anew() -> None:
    values, offsets, dense = weight()
    x = whole_numbers(3, 32)
    linear.plan.choices[key()] = GATHER
    assert torch.equal(multiply(x, values, offsets), x @ dense.t())
    values.mul_(2)
    assert torch.equal(multiply(x, values, offsets), 2 * x @ dense.t())


def test_a_bound_call_takes_the_way_of_the_plan_and_forgets_it_with_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    values, offsets, dense = weight()
    ran: list[str] = []
    real = linear.multiply
    monkeypatch.setattr(linear, "multiply", lambda way, *a: (ran.append(way.kernel), real(way, *a))[1])
    buffers: dict[str, torch.Tensor | None] = {"values": values, "offsets": offsets}
    bound = BoundOnGpu(buffers, (20, 32), 1, 4)
    assert bound.holds()
    buffers["values"] = values.clone()
    assert not bound.holds()
    x, bias = whole_numbers(3, 32), whole_numbers(20)
    for way in (DENSE, GATHER, DENSE):
        linear.plan.note(key(), {way: 1.0})
        for _ in range(2):
            y = bound(x.float().to(DEVICE), bias.float().to(DEVICE), "relu")
            assert y is not None
            assert torch.equal(y.cpu().double(), (x @ dense.t() + bias).relu())
    assert ran == ["dense"] * 2 + ["gather"] * 2 + ["dense"] * 2


def test_a_bound_call_leaves_to_the_registry_what_is_not_plain_inference() -> None:
    values, offsets, _ = weight()
    bound = BoundOnGpu({"values": values, "offsets": offsets}, (20, 32), 1, 4)
    x = torch.ones(3, 32, device=DEVICE)
    assert bound(x, None) is not None
    assert bound(x.double(), None) is None
    assert bound(x.to("meta"), None) is None
    assert bound(x.clone().requires_grad_(), None) is None
    assert bound(x, torch.ones(20, device=DEVICE, requires_grad=True)) is None
    assert bound(torch.nn.Parameter(x, requires_grad=False), None) is None
    with torch.autocast(DEVICE, torch.bfloat16):
        assert bound(x, None) is None


@pytest.mark.parametrize("v", [1, 16])
def test_tuning_times_what_is_right_and_keeps_the_fastest(v: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values, offsets, _ = weight(32, 32, v)
    ways = candidates(key(32, 32, v, 2))[:2]
    monkeypatch.setattr(measure, "candidates", lambda key: ways)
    clock = {DENSE: 1.4, ways[0]: 1.0, ways[1]: 1.6}
    order: list[Way] = []
    real = linear.multiply
    monkeypatch.setattr(linear, "multiply", lambda way, *a: (order.append(way), real(way, *a))[1])
    monkeypatch.setattr(measure, "seconds_of", lambda call, on_gpu: (call(), clock[order[-1]])[1])
    found = measure.tune(Weight(values, offsets, (32, 32), 1, 4, v), 2, seconds=0.0)
    assert found == clock
    assert order.count(ways[1]) == measure._CHECKS + 1  # 1.6 times the fastest: not measured again
    assert order.count(ways[0]) == measure._CHECKS + 4
    assert linear.plan.choices == {key(32, 32, v, 2): ways[0]}


def test_what_is_hopeless_is_timed_once_unless_it_is_to_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    taken = {"fast": 1.0, "close": 1.4, "slow": 9.0}
    sides = {name: (lambda name=name: calls.append(name)) for name in taken}
    monkeypatch.setattr(measure, "seconds_of", lambda call, on_gpu: (call(), taken[calls[-1]])[1])
    for keep, counts in ((None, [4, 4, 4]), ("fast", [4, 4, 1]), ("slow", [4, 4, 4])):
        calls.clear()
        assert measure.medians(sides, False, 0.0, keep) == taken
        assert [calls.count(name) for name in taken] == counts


def test_a_wrong_or_failing_way_is_left_out_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    values, offsets, _ = weight(20, 32)
    real = product.gather_linear
    calls = []

    def wrong(*arguments: Any) -> Tensor:
        calls.append(arguments[-1].rows)
        if arguments[-1].rows == 128:
            raise RuntimeError("no such kernel")
        now_and_then = arguments[-1].rows == 32 and calls.count(32) % 3
        return real(*arguments) * (1.0 if now_and_then else 1.001)

    monkeypatch.setattr(product, "gather_linear", wrong)
    others = [Way("gather", Tiling(rows, 8, 8, 4)) for rows in (128, 32)]
    monkeypatch.setattr(measure, "candidates", lambda key: [GATHER, *others])
    with pytest.warns(UserWarning, match="left out") as told:
        found = measure.tune(Weight(values, offsets, (20, 32), 1, 4), 3, seconds=0.0)
    assert sorted(found) == [DENSE]
    assert linear.plan.choices == {key(): DENSE}
    words = [str(each.message) for each in told if "left out" in str(each.message)]
    assert len(words) == 3
    assert "is wrong by 1.0e-03" in words[0]
    assert "no such kernel" in words[1]
    assert "rows=32" in words[2]


def test_a_way_of_a_plan_is_measured_anew_where_it_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    values, offsets, _ = weight(20, 32)
    stored = Weight(values, offsets, (20, 32), 1, 4)
    assert measure.still_right(GATHER, stored, 3)
    real = product.gather_linear
    monkeypatch.setattr(product, "gather_linear", lambda *a: real(*a) * 1.001)
    with pytest.warns(UserWarning, match="as a plan has it, is wrong by 1.0e-03"):
        assert not measure.still_right(GATHER, stored, 3)
    assert measure.still_right(DENSE, stored, 3)


def test_forms_are_counted() -> None:
    values, offsets, _ = weight(20, 32)
    stored = Weight(values, offsets, (20, 32), 1, 4)
    assert ops.forms_nbytes(values) == 0
    stored.slot_major()
    assert ops.forms_nbytes(values) == 20 * 8 * (4 + 1)  # a float and a byte each
    stored.dense()
    assert ops.forms_nbytes(values) == 20 * 8 * (4 + 1) + 20 * 32 * 4


def test_the_plan_says_why_not_the_others() -> None:
    linear.plan.note(key(), {DENSE: 2e-5, GATHER: 1e-5, Way("gather", Tiling(32, 8, 8, 1)): 3e-5})
    assert linear.plan.why_not("triton", key()) is None
    assert linear.plan.why_not("cusparselt", key()) == "triton was chosen when it was measured"
    linear.plan.note(key(), {DENSE: 1e-5, GATHER: 2e-5, Way("gather", Tiling(32, 8, 8, 1)): 3e-5})
    assert linear.plan.why_not("triton", key()) == "dense was faster when it was measured, 10 against 20 us"
    assert linear.plan.lines() == [
        f"20x32 1:4 float32, up to 4 tokens on {key().device}: dense (dense 10 us, gather 20 us)"
    ]


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: layers are tuned where they lie")
@pytest.mark.parametrize("pattern", ["1:16", "1:8v64"])
def test_a_model_is_tuned_on_a_gpu(pattern: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = torch.nn.Linear(1024, 4096).cuda().bfloat16()
    dense.weight.data.mul_(nm_mask(dense.weight, pattern))
    layer, x = compress(dense, {"weight": pattern}), torch.randn(1, 1024).cuda().bfloat16()
    tuned = tune(layer, x, seconds=0.05, plan=tmp_path / "plan.json")
    assert [found.key.graph for found in tuned] == [False, True]
    with torch.no_grad():
        torch.testing.assert_close(layer(x), dense(x), rtol=0.02, atol=0.02)
    again = tune(layer, x, plan=tmp_path / "plan.json")
    assert [found.choice for found in again] == [found.choice for found in tuned]


def test_candidates_fit_their_weight() -> None:
    for v, kernels in ((1, {"gather"}), (4, {"gather"}), (64, {"shared", "gather"})):
        assert {way.kernel for way in candidates(key(v=v))} == kernels
    many = key(tokens=4096)
    assert {way.kernel for way in candidates(many._replace(v=64))} == {"shared"}
    assert {way.kernel for way in candidates(many._replace(n=1, m=8))} == {"gather"}
    assert candidates(many._replace(n=1, m=7)) == []


# ------------------------------------------------------------------------------------------------ the file
def test_a_plan_is_kept_in_a_file(tmp_path: Path) -> None:
    shares = Way("shared", SharedTiling(64, 128, 64, 4))
    plan = Plan({key(): GATHER, key(v=5): shares, key(tokens=1): DENSE, key()._replace(graph=True): DENSE})
    plan.note(key(tokens=4096), {Way("2:4", Algorithm(3)): 1e-5, DENSE: 2e-5})
    plan.save(tmp_path / "plan.json")
    found = Plan.load(tmp_path / "plan.json")
    assert found.choices == plan.choices
    assert found.seconds[key(tokens=4096)] == {"2:4": 1e-5, "dense": 2e-5}
    assert found.part([key()]).choices == {key(): GATHER}
    other = Plan({key(): DENSE})
    other.adopt(plan)
    assert other == plan
    assert all(way.line() and one.line() for one, way in plan.choices.items())


@pytest.mark.parametrize(
    "change",
    [
        {"kernel": "magic"},
        {"cut": {"rows": 16}},
        {"cut": {"rows": 24, "tokens": 8, "slots": 8, "warps": 1}},
        {"cut": {"rows": 16, "tokens": 8, "slots": 9, "warps": 1}},
        {"cut": {"rows": -16, "tokens": 8, "slots": 8, "warps": 1}},
        {"cut": {"rows": "16", "tokens": 8, "slots": 8, "warps": 1}},
        {"cut": None},
        {"kernel": "2:4", "cut": {"number": -1}},
        {"seconds": [1.0]},
        {"seconds": {"dense": "fast"}},
    ],
    ids=str,
)
def test_a_file_that_is_no_plan_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    Plan({key(): GATHER}).save(file)
    content = json.loads(file.read_text())
    content["choices"][0].update(change)
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="plan: the choice"):
        Plan.load(file)
    content["version"] = choice._VERSION + 1
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="tune again"):
        Plan.load(file)
    file.write_text('{"format": "nmflow-native-plan", "version": 2, "choices": []}')
    with pytest.raises(ValueError, match="no plan of the kind nmflow-gpu-plan"):
        Plan.load(file)
