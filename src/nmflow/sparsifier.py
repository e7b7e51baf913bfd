"""The verbs of a sparse run: attach to a model, edit gradients, step, report, save, finalize."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nmflow.attach import EffectiveWeight, Progress, attach, attached_weights, detach
from nmflow.layout import to_rows
from nmflow.masks import Remainder, block_counts, pack_bits, rows_mask, unpack_bits
from nmflow.pattern import Pattern
from nmflow.schedules import Recipe, Stage
from nmflow.schedules import recipe as recipe_by_name
from nmflow.shards import count_all, full, held, refuse_other_wrappers, reshard, summed
from nmflow.slot_plans import Planned, block_sizes, plan_slots, stages_at
from nmflow.sparsity import SlotReport, SparsityReport
from nmflow.targets import Slot, Targets, record, resolve, slots_to_json


class Sparsifier:
    """Trains the targeted weights of a model to N:M by a recipe; N of every M are kept.

        for step in range(total_steps):
            loss(model, batch).backward()          # every reader of .weight sees W~
            sparsifier.edit_gradients()            # after unscaling, before clipping
            optimizer.step(); optimizer.zero_grad()
            sparsifier.step()
        report = sparsifier.finalize()             # the weights are N:M now, the model is an ordinary one

    `model` is changed in place (its parameters stay the same objects under the same names) and carries one
    sparsifier at a time. `targets`, see `nmflow.targets.resolve`; `recipe` is a name or a `Recipe`; `total_steps`
    counts optimizer steps. `mask_every=k` takes new masks every k-th step only (and where the pattern changes).

    A deep copy of the model (an EMA) has weights and masks of its own and follows the stage of this run; a deep copy of
    the sparsifier does not train.

    Raises one `ValueError` listing every problem, before anything is changed: rules (see `resolve`), a recipe whose
    phases do not fit `total_steps`, an axis that a pattern of the plan does not divide, NaN or inf weights, a second
    sparsifier, `mask_every` where a sequence decays from one pattern to the next.
    Source: Bambhaniya et al. 2025, section 3.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Targets,
        recipe: str | Recipe = "mdgf-exponential",
        total_steps: int = 0,
        remainder: Remainder = "error",
        mask_every: int = 1,
    ) -> None:
        refuse_other_wrappers(model)
        if attached_weights(model):
            raise ValueError("the model carries a sparsifier already; finalize that one, or build the model anew")
        if isinstance(mask_every, bool) or not isinstance(mask_every, int) or mask_every < 1:
            raise ValueError(f"mask_every is a number of steps, 1 or more, not {mask_every!r}")
        if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
            raise ValueError(f"total_steps is the number of optimizer steps of the run, 1 or more, not {total_steps!r}")
        self.model = model
        self.recipe = recipe_by_name(recipe) if isinstance(recipe, str) else recipe
        self.total_steps = total_steps
        self.mask_every = mask_every
        self.remainder: Remainder = remainder
        self.coverage = resolve(model, targets, remainder)
        self.slots: tuple[Slot, ...] = self.coverage.slots
        planned = self._check()
        gradients = {stage.pruned_gradient for stages in planned.values() for stage in stages}
        gradient = gradients.pop() if len(gradients) == 1 else "mixed"
        self.current_step = 0
        self._progress = Progress(stages_at(self.slots, self.recipe, 0, total_steps), carries_masks=mask_every > 1)
        by_name: dict[str, list[tuple[int, Slot]]] = {}
        for index, slot in enumerate(self.slots):
            by_name.setdefault(slot.name, []).append((index, slot))
        self._effective = {}
        for name, slots in by_name.items():
            blocks = block_sizes([slot for _, slot in slots], planned)
            self._effective[name] = EffectiveWeight(slots, self._progress, remainder, gradient, blocks)
        self._calibrated = not self.recipe.needs_gradients
        self._edited = True
        self._ended: str | None = None  # why this run goes no further
        attach(model, self._effective)
        try:
            self._advance(0)
        except BaseException:  # weights that are spread in a way that cannot be followed
            detach(model)
            raise
        self._forget_flips()

    # -- the run -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def edit_gradients(self) -> None:
        """Add SR-STE's term to the gradients; nothing for other recipes.

            dL/dW += λ·(1 - Φ)⊙W

        Once an optimizer step, after unscaling and before clipping, so that λ means the same under any loss scale
        and any number of micro-batches. Parameters without a gradient are passed over. Source: Zhou et al. 2021.

        Under FSDP2 a gradient arrives as dL/dW~, and is made dL/dW here where a recipe tells them apart.
        """
        self._refuse_ended()
        self._edited = True
        for name, effective in self._effective.items():
            strength = max(self._progress.stages[index].sr_ste for index, _ in effective.slots)
            weight = self._dense_weight(name)
            if weight.grad is None:
                continue
            gradient, w = held(weight.grad), held(weight)
            if effective.shard is not None and effective.coefficient is not None:
                factor = effective.coefficient
                gradient.copy_(torch.where(factor != 0, gradient * factor, 0))
            if strength:
                gradient.add_(torch.where(effective.mask, 0, w).to(gradient.dtype), alpha=strength)

    def step(self, n: int | None = None) -> None:
        """Move on by one optimizer step, or to `n` steps done, and derive masks and W~ from the new weights.

        Call it after every `optimizer.step()`; a loop that owns the count (fp16 loss scaling may skip steps) passes
        it. `total_steps` calls are legal. Raises `ValueError` beyond the end or backwards, `RuntimeError` for a run
        that `finalize` or `detach` has ended.
        """
        self._refuse_ended()
        step = self.current_step + 1 if n is None else n
        if isinstance(step, bool) or not isinstance(step, int):
            raise TypeError(f"n is a number of optimizer steps, not {n!r}")
        if step > self.total_steps:
            raise ValueError(
                f"step {step} lies beyond the end: this run was planned for total_steps={self.total_steps}; "
                "finalize it, or plan a longer one"
            )
        if step < self.current_step:
            raise ValueError(f"step {step} lies before step {self.current_step}; load_state_dict rewinds a run")
        if not self._calibrated:
            raise RuntimeError(f'recipe "{self.recipe.name}" scores weights by gradients: call calibrate first')
        if not self._edited and any(each.shard and each.coefficient is not None for each in self._effective.values()):
            raise RuntimeError(
                f'recipe "{self.recipe.name}" under FSDP2 has the gradients of pruned weights scaled by '
                "edit_gradients(): call it before every optimizer.step()"
            )
        self._edited = False
        self._advance(step)

    def calibrate(self, loss_fn: Callable[[nn.Module, Any], Tensor], batches: Iterable[Any]) -> None:
        """Fix the masks of a recipe that scores by gradients: s = abs(g ⊙ W), g summed over the batches.

        `loss_fn(model, batch)` returns a scalar. Gradients of the model are cleared. Source: Lee et al. 2019 (SNIP),
        applied block by block. Raises `ValueError` for other recipes, for no batches, and where g is NaN or inf.
        """
        self._refuse_ended()
        if not self.recipe.needs_gradients:
            raise ValueError(f'recipe "{self.recipe.name}" takes its masks from the weights; only snip is calibrated')
        if self._calibrated:
            raise ValueError("the masks are fixed already; a run is calibrated once")
        self.model.zero_grad(set_to_none=True)
        count = 0
        for batch in batches:
            loss_fn(self.model, batch).backward()  # type: ignore[no-untyped-call]  # not annotated
            count += 1
        masks: dict[int, Tensor] = {}
        problems = [] if count else ["no batches to calibrate on"]
        for index, slot in enumerate(self.slots):
            weight, effective = self._dense_weight(slot.name), self._effective[slot.name]
            if weight.grad is None:
                problems.append(f"{slot.label}: its gradient is missing")
                continue
            gradient = effective.rows(weight.grad, slot)
            if count_all(~torch.isfinite(gradient), effective.shard):
                problems.append(f"{slot.label}: its gradient is NaN or inf")
                continue
            scores = (gradient * effective.rows(weight, slot)).detach().abs()
            masks[index] = rows_mask(scores, slot.pattern, self._mask_remainder)
        self.model.zero_grad(set_to_none=True)
        if problems:
            raise ValueError("\n".join(problems))
        self._progress.fixed.update(masks)
        self._calibrated = True
        self._advance(self.current_step)
        self._forget_flips()

    def _advance(self, step: int) -> None:
        """Put every slot in its stage of `step` and derive W~ once."""
        before = self._progress.stages
        self._progress.stages = stages_at(self.slots, self.recipe, step, self.total_steps)
        self._progress.serial += 1
        self._progress.resumed = False
        self.current_step = step
        for index, stage in enumerate(self._progress.stages):
            if stage.mask == "fresh" or stage.pattern.is_dense or not self._calibrated:
                continue
            if index not in self._progress.fixed or before[index].pattern != stage.pattern:
                self._progress.fixed[index] = self._best_of(index, stage.pattern, self._rows(self.slots[index]))
        changed = any(a.pattern != b.pattern for a, b in zip(before, self._progress.stages, strict=True))
        for name, effective in self._effective.items():
            effective.derive(self._dense_weight(name), new_masks=changed or step % self.mask_every == 0)

    def _forget_flips(self) -> None:
        """No step has been taken."""
        for effective in self._effective.values():
            effective.flips.clear()

    def _best_of(self, index: int, pattern: Pattern, w_RK: Tensor) -> Tensor:
        """The mask of `pattern` by magnitude, among the survivors of a kept mask where there is one (IDP)."""
        scores, survivors = w_RK.detach().abs(), self._progress.fixed.get(index)
        if survivors is not None:  # pruned entries score below every weight
            scores = torch.where(survivors.to(scores.device), scores, -1.0)
        return rows_mask(scores, pattern, self._mask_remainder)

    # -- looking -------------------------------------------------------------------------------------------------

    def dense_weight(self, name: str) -> nn.Parameter:
        """The dense W of a sparse parameter, to write to or to read its gradient from."""
        if name not in self._effective:
            raise KeyError(f"{name} is not sparse here; the sparse ones are {', '.join(self._effective)}")
        return self._dense_weight(name)

    def report(self) -> SparsityReport:
        """Per slot: pattern now, target, density of W~, decay D(j), phase, mask flips of the last step."""
        return SparsityReport(self.current_step, self.total_steps, tuple(self._slot_reports()))

    def _slot_reports(self) -> Iterable[SlotReport]:
        weights = [self._effective[slot.name] for slot in self.slots]
        counts = torch.zeros(len(self.slots), 2, dtype=torch.int64, device=weights[0].effective.device)
        for index, (slot, effective) in enumerate(zip(self.slots, weights, strict=True)):
            counts[index, 0] = effective.rows(effective.effective, slot).count_nonzero()
            counts[index, 1] = effective.flips.get(index, 0)
        totals = summed(counts, [effective.shard for effective in weights]).tolist()
        for slot, stage, (nonzero, flips) in zip(self.slots, self._progress.stages, totals, strict=True):
            yield SlotReport(
                slot.label,
                str(stage.pattern),
                str(slot.pattern),
                nonzero / max(slot.weights, 1),
                stage.decay,
                stage.phase,
                flips,
                slot.weights,
            )

    # -- saving --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where the run is: integers and names, and the bits of masks that do not follow from the weights.

        Save it beside the model's own state dict; `load_state_dict` of both, in any order, resumes to the same bits.
        Masks are uint8 tensors, eight entries a byte, keyed by slot label.
        """
        masks = {
            slot.label: pack_bits(self._whole_mask(index))
            for index, slot in enumerate(self.slots)
            if self._carries(index) or index in self._progress.fixed
        }
        return {**self._identity(), "step": self.current_step, "calibrated": self._calibrated, "masks": masks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken. Raises `ValueError` naming what differs, before any change."""
        self._refuse_ended()
        mine = self._identity()
        missing = [key for key in (*mine, "step", "calibrated", "masks") if key not in state]
        if missing:
            raise ValueError(f"not a sparsifier's state: it lacks {', '.join(missing)}")
        problems = [
            f"{key}: the state has {state[key]!r}, this run {value!r}"
            for key, value in mine.items()
            if state[key] != value
        ]
        step, masks = state["step"], state["masks"]
        if not isinstance(masks, Mapping):
            problems.append(f"masks: {type(masks).__name__} is no mapping from slots to their bits")
            masks = {}
        if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step <= self.total_steps:
            problems.append(f"step: {step!r} does not lie in 0..{self.total_steps}")
        labels = {slot.label: slot for slot in self.slots}
        for label, bits in masks.items():
            size = labels[label].weights if label in labels else -1
            if size < 0:
                problems.append(f"mask of {label}: no such slot")
            elif not isinstance(bits, Tensor) or bits.dtype != torch.uint8 or bits.shape != (-(-size // 8),):
                problems.append(f"mask of {label}: expected {-(-size // 8)} bytes")
        if not problems:
            stages = stages_at(self.slots, self.recipe, step, self.total_steps)
            problems += [
                f"mask of {slot.label}: missing"
                for slot, stage in zip(self.slots, stages, strict=True)
                if slot.label not in masks and self._needs_mask(stage, bool(state["calibrated"]))
            ]
        if problems:
            raise ValueError("this state belongs to another run:\n" + "\n".join(problems))
        unpacked = {
            index: self._part_of(slot, masks[slot.label])
            for index, slot in enumerate(self.slots)
            if slot.label in masks
        }
        self._calibrated = bool(state["calibrated"])
        self._progress.stages = stages
        self._progress.serial += 1
        self._progress.resumed = True
        self._progress.fixed = {i: mask for i, mask in unpacked.items() if stages[i].mask != "fresh"}
        self.current_step = step
        for name, effective in self._effective.items():
            carried = [(i, slot) for i, slot in effective.slots if self._carries(i)]
            for index, slot in carried:
                effective.write_rows(effective.mask, slot, unpacked[index])
            effective.derive(self._dense_weight(name), new_masks=not carried)

    def _needs_mask(self, stage: Stage, calibrated: bool) -> bool:
        """True where a state has to bring the mask, since the weights alone do not say what it is."""
        if stage.mask == "fresh":
            return self._progress.carries_masks
        return calibrated and not stage.pattern.is_dense

    def _carries(self, index: int) -> bool:
        """True where the mask of a slot is an older one because of `mask_every`."""
        return self._progress.carries_masks and self._progress.stages[index].mask == "fresh"

    def _identity(self) -> dict[str, Any]:
        return {
            "format": 1,
            "recipe": self.recipe.to_dict(),
            "total_steps": self.total_steps,
            "remainder": self.remainder,
            "mask_every": self.mask_every,
            "slots": slots_to_json(self.slots),
        }

    # -- the end -------------------------------------------------------------------------------------------------

    def detach(self) -> None:
        """Give the modules their own classes back and leave the weights dense, as if nothing had been attached."""
        detach(self.model)
        self._ended = _over("detach() has given its model back")

    @torch.no_grad()
    def finalize(self, model: nn.Module | None = None) -> SparsityReport:
        """Write the mask into the weights, give the modules their own classes back, and check every block.

            W <- W ⊙ Φ,    Φ of the target pattern

        The model is an ordinary one afterwards, with its slots noted for `compress` and `verify`. `model` may be a
        deep copy of the sparsified model (an average of weights) to be finalized in its place; then this run goes
        on. Before the end of the recipe the mask is cut to the target at once, and the report says `early`.
        Raises `ValueError` for NaN or inf weights, by name, before anything is changed.
        """
        model = self.model if model is None else model
        reshard(model)
        weights = attached_weights(model)
        if len(weights) != len(self._effective):
            raise ValueError("this model carries no sparse weights of this run; finalize works once")
        if not self._calibrated:
            raise RuntimeError(f'recipe "{self.recipe.name}" scores weights by gradients: call calibrate first')
        problems = _not_finite({name: weight for name, (weight, _) in weights.items()})
        if problems:
            raise ValueError("\n".join(problems))
        masks: dict[Slot, Tensor] = {}  # all of them before anything is written
        for name, (weight, effective) in weights.items():
            for index, slot in effective.slots:
                slot = replace(slot, name=name)
                final = self.recipe.at(self.total_steps, self.total_steps, slot.pattern, slot.axis).pattern
                if final.is_dense:  # the recipe "dense", the baseline
                    continue
                rows = effective.rows(weight.detach(), slot)
                mask = self._final_mask(index, rows, effective)
                if bool((block_counts(mask & (rows != 0), final) > final.n).any()):
                    raise RuntimeError(f"{slot.label}: the final mask is not {final}; this is a defect of nmflow")
                masks[slot] = mask
        slots = list(masks)
        for slot, mask in masks.items():
            weight, effective = weights[slot.name]
            rows = effective.rows(weight.detach(), slot)
            effective.write_rows(weight.detach(), slot, torch.where(mask, rows, 0))
        detach(model)
        record(model, slots)
        if any(effective in self._effective.values() for _, effective in weights.values()):  # not those of a copy
            self._ended = _over("its model is finalized")
        reports = tuple(_finalized(slot, *weights[slot.name]) for slot in slots)
        return SparsityReport(self.current_step, self.total_steps, reports, finalized=True)

    def _final_mask(self, index: int, rows: Tensor, effective: EffectiveWeight) -> Tensor:
        """Φ of the target: the one in force where the recipe has arrived, else cut from what has survived."""
        slot, fixed = self.slots[index], self._progress.fixed.get(index)
        if self._progress.stages[index].pattern == slot.pattern:
            if fixed is not None:
                return fixed.to(rows.device)
            if self._carries(index) and not effective.is_copy:
                return effective.rows(effective.mask, slot)
        return self._best_of(index, slot.pattern, rows)

    # -- inside --------------------------------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> Sparsifier:
        """Copied along with its model, as an average of a module that holds both is made; the run itself is one."""
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        copied._ended = (
            "this is a deep copy, whose model follows the original's run; for a second run build model and Sparsifier "
            "anew and load both state dicts"
        )
        return copied

    def _refuse_ended(self) -> None:
        """A loop that went on would train a dense model, or another run's, and this one would report a sparse one."""
        if self._ended is not None:
            raise RuntimeError(self._ended)

    def _check(self) -> Planned:
        """Refuse what cannot run, all problems at once; return the plans."""
        problems = _not_finite({slot.name: self.model.get_parameter(slot.name) for slot in self.slots})
        if not self.slots:
            reasons = "; ".join(f"{label}: {reason}" for label, reason in self.coverage.dense.items())
            problems.append(f"no weight is left to make sparse: {reasons}")
        planned, unplanned = plan_slots(self.slots, self.recipe, self.total_steps, self.remainder)
        problems += unplanned
        blends = any(stage.decay and not stage.outer.is_dense for stages in planned.values() for stage in stages)
        if blends and self.mask_every > 1:  # Φ_outer is of W now, Φ of an older one: what was let go would come back
            problems.append(
                f"mask_every={self.mask_every}: mask decay that follows another recipe needs both its masks of one "
                "step; use mask_every=1, or a sequence without mask decay after its first part"
            )
        if problems:
            raise ValueError("\n".join(dict.fromkeys(problems)))
        return planned

    def _dense_weight(self, name: str) -> nn.Parameter:
        module, _, local = name.rpartition(".")
        parameter = self._effective[name].dense(self.model.get_submodule(module), local)
        assert parameter is not None
        return parameter

    def _rows(self, slot: Slot) -> Tensor:
        return self._effective[slot.name].rows(self._dense_weight(slot.name), slot)

    def _whole_mask(self, index: int) -> Tensor:
        """The mask of a slot that does not follow from W, all of it. Collective where the weight is spread."""
        slot, fixed = self.slots[index], self._progress.fixed.get(index)
        effective = self._effective[slot.name]
        if effective.shard is None:
            return effective.rows(effective.mask, slot) if fixed is None else fixed
        mask = effective.mask.clone()
        if fixed is not None:
            effective.write_rows(mask, slot, fixed)
        gathered = effective.shard.gathered(mask.to(torch.uint8)).bool()
        return to_rows(gathered, slot.layout)[slice(*slot.row_range)]

    def _part_of(self, slot: Slot, bits: Tensor) -> Tensor:
        """Of the packed mask of a slot the part that belongs to what this process holds."""
        weight, part = self._dense_weight(slot.name), self._effective[slot.name].part(slot)
        shape = (slot.weights // slot.axis, slot.axis)
        return unpack_bits(bits.to(held(weight).device), shape)[part.rows, part.columns]

    @property
    def _mask_remainder(self) -> Remainder:
        return "partial" if self.remainder == "partial" else "error"


def _over(why: str) -> str:
    return f"this run is over: {why}, and would train densely; to go on sparsely, build a new Sparsifier on the model"


def _not_finite(weights: Mapping[str, Tensor]) -> list[str]:
    counts = {name: int(full((~torch.isfinite(weight.detach())).sum())) for name, weight in weights.items()}
    return [f"{name}: {count} of its weights are NaN or inf" for name, count in counts.items() if count]


def _finalized(slot: Slot, weight: Tensor, effective: EffectiveWeight) -> SlotReport:
    nonzero = count_all(effective.rows(weight, slot), effective.shard)
    density = nonzero / max(slot.weights, 1)
    return SlotReport(slot.label, str(slot.pattern), str(slot.pattern), density, 0.0, "fine-tune", 0, slot.weights)
