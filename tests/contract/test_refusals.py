"""Behaviour: bad input gets a `ValueError` that says what, where and the way out, and changes nothing."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nmflow
from contract.hosts import HOST, Host, every_host
from contract.runs import STEPS, mdgf, one_step, optimizer_of, parameters, sparsify, train
from nmflow import Sparsifier


def traces(model: nn.Module) -> tuple[object, ...]:
    """All that a refused call must leave alone: classes, attributes, objects and bits."""
    return (
        [type(module) for module in model.modules()],
        [sorted(vars(module)) for module in model.modules()],
        {name: id(value) for name, value in model.named_parameters(remove_duplicate=False)},
        {name: value.clone().nan_to_num(7.0) for name, value in model.state_dict().items()},
        [parameter.requires_grad for parameter in model.parameters()],
    )


def assert_same_traces(found: tuple[object, ...], expected: tuple[object, ...]) -> None:
    assert found[:3] == expected[:3]
    assert found[4] == expected[4]
    tensors, others = found[3], expected[3]
    assert isinstance(tensors, dict)
    assert isinstance(others, dict)
    assert list(tensors) == list(others)
    assert [name for name in tensors if not torch.equal(tensors[name], others[name])] == []


@contextmanager
def refused(model: nn.Module, *says: str, error: type[Exception] = ValueError) -> Iterator[None]:
    """The block raises, says all of this, and leaves the model as it was."""
    before = traces(model)
    with pytest.raises(error) as caught:
        yield
    for words in says:
        assert re.search(words, str(caught.value)), f"{words!r} is not said in: {caught.value}"
    assert_same_traces(traces(model), before)


def check_refused(
    host: Host, targets: dict[str, str], *says: str, remainder: str = "error", **options: object
) -> None:
    """Building a sparsifier with this is refused on an untouched model."""
    model = host.build()
    options = {"recipe": mdgf(), "total_steps": STEPS, "remainder": remainder, **options}
    with refused(model, *says):
        Sparsifier(model, targets, **options)
    sparsify(host, model)                                         # and nothing stands in the way of a right one


# ------------------------------------------------------------------------------------ targets and patterns
@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("16:1", 'did you mean "1:16"'),
        ("0:4", "1 <= N <= M"),
        ("1:0", "1 <= N <= M"),
        ("a:b", "expected N:M"),
    ],
)
def test_a_pattern_that_is_none(pattern: str, says: str) -> None:
    check_refused(HOST["encoder_layer_train"], {"ff": pattern, "qkv": "2:4"}, "ff", re.escape(pattern), says)


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("linear3.weight", r"linear1\.weight|linear2\.weight"),
        ("linaer1", "linear1"),
        ("self_attn.out_porj", r"self_attn\.out_proj"),
        ("re:.*liner1.*", "linear1"),
        ("conv", "ff"),
        ("kq", "k|q|qk"),
        ("fff", "ff"),
    ],
)
def test_a_target_that_matches_nothing(key: str, says: str) -> None:
    check_refused(
        HOST["encoder_layer_train"], {"ff": "1:8", key: "1:4"}, re.escape(f'"{key}"'), "matches nothing", says
    )


@pytest.mark.parametrize(
    ("name", "targets", "says"),
    [
        ("linear", {"weight": "1:12"}, (r"weight: dim 1 has 16 entries, 12 does not divide it",)),
        ("conv2d", {"conv": "1:16"}, (r"2\.weight", "36 entries", r"4\.weight", "12 entries")),
        ("mha", {"q": "1:5", "o": "1:7"}, (r"in_proj_weight\[0:16\]", "5 does not", "out_proj", "7 does not")),
        ("conv1d", {"0": "1:24"}, (r"0\.weight: dim 0 has 16 entries",)),
    ],
)
def test_an_axis_that_m_does_not_divide(name: str, targets: dict[str, str], says: tuple[str, ...]) -> None:
    host = HOST[name]
    if host.needs:
        pytest.importorskip(host.needs, reason=f"{host.name} needs the optional {host.needs}")
    check_refused(host, targets, *says, 'remainder="partial"', "skip")


def test_two_rules_of_one_rank_that_disagree() -> None:
    host = HOST["encoder_layer_train"]
    check_refused(
        host, {"re:linear.*": "1:8", "re:.*1.weight": "1:4"}, r"linear1\.weight", "re:linear", "re:.*1.weight"
    )
    check_refused(host, {"qk": "1:4", "qkv": "1:8"}, "in_proj_weight", '"qk"', '"qkv"')
    Sparsifier(host.build(), {"qk": "1:4", "qkv": "1:4"}, mdgf(), STEPS)


def test_all_problems_are_said_at_once() -> None:
    check_refused(
        HOST["encoder_layer_train"], {"ff": "16:1", "q": "1:5", "liner1": "1:4", "qk": "1:4", "qkv": "2:4"},
        "16:1", "5 does not divide", "liner1", "matches nothing", "disagree",
    )


@pytest.mark.parametrize("remainder", ["drop", "", None, 1])
def test_an_unknown_remainder(remainder: object) -> None:
    wrong: Any = remainder
    check_refused(HOST["linear"], {"weight": "1:4"}, "error, partial, skip", remainder=wrong)


def test_no_targets_and_nothing_left_to_make_sparse() -> None:
    check_refused(HOST["linear"], {}, "no targets")
    check_refused(HOST["linear"], {"weight": "dense"}, "no weight is left")
    check_refused(HOST["linear"], {"weight": "1:12"}, "no weight is left", remainder="skip")


def test_a_depthwise_convolution_wants_partial() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=4))
    with refused(model, r"1\.weight", "depthwise", 'remainder="partial"'):
        Sparsifier(model, {"1.weight": "1:4"}, mdgf(), STEPS)
    Sparsifier(model, {"1.weight": "1:4"}, mdgf(), STEPS, remainder="partial")


# ----------------------------------------------------------------------------------- recipes and steps
@pytest.mark.parametrize("total_steps", [0, -1, 2.5, None, True, "100"])
def test_total_steps_that_are_none(total_steps: object) -> None:
    check_refused(HOST["linear"], {"weight": "1:4"}, "total_steps", total_steps=total_steps)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mdgf-linear", {"dense": 0.5, "decay_end": 0.6}),        # d = e = 1
        ("mdgf-exponential", {"dense": 0.5, "decay_end": 0.6}),
        ("sdgf-stepwise", {}),                                    # one step of decay for 3:4, 2:4 and 1:4
        ("sdgf-geometric", {}),                                   # 4:16, 2:8 and 1:4
        ("idp", {}),
    ],
)
def test_total_steps_shorter_than_the_phases(name: str, options: dict[str, float]) -> None:
    recipe = nmflow.recipe(name, **options)
    check_refused(HOST["linear"], {"weight": "1:4"}, "weight", "total_steps=2", recipe=recipe, total_steps=2)


@pytest.mark.parametrize("recipe", ["mdgf-exponental", "snipe", ""])
def test_an_unknown_recipe(recipe: str) -> None:
    check_refused(HOST["linear"], {"weight": "1:4"}, "recipe", recipe=recipe)


@pytest.mark.parametrize("mask_every", [0, -3, 1.5, True])
def test_mask_every_that_is_none(mask_every: object) -> None:
    check_refused(HOST["linear"], {"weight": "1:4"}, "mask_every", mask_every=mask_every)


def test_a_schedule_whose_patterns_do_not_fit_the_axis() -> None:
    recipe = nmflow.recipe("ste", schedule={0.0: "6:12", 0.5: "1:4"})
    check_refused(HOST["linear"], {"weight": "1:4"}, "16 entries, 12 does not divide", recipe=recipe)


@every_host
def test_stepping_past_the_end(host: Host) -> None:
    model, sparsifier = train(host, STEPS)
    with refused(model, "beyond the end", f"total_steps={STEPS}"):
        sparsifier.step()
    with refused(model, "beyond the end"):
        sparsifier.step(STEPS + 1)
    assert sparsifier.current_step == STEPS
    sparsifier.finalize()


def test_stepping_backwards_or_by_halves() -> None:
    model, sparsifier = train(HOST["linear"], 4)
    with refused(model, "step 3 lies before step 4"):
        sparsifier.step(3)
    for n in (2.5, "5", True):
        with refused(model, error=TypeError):
            sparsifier.step(n)
    assert sparsifier.current_step == 4
    sparsifier.step(4)                                            # a skipped optimizer step is no step
    sparsifier.step(6)
    assert sparsifier.current_step == 6


def test_snip_before_it_is_calibrated() -> None:
    host = HOST["mha"]
    model = host.build()
    sparsifier = sparsify(host, model, "snip")
    with refused(model, "calibrate", error=RuntimeError):
        sparsifier.step()
    with refused(model, "calibrate", error=RuntimeError):
        sparsifier.finalize()
    with refused(model, "no batches"):
        sparsifier.calibrate(host.loss, [])
    with refused(model, "out_proj.weight", "NaN"):
        sparsifier.calibrate(lambda model, batch: host.loss(model, batch) * torch.nan, [host.inputs()])
    sparsifier.calibrate(host.loss, [host.inputs()])
    with refused(model, "once"):
        sparsifier.calibrate(host.loss, [host.inputs()])
    ordinary = HOST["linear"].build()
    other = sparsify(HOST["linear"], ordinary)
    with refused(ordinary, "snip"):
        other.calibrate(HOST["linear"].loss, [HOST["linear"].inputs()])


# --------------------------------------------------------------------------------------------- models
@every_host
def test_a_second_sparsifier_on_one_model(host: Host) -> None:
    model, sparsifier = train(host, 3)
    with refused(model, "a sparsifier already", "finalize"):
        sparsify(host, model)
    whole = nn.Sequential(model)
    with refused(whole, "a sparsifier already"):
        Sparsifier(whole, host.targets, mdgf(), STEPS, remainder=host.remainder)
    one_step(host, model, sparsifier, optimizer_of(model))        # the first one goes on
    assert sparsifier.current_step == 4


def test_a_finalized_run_is_over() -> None:
    host = HOST["mha"]
    model, sparsifier = train(host, STEPS)
    sparsifier.finalize()
    with refused(model, "finalize"):
        sparsifier.finalize()


@pytest.mark.parametrize(
    "end", [lambda run: run.finalize(), lambda run: run.detach(), lambda run: run.finalize(nn.Sequential(run.model))],
    ids=["finalized", "detached", "finalized in a wrapper"],
)
def test_a_loop_that_goes_on_after_the_end(end: Callable[[Sparsifier], object]) -> None:
    """It would train densely, and no report would say so."""
    host = HOST["mha"]
    model, sparsifier = train(host, 3)
    state = sparsifier.state_dict()
    end(sparsifier)
    for goes_on in (sparsifier.edit_gradients, sparsifier.step, lambda: sparsifier.load_state_dict(state)):
        with refused(model, "run is over", "new Sparsifier", error=RuntimeError):
            goes_on()
    assert sparsifier.state_dict()["step"] == 3                   # looking is free
    assert sparsifier.report().step == 3
    one_step(host, model, sparsify(host, model), optimizer_of(model))


def test_a_copy_is_finalized_without_ending_the_run() -> None:
    host = HOST["mha"]
    model, sparsifier = train(host, 3)
    average = copy.deepcopy(model)
    sparsifier.finalize(copy.deepcopy(model))
    one_step(host, model, sparsifier, optimizer_of(model))
    sparsifier.finalize()
    sparsifier.finalize(average)
    assert nmflow.verify(average).ok


@every_host
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "-inf"])
def test_a_weight_that_is_not_finite_is_named(host: Host, value: float) -> None:
    """By every check that takes a weight for good: building, finalizing, compressing and verifying."""
    names = list(host.weights)
    bad = [names[0], names[-1]]

    def spoil(model: nn.Module) -> None:
        with torch.no_grad():
            for name in bad:
                parameters(model)[name].view(-1)[5] = value

    model = host.build()
    spoil(model)
    with refused(model, *map(re.escape, bad)):
        sparsify(host, model)

    model, sparsifier = train(host, STEPS)
    before = {name: parameters(model)[name].detach().clone() for name in bad}
    spoil(model)
    with refused(model, *map(re.escape, bad)):
        sparsifier.finalize()
    with torch.no_grad():
        for name in bad:
            parameters(model)[name].copy_(before[name])
    sparsifier.finalize()                                         # once mended it goes on

    spoil(model)
    for check in (nmflow.verify, nmflow.compress):
        with refused(model, re.escape(bad[0])):
            check(model)


# ---------------------------------------------------------------------------------------- checkpoints
def without(state: dict[str, object], key: str) -> dict[str, object]:
    return {other: value for other, value in state.items() if other != key}


def check_state_is_refused(
    host: Host, change: Callable[[dict[str, Any]], dict[str, Any]], *says: str, **options: object
) -> None:
    """A state that is not this run's changes nothing, and the run goes on as if it had not been offered."""
    model, sparsifier = train(host, 3, **options)  # type: ignore[arg-type]  # any option, wrong ones too
    twin, other = train(host, 3, **options)  # type: ignore[arg-type]  # any option, wrong ones too
    state = change(copy.deepcopy(sparsifier.state_dict()))
    sparsifier_before = repr(sparsifier.state_dict())
    with refused(model, *says):
        sparsifier.load_state_dict(state)
    assert repr(sparsifier.state_dict()) == sparsifier_before
    for run in ((model, sparsifier), (twin, other)):
        one_step(host, *run, optimizer_of(run[0]))
    assert [torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True)].count(False) == 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state: {}, "not a sparsifier's state"),
        (lambda state: without(state, "step"), "step"),
        (lambda state: without(state, "masks"), "masks"),
        (lambda state: {**state, "step": STEPS + 1}, "step"),
        (lambda state: {**state, "step": -1}, "step"),
        (lambda state: {**state, "step": "3"}, "step"),
        (lambda state: {**state, "step": True}, "step"),
        (lambda state: {**state, "total_steps": STEPS + 1}, "total_steps"),
        (lambda state: {**state, "recipe": nmflow.recipe("ste").to_dict()}, "recipe"),
        (lambda state: {**state, "recipe": mdgf("masked").to_dict()}, "masked"),
        (lambda state: {**state, "remainder": "partial"}, "remainder"),
        (lambda state: {**state, "mask_every": 2}, "mask_every"),
        (lambda state: {**state, "format": 99}, "format"),
        (lambda state: {**state, "slots": state["slots"][:-1]}, "slots"),
        (lambda state: {**state, "slots": [{**slot, "pattern": "1:2"} for slot in state["slots"]]}, "slots"),
        (lambda state: {**state, "masks": {"nobody.weight": torch.zeros(1, dtype=torch.uint8)}}, "nobody"),
        (lambda state: {**state, "masks": None}, "masks: NoneType is no mapping"),
        (lambda state: {**state, "masks": 5}, "masks: int is no mapping"),
    ],
)
def test_a_state_of_another_run(change: Callable[[dict], dict], says: str) -> None:  # type: ignore[type-arg]  # of anything
    check_state_is_refused(HOST["encoder_layer_train"], change, says)


@pytest.mark.parametrize(
    ("bits", "says"),
    [
        (lambda bits: bits[:-1], "bytes"),
        (lambda bits: bits.to(torch.int64), "bytes"),
        (lambda bits: bits.tolist(), "bytes"),
    ],
)
def test_masks_that_do_not_fit(bits: Callable[[Tensor], object], says: str) -> None:
    def change(state: dict) -> dict:  # type: ignore[type-arg]  # of anything
        return {**state, "masks": {label: bits(mask) for label, mask in state["masks"].items()}}

    check_state_is_refused(HOST["mha"], change, says, mask_every=2)


def test_masks_that_are_missing() -> None:
    check_state_is_refused(
        HOST["mha"], lambda state: {**state, "masks": {}}, r"out_proj\.weight: missing", mask_every=2
    )


def test_a_state_of_another_model() -> None:
    state = train(HOST["linear"], 3)[1].state_dict()
    model, sparsifier = train(HOST["mha"], 2)
    with refused(model, "another run", "slots"):
        sparsifier.load_state_dict(state)
    assert sparsifier.current_step == 2
