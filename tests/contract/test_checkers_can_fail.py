"""Every checker of the suite has to fail on a fault planted on purpose; a check that cannot fail proves nothing.

The faults are those that public code has had: a reader that is forgotten, D applied twice, blocks along the wrong
axis, λ scaled by the loss, an average that is not sparse, W~ saved in place of W.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import contract.runs
import nmflow
from contract import (
    test_compiled,
    test_copies,
    test_counts,
    test_finalize,
    test_gradients,
    test_kept_masks,
    test_outputs,
    test_precision,
    test_refusals,
    test_reports,
    test_resume,
    test_sequences,
    test_weights_changed,
)
from contract.hosts import HOST
from contract.runs import STEPS
from nmflow import Sparsifier, attach, sparsifier
from nmflow.attach import EffectiveWeight, attached_modules, attached_weights
from nmflow.ops import projection, registry

Plant = Callable[[pytest.MonkeyPatch], object]
Check = Callable[[], None]


def replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> Plant:
    """The attribute becomes `make(what it was)`."""
    return lambda patch: patch.setattr(owner, name, make(getattr(owner, name)))


@pytest.fixture(autouse=True)
def _plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks by the kernel that the faults are planted in."""
    kept = [kernel for kernel in registry._KERNELS if kernel.task != "project" or kernel.name == "reference"]
    monkeypatch.setattr(registry, "_KERNELS", kept)


def nothing_planted(patch: pytest.MonkeyPatch) -> None:
    """The fault lies in what the check is given."""


def subclassed(fault: type[Sparsifier]) -> Plant:
    return lambda patch: patch.setattr(contract.runs, "Sparsifier", fault)


# ------------------------------------------------------------------------------ who sees which weight
class ForgetsTheLastReader(Sparsifier):
    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        module = list(attached_modules(model))[-1]
        module.__class__ = type(module).__mro__[2]


class SwapsTheForward(Sparsifier):
    """Gives linear layers a forward of their own, as most code does, instead of a weight of their own."""

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        weights = {id(weight): effective for weight, effective in attached_weights(model).values()}
        for module in list(attached_modules(model)):
            if isinstance(module, nn.Linear):
                effective = weights[id(module._parameters["weight"])]
                module.__class__ = _with_forward(type(module).__mro__[2], effective)


def _with_forward(cls: type[nn.Module], effective: EffectiveWeight) -> type[nn.Module]:
    def forward(module: Any, batch: Tensor) -> Tensor:
        return F.linear(batch, effective.read(module._parameters["weight"]), module.bias)

    return type(cls.__name__, (cls,), {"forward": forward})


class LeavesOneWeightOut(Sparsifier):
    def __init__(self, model: nn.Module, targets: dict[str, str], *args: Any, **kwargs: Any) -> None:
        super().__init__(model, dict(list(targets.items())[:-1]), *args, **kwargs)


def dense_where_frozen(read: Any) -> Any:
    """Takes a weight that is not trained for one that is not sparse."""
    return lambda self, weight: read(self, weight) if weight.requires_grad else weight


def decay_applied_twice(apply_mask: Any) -> Any:
    return lambda w, mask, decay, *rest: apply_mask(w, mask, decay * decay, *rest)


def never_decays(apply_mask: Any) -> Any:
    return lambda w, mask, decay, *rest: apply_mask(w, mask, 0.0 if decay < 1 else 1.0, *rest)


def wrong_axis(rows_mask: Any) -> Any:
    return lambda scores, pattern, remainder="error": rows_mask(scores.T.contiguous(), pattern, remainder).T


def shifted_blocks(rows_mask: Any) -> Any:
    return lambda scores, *rest: rows_mask(scores.roll(1, -1), *rest).roll(-1, -1)


def across_rows(rows_mask: Any) -> Any:
    """Blocks that run on into the next row."""
    return lambda scores, pattern, _="error": rows_mask(scores.reshape(1, -1), pattern, "partial").reshape(scores.shape)


def smallest_survive(rows_mask: Any) -> Any:
    return lambda scores, *rest: rows_mask(-scores, *rest)


def one_more_survives(rows_mask: Any) -> Any:
    return lambda scores, pattern, *rest: rows_mask(scores, nmflow.Pattern(pattern.n + 1, pattern.m), *rest)


def each_row_for_itself(rows_mask: Any) -> Any:
    return lambda scores, pattern, *rest: rows_mask(scores, nmflow.Pattern(pattern.n, pattern.m), *rest)


def groups_from_the_last_row(rows_mask: Any) -> Any:
    return lambda scores, *rest: rows_mask(scores.flip(0), *rest).flip(0)


def first_mask_kept(derive: Any) -> Any:
    return lambda self, weight, new_masks=True: derive(self, weight, new_masks=self.progress.serial < 3)


def always_new_masks(derive: Any) -> Any:
    return lambda self, weight, new_masks=True: derive(self, weight)


def masks_forgotten(advance: Any) -> Any:
    def forgetful(self: Sparsifier, step: int) -> None:
        self._progress.fixed.clear()
        advance(self, step)

    return forgetful


def no_flips(derive: Any) -> Any:
    def uncounted(self: EffectiveWeight, *args: Any, **kwargs: Any) -> None:
        derive(self, *args, **kwargs)
        self.flips.clear()

    return uncounted


def first_read_handed_out(read: Any) -> Any:
    """A cache that nobody clears."""
    cache: dict[int, tuple[EffectiveWeight, Tensor]] = {}

    def cached(self: EffectiveWeight, weight: Tensor) -> Tensor:
        return cache.setdefault(id(self), (self, read(self, weight).detach().clone()))[1]

    return cached


def reading_wears_off(read: Any) -> Any:
    """A read that changes what the next one sees."""

    def worn(self: EffectiveWeight, weight: Tensor) -> Tensor:
        self.reads = getattr(self, "reads", 0) + 1  # type: ignore[attr-defined]  # a planted fault
        seen: Tensor = read(self, weight)
        return seen * (1 - 0.01 * self.reads)  # type: ignore[attr-defined]  # a planted fault

    return worn


def decay_read_in_the_graph(read: Any) -> Any:
    """D as a Python number inside the compiled forward."""
    return lambda self, weight: read(self, weight) * (1.0 + self.progress.stages[0].decay)


def changes_unnoticed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(EffectiveWeight, "_notice_changes", lambda self, weight: None)
    patch.setattr(attach._Attached, "_load_from_state_dict", nn.Module._load_from_state_dict)


def writes_unnoticed(notice: Any) -> Any:
    def forgiving(self: EffectiveWeight, weight: Tensor) -> None:
        if self._seen is not None:
            self._seen = self._seen._replace(effective_version=self.effective._version)
        notice(self, weight)

    return forgiving


def nothing_happens(_: Any) -> Any:
    return lambda *args, **kwargs: None


# ------------------------------------------------------------------------------------------- gradients
def decay_on_every_gradient(_: Any) -> Any:
    return lambda stage, mask, outer: stage.decay


def no_decay_on_gradients(_: Any) -> Any:
    return lambda stage, mask, outer: 1.0


def outer_forgotten(coefficient: Any) -> Any:
    return lambda stage, mask, outer: coefficient(stage, mask, None)


def gradient_of_a_product(patch: pytest.MonkeyPatch) -> None:
    """Plain autograd where straight-through was asked for."""
    forward = attach._PassThrough.apply
    patch.setattr(
        EffectiveWeight, "read", lambda self, weight: forward(weight * self.mask, self.effective)
    )


class AddsTheTermInBackward(Sparsifier):
    """SR-STE as most public code has it: part of every backward."""

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        for weight, effective in attached_weights(model).values():
            weight.register_hook(partial(self._with_term, weight, effective))

    def _with_term(self, weight: Tensor, effective: EffectiveWeight, gradient: Tensor) -> Tensor:
        strength = self._progress.stages[effective.slots[0][0]].sr_ste
        return gradient + strength * torch.where(effective.mask, 0, weight.detach())

    def edit_gradients(self) -> None:
        pass


class AddsTheTermEverywhere(Sparsifier):
    @torch.no_grad()
    def edit_gradients(self) -> None:
        for name in self._effective:
            weight = self.dense_weight(name)
            if weight.grad is not None:
                weight.grad.add_(weight, alpha=2e-4)


# ---------------------------------------------------------------------------------- states and copies
class RegistersItsBuffers(Sparsifier):
    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        for module in list(attached_modules(model)):
            module.register_buffer("mask", torch.ones(1))


class ProjectsInPlace(Sparsifier):
    """Writes W~ into W at every step."""

    @torch.no_grad()
    def step(self, n: int | None = None) -> None:
        super().step(n)
        for weight, effective in attached_weights(self.model).values():
            weight.copy_(effective.effective)


def stage_of_its_own(duplicate: Any) -> Any:
    """A deep copy that stays in the stage it was made in."""

    def stays(self: EffectiveWeight, memo: dict[int, Any]) -> EffectiveWeight:
        other: EffectiveWeight = duplicate(self, memo)
        other.progress = attach.Progress(self.progress.stages)
        return other

    return stays


def dense_copy_of_a_layer(model: nn.Module) -> nn.Module:
    other = LAYER.build()
    other.load_state_dict(model.state_dict())
    return other


class LosesItsMasks(Sparsifier):
    """Resumes with masks taken from the weights at hand."""

    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict(state)
        self._progress.fixed.clear()
        nmflow.refresh(self.model)


class LosesAStep(Sparsifier):
    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict({**state, "step": max(state["step"] - 1, 0)})


class AcceptsEveryState(Sparsifier):
    def load_state_dict(self, state: Any) -> None:
        with suppress(Exception):
            super().load_state_dict({**self.state_dict(), **state, **self._identity()})


# -------------------------------------------------------------------------------- the end, and refusals
def rounded(write_rows: Any) -> Any:
    return lambda self, tensor, slot, values: write_rows(self, tensor, slot, values.bfloat16().to(values.dtype))


def one_class_forgotten(detach: Any) -> Any:
    def forgetful(model: nn.Module) -> None:
        left = list(attached_modules(model))[-1]
        detach(model)
        left.__class__ = type(f"NM{type(left).__name__}", (type(left),), {})

    return forgetful


class ChangesBeforeItChecks(Sparsifier):
    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        model.sparsifier = self  # type: ignore[assignment]  # a planted fault
        super().__init__(model, *args, **kwargs)


class RepairsWeights(Sparsifier):
    """Silently makes NaN a zero."""

    @torch.no_grad()
    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        for parameter in model.parameters():
            parameter.nan_to_num_(0.0, 0.0, 0.0)
        with torch.enable_grad():
            super().__init__(model, *args, **kwargs)


class StopsSilently(Sparsifier):
    def step(self, n: int | None = None) -> None:
        if (self.current_step + 1 if n is None else n) <= self.total_steps:
            super().step(n)


class TakesOver(Sparsifier):
    """A second sparsifier that throws the first one out."""

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        attach.detach(model)
        super().__init__(model, *args, **kwargs)


LINEAR, MHA, CONV = HOST["linear"], HOST["mha"], HOST["conv2d"]
LAYER, LAYER_EVAL, GPT2 = HOST["encoder_layer_train"], HOST["encoder_layer_eval"], HOST["gpt2"]
apply_mask = partial(replaced, projection, "apply_mask")
rows_mask = partial(replaced, projection, "rows_mask")
read = partial(replaced, EffectiveWeight, "read")
derive = partial(replaced, EffectiveWeight, "derive")

outputs, gradients, copies, precision = test_outputs, test_gradients, test_copies, test_precision
changed, finalize, counts, resume, refusals = (
    test_weights_changed, test_finalize, test_counts, test_resume, test_refusals
)
sequences, kept, reports = test_sequences, test_kept_masks, test_reports

FAULTS: list[tuple[str, Plant, Check]] = [
    # -- outputs
    ("a weight is left out", subclassed(LeavesOneWeightOut), lambda: outputs.check_targets_reach_the_weights(MHA)),
    ("the last reader is forgotten", subclassed(ForgetsTheLastReader),
     lambda: outputs.check_outputs_equal_a_pruned_copy(LAYER)),
    ("the last reader is forgotten", subclassed(ForgetsTheLastReader),
     lambda: outputs.check_readers_see_the_effective_weight(CONV)),
    ("the tied head is forgotten", subclassed(ForgetsTheLastReader),
     lambda: outputs.check_outputs_equal_a_pruned_copy(GPT2)),
    ("the forward is swapped", subclassed(SwapsTheForward),
     lambda: outputs.check_outputs_equal_a_pruned_copy(LAYER)),
    ("the forward is swapped", subclassed(SwapsTheForward),
     lambda: outputs.check_outputs_equal_a_pruned_copy(LAYER_EVAL)),
    ("D applied twice", apply_mask(decay_applied_twice), lambda: outputs.check_outputs_equal_a_pruned_copy(LINEAR)),
    ("D is 0 at once", apply_mask(never_decays), lambda: outputs.check_readers_see_the_effective_weight(LINEAR)),
    ("wrong axis", rows_mask(wrong_axis), lambda: outputs.check_outputs_equal_a_pruned_copy(LAYER)),
    ("shifted blocks", rows_mask(shifted_blocks), lambda: outputs.check_outputs_equal_a_pruned_copy(CONV)),
    ("blocks across rows", rows_mask(across_rows),
     lambda: outputs.check_outputs_equal_a_pruned_copy(HOST["timm_resnet"])),
    ("the smallest survive", rows_mask(smallest_survive), lambda: outputs.check_outputs_equal_a_pruned_copy(MHA)),
    ("one more survives", rows_mask(one_more_survives), lambda: outputs.check_outputs_equal_a_pruned_copy(MHA)),
    ("each row for itself", rows_mask(each_row_for_itself), lambda: outputs.check_outputs_equal_a_pruned_copy(CONV)),
    ("the first group is the shorter one", rows_mask(groups_from_the_last_row),
     lambda: outputs.check_outputs_equal_a_pruned_copy(MHA)),
    ("the first mask is kept", derive(first_mask_kept), lambda: outputs.check_readers_see_the_effective_weight(MHA)),
    # -- gradients
    ("product's gradient for straight-through", gradient_of_a_product,
     lambda: gradients.check_gradients(LINEAR, "straight-through")),
    ("D on kept weights too", replaced(attach, "_gradient_coefficient", decay_on_every_gradient),
     lambda: gradients.check_gradients(MHA, "decay")),
    ("no D on gradients", replaced(attach, "_gradient_coefficient", no_decay_on_gradients),
     lambda: gradients.check_gradients(MHA, "decay")),
    ("the smallest get the gradient", rows_mask(smallest_survive), lambda: gradients.check_gradients(MHA, "masked")),
    ("λ on kept weights too", subclassed(AddsTheTermEverywhere), lambda: gradients.check_sr_ste_term(MHA)),
    ("λ inside backward", subclassed(AddsTheTermInBackward), lambda: gradients.check_sr_ste_term(MHA)),
    ("λ for every recipe", subclassed(AddsTheTermEverywhere), lambda: gradients.check_only_sr_ste_edits(MHA)),
    ("λ inside backward, scaled", subclassed(AddsTheTermInBackward),
     lambda: gradients.check_sr_ste_strength(MHA, 65536.0, 1)),
    ("λ inside backward, micro-batches", subclassed(AddsTheTermInBackward),
     lambda: gradients.check_sr_ste_strength(MHA, 1.0, 4)),
    ("reading wears off", read(reading_wears_off), lambda: gradients.check_micro_batches(MHA)),
    ("reading wears off", read(reading_wears_off), lambda: gradients.check_checkpointing(LINEAR, False)),
    ("reading wears off", read(reading_wears_off), lambda: gradients.check_checkpointing(LINEAR, True)),
    # -- recipes in sequence
    ("what was let go comes back", replaced(EffectiveWeight, "_outer", nothing_happens),
     lambda: sequences.check_sequence(MHA)),
    ("its gradient comes back", replaced(attach, "_gradient_coefficient", outer_forgotten),
     lambda: sequences.check_sequence(MHA)),
    # -- masks that outlive a step
    ("masks are forgotten", replaced(Sparsifier, "_advance", masks_forgotten), lambda: kept.check_inherited(MHA)),
    ("masks are forgotten", replaced(Sparsifier, "_advance", masks_forgotten), lambda: kept.check_frozen(MHA)),
    ("masks are forgotten", replaced(Sparsifier, "_advance", masks_forgotten), lambda: kept.check_calibrated(MHA)),
    ("masks are always new", derive(always_new_masks), lambda: kept.check_every_third(MHA)),
    # -- reports
    ("density of the mask", replaced(EffectiveWeight, "rows", lambda rows: lambda self, tensor, slot: rows(
        self, self.mask if tensor is self.effective else tensor, slot)),
     lambda: reports.check_report(MHA)),
    ("flips are not counted", derive(no_flips), lambda: reports.check_report(MHA)),
    # -- state dicts, copies, averages
    ("buffers in the state dict", subclassed(RegistersItsBuffers), lambda: copies.check_names(MHA)),
    ("W~ saved in place of W", subclassed(ProjectsInPlace), lambda: copies.check_state_is_dense(MHA)),
    ("buffers in the state dict", subclassed(RegistersItsBuffers),
     lambda: copies.check_its_state_loads_into_a_dense_model(MHA)),
    ("loading is not noticed", changes_unnoticed, lambda: copies.check_loading_is_noticed(MHA, assign=False)),
    ("loading is not noticed", changes_unnoticed, lambda: copies.check_loading_is_noticed(MHA, assign=True)),
    ("a copy shares its weights", nothing_planted, lambda: copies.check_copy(LAYER, copy.copy)),
    ("a copy is dense", nothing_planted, lambda: copies.check_copy(LAYER, dense_copy_of_a_layer)),
    ("a copy keeps its stage", replaced(EffectiveWeight, "__deepcopy__", stage_of_its_own),
     lambda: copies.check_deepcopy_follows_the_run(LAYER)),
    ("the average is not followed", changes_unnoticed,
     lambda: copies.check_average(LINEAR, copies.torch_average(use_buffers=False))),
    ("the average keeps its stage", replaced(EffectiveWeight, "__deepcopy__", stage_of_its_own),
     lambda: copies.check_average(LINEAR, copies.torch_average(use_buffers=True))),
    ("the average is not followed", changes_unnoticed,
     lambda: copies.check_average(LINEAR, copies.timm_average)),
    # -- precision
    ("the smallest survive", rows_mask(smallest_survive), lambda: precision.check_autocast(MHA)),
    ("a read is cached", read(first_read_handed_out), lambda: precision.check_autocast_inside_one_region(MHA)),
    ("W~ stays float32", read(first_read_handed_out),
     lambda: precision.check_another_dtype(MHA, torch.bfloat16)),
    # -- compiled
    ("D in the graph", read(decay_read_in_the_graph), lambda: test_compiled.check_compiled(LINEAR, "aot_eager")),
    # -- changes from outside
    ("frozen weights are dense", read(dense_where_frozen), lambda: changed.check_freezing(MHA)),
    ("changes unnoticed", changes_unnoticed,
     lambda: changed.check_a_change_is_noticed(MHA, changed.negate_in_place)),
    ("refresh does nothing", replaced(nmflow, "refresh", nothing_happens), lambda: changed.check_refresh(MHA)),
    ("writes into W~ unnoticed", replaced(EffectiveWeight, "_notice_changes", writes_unnoticed),
     lambda: changed.check_a_write_into_the_effective_weight_is_refused(MHA, grad=False)),
    ("changes unnoticed", changes_unnoticed, lambda: changed.check_inference_mode(MHA)),
    ("lent weights unnoticed", changes_unnoticed, lambda: changed.check_functional_call(MHA)),
    # -- the end
    ("kept weights are rounded", replaced(EffectiveWeight, "write_rows", rounded),
     lambda: finalize.check_finalize(MHA, STEPS)),
    ("a class is left behind", replaced(sparsifier, "detach", one_class_forgotten),
     lambda: finalize.check_finalize(LAYER, STEPS)),
    ("verify says yes", replaced(nmflow, "verify", lambda _: lambda model: SimpleNamespace(ok=True)),
     lambda: finalize.check_verified(MHA)),
    ("compress loses a bit", replaced(nmflow, "compress", lambda compress: lambda model: _dulled(compress, model)),
     lambda: finalize.check_compressed(LAYER)),
    ("the average is left dense", replaced(
        Sparsifier, "finalize", lambda finalize: lambda self, model=None: finalize(self) if model is None else None),
     lambda: finalize.check_an_average_is_finalized_in_its_place(MHA)),
    # -- resume
    ("masks are lost", subclassed(LosesItsMasks), lambda: resume.check_resume(LINEAR, "idp")),
    ("masks are lost", subclassed(LosesItsMasks), lambda: resume.check_resume(LINEAR, "snip")),
    ("masks are lost", subclassed(LosesItsMasks), lambda: resume.check_resume(LINEAR, "ste", mask_every=3)),
    ("a step is lost", subclassed(LosesAStep), lambda: resume.check_resume(LINEAR, "mdgf-exponential")),
    # -- refusals
    ("changes before it checks", lambda patch: patch.setattr(refusals, "Sparsifier", ChangesBeforeItChecks),
     lambda: refusals.check_refused(LINEAR, {"weight": "1:12"}, "12 does not divide")),
    ("a message without the name", replaced(sparsifier, "_not_finite", lambda _: lambda weights: ["NaN"] * any(
        not w.isfinite().all() for w in weights.values())),
     lambda: refusals.test_a_weight_that_is_not_finite_is_named(MHA, torch.nan)),
    ("NaN is repaired", subclassed(RepairsWeights),
     lambda: refusals.test_a_weight_that_is_not_finite_is_named(MHA, torch.nan)),
    ("the end is passed over", subclassed(StopsSilently), lambda: refusals.test_stepping_past_the_end(MHA)),
    ("a second one takes over", subclassed(TakesOver),
     lambda: refusals.test_a_second_sparsifier_on_one_model(MHA)),
    ("every state is taken", subclassed(AcceptsEveryState),
     lambda: refusals.check_state_is_refused(MHA, lambda state: {**state, "total_steps": 9}, "total_steps")),
]


def _dulled(compress: Callable[[nn.Module], nn.Module], model: nn.Module) -> nn.Module:
    """Compresses with values rounded to bfloat16."""
    rounded_model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in rounded_model.parameters():
            parameter.copy_(parameter.bfloat16())
    return compress(rounded_model)


@pytest.mark.parametrize(
    ("plant", "check"),
    [(plant, check) for _, plant, check in FAULTS],
    ids=[f"{number:02}-{name.replace(' ', '-')}" for number, (name, *_) in enumerate(FAULTS)],
)
def test_the_fault_is_found(plant: Plant, check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    with pytest.raises(FOUND):
        check()


FOUND = (AssertionError, pytest.fail.Exception, torch._dynamo.exc.RecompileError)
"""What a checker fails with; an error of any other kind would mean that the fault broke the test."""


@pytest.mark.parametrize("fault", [first_read_handed_out, reading_wears_off])
def test_counting_needs_no_fault_in_what_is_read(fault: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The counter looks at the work done, not at its result."""
    read(fault)(monkeypatch)
    counts.check_one_projection_a_step(LINEAR, counts.Counter(monkeypatch))


def derived_on_every_read(read: Any) -> Any:
    def derived(self: EffectiveWeight, weight: Tensor) -> Tensor:
        self.derive(weight)
        seen: Tensor = read(self, weight)
        return seen

    return derived


def test_work_on_every_read_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    read(derived_on_every_read)(monkeypatch)
    with pytest.raises(AssertionError, match="before the optimizer's step"):
        counts.check_one_projection_a_step(LINEAR, counts.Counter(monkeypatch))


def test_masks_taken_at_every_step_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    derive(always_new_masks)(monkeypatch)
    with pytest.raises(AssertionError):
        counts.check_mask_every(LINEAR, counts.Counter(monkeypatch))
