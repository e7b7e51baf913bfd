"""The training loop: every optimizer step is a function of the state of the run and of (seed, step), nothing else."""

from __future__ import annotations

import hashlib
import math
import os
import random
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from nmflow.models import build_model
from nmflow.probes import GradientProbe
from nmflow.shards import full
from nmflow.sparsifier import Sparsifier
from nmflow.sparsity import SparsityReport
from nmflow.train.attention import attention_in_float32
from nmflow.train.average import Average
from nmflow.train.bleu import check_bleu
from nmflow.train.checkpoint import Position, State
from nmflow.train.config import TrainConfig
from nmflow.train.data import Data, Inputs, Split, Uneven, batch_indices, longest_first, share, step_generator
from nmflow.train.data.augment import mix
from nmflow.train.objectives import NOT_COUNTED, Outcomes, in_order, interleaved, mean_loss, trained_by
from nmflow.train.optim import build_optimizer, learning_rate
from nmflow.train.recorder import Recorder
from nmflow.train.spread import spread
from nmflow.train.stop import how_to_resume

EVAL_BATCH = 256
EVAL_LOGITS = 1 << 27
"""Logits of one batch of an evaluation, at most: half a gigabyte in float32."""
CALIBRATION_BATCHES = 4
"""Batches whose gradients score the weights for snip."""


class DivergedError(ValueError):
    """A loss or gradient is NaN or inf; the last checkpoint, where there is one, is older and sound."""


@dataclass(frozen=True)
class Training:
    """One run, ready for a step."""

    data: Data
    accelerator: Accelerator
    model: nn.Module
    """As Accelerate prepared it: what a step calls."""
    optimizer: Any
    """As Accelerate prepared it."""
    state: State
    """The same parts without wrappers: what is saved, finalized and evaluated."""

    @property
    def config(self) -> TrainConfig:
        return self.state.config


def connect(precision: str) -> Accelerator:
    """Find the device and the other processes of this run; the first thing a run does.

    Raises `ValueError` where this machine has no such precision, and where the launcher was told what Accelerate does
    not follow: several processes, or to accumulate gradients.
    """
    accelerator = Accelerator(mixed_precision=precision)
    if precision != "no" and not accelerator.native_amp:
        raise ValueError(
            f"precision={precision}: Accelerate would compute in float32 on {accelerator.device.type}; say "
            "precision=no, or try bf16"
        )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        raise ValueError(
            f"{started} processes were started, and each finds itself alone; without GPUs Accelerate connects them "
            "where ACCELERATE_USE_CPU=true is set"
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError("accelerate is told to accumulate gradients; give that to the run instead: accumulate=...")
    return accelerator


def prepare(config: TrainConfig, data: Data) -> Training:
    """Build network, sparsifier and optimizer of a run; the same seed gives the same first weights.

    Raises `ValueError` where they do not fit together (see `connect`, `check_bleu`, `share`, `build_model`,
    `Sparsifier`, `GradientProbe`, `spread`).
    """
    accelerator = connect(config.precision)
    data = replace(data, objective=trained_by(data.objective, config.optim))
    check_bleu(config.bleu, data)
    if config.batch > len(data.train):
        raise ValueError(
            f"batch={config.batch} is more than the {len(data.train):,} items of the training split; take fewer"
        )
    share(config.batch, 0, accelerator.num_processes, 0, config.accumulate)
    torch.manual_seed(config.seed)
    model = build_model(config.model, data).to(accelerator.device)
    sparsifier = Sparsifier(
        model,
        config.resolved_targets(),
        config.build_recipe(),
        total_steps=config.steps,
        remainder=config.remainder,
        mask_every=config.mask_every,
    )
    average = Average(model, config.optim.ema) if config.optim.ema is not None else None
    if config.shard:
        prepared_model = spread(model, accelerator)
        optimizer = build_optimizer(model, config.optim, accelerator.scaler is not None)
        prepared_optimizer = accelerator.prepare(optimizer)
    else:
        optimizer = build_optimizer(model, config.optim, accelerator.scaler is not None)
        prepared_model, prepared_optimizer = accelerator.prepare(model, optimizer)
    probe = GradientProbe(sparsifier, optimizer, config.probe_every) if config.probe_every is not None else None
    state = State(config, model, optimizer, sparsifier, accelerator.scaler, average, probe)
    return Training(data, accelerator, prepared_model, prepared_optimizer, state)


@attention_in_float32()
def fit(run: Training, start: Position, recorder: Recorder, asked_to_stop: Callable[[], bool], resume: str) -> None:
    """Take the optimizer steps of a run that are not yet taken.

        for step in range(start, total):
            for micro in range(accumulate):                  # every reader of .weight sees W~
                backward(loss(model(batch)) / accumulate)
            unscale()
            sparsifier.edit_gradients()                      # SR-STE's λ(1-Φ)W, once a step
            probe.before_step()                              # gradient noise, where it is probed (probe_every)
            clip(); optimizer.step(); optimizer.zero_grad()
            sparsifier.step(n=step + 1)                      # Φ and W~ of the new W
            average.update(model, step + 1)                  # where there is one (optim.ema)
            probe.after_step(); log; evaluate; save; stop here if asked to

    A line of the log says, at "step" n, the loss, learning rate and gradient norm (before clipping; null where fp16
    skipped the step) of the n-th step, and the sparsity that holds from there on. Besides every `log_every` steps
    there is one wherever phase or pattern change. Gradient noise has lines of its own, every `probe_every` steps.
    Asked to stop, it saves and raises `Interrupted` with the command `resume`. Raises `DivergedError`.
    """
    config, state = run.config, run.state
    changes = _changes(state.sparsifier)
    if start.step == 0:
        recorder.write({"step": 0, **_sparsity(state.sparsifier.report())})
    for step in range(start.step, config.steps):
        loss, grad_norm = take_step(run, step)
        noise = state.probe.after_step() if state.probe is not None else None
        done = step + 1
        is_saved = start.step > 0 or step >= config.checkpoint_every
        stopping = _anywhere(run.accelerator, asked_to_stop())
        saves = stopping or _is_due(done, config.checkpoint_every, config.steps)
        logs = done in changes or _is_due(done, config.log_every, config.steps)
        if saves or logs:
            # A step that fp16 skips, because its loss scale was too large, has no gradient to speak of.
            norm = None if run.optimizer.step_was_skipped else float(grad_norm)
            figures = {"loss": _mean(run.accelerator, loss), "grad_norm": norm}
            _check_finite(done, figures, is_saved)
        if logs:
            rate = learning_rate(config.optim, step, config.steps)
            recorder.write({"step": done, **figures, "lr": rate, **_sparsity(state.sparsifier.report())})
        if noise is not None:
            recorder.write(noise.line())
        if _is_due(done, config.eval_every, config.steps):
            score = evaluate(state.judged, run.data, "val", run.accelerator.device, run.accelerator)
            _check_finite(done, {"val_loss": score.loss}, is_saved)
            values = {f"val_{name}": value for name, value in score.figures.items()}
            recorder.write({"step": done, "val_loss": score.loss, **values})
        if saves:
            recorder.save(state, done)
        recorder.advance(done)
        if stopping:
            run.accelerator.wait_for_everyone()
            raise how_to_resume(resume, f"after step {done} of {config.steps}, with a checkpoint")


def take_step(run: Training, step: int) -> tuple[Tensor, Tensor]:
    """One optimizer step; returns the loss of this process's share of the batch, and the gradient norm.

    Where the run is probed, the caller asks for what was seen: `state.probe.after_step()`, after every step.
    """
    config, accelerator = run.config, run.accelerator
    process, num_processes = accelerator.process_index, accelerator.num_processes
    seed_step(config.seed, step, process)
    indices = _items_of(run, step)
    run.model.train()
    loss = torch.zeros((), device=accelerator.device)
    rounds = config.accumulate
    parts = [share(config.batch, process, num_processes, micro, rounds) for micro in range(rounds)]
    batches = [_drawn(run, indices[part], step_generator(config.seed, step, part.start)) for part in parts]
    weights = _weights(run, [batch.targets for batch in batches])
    for micro, (batch, weight) in enumerate(zip(batches, weights, strict=True)):
        inputs, targets = on_device((batch.inputs, batch.targets), accelerator.device)
        is_last = micro == config.accumulate - 1
        # Spread gradients are summed with every micro-batch: whole ones, kept until the last, are what FSDP2 avoids.
        with nullcontext() if is_last or config.shard else accelerator.no_sync(run.model):
            logits, smoothing = logits_of(run.model, inputs), config.optim.label_smoothing
            micro_loss = run.data.objective.loss(logits, targets, smoothing)
            if batch.partners is not None:
                others = run.data.objective.loss(logits, targets[batch.partners.to(targets.device)], smoothing)
                micro_loss = batch.own * micro_loss + (1 - batch.own) * others
            micro_loss = micro_loss * weight if isinstance(weight, float) else micro_loss / weight
            accelerator.backward(micro_loss)
        loss += micro_loss.detach()
    accelerator.unscale_gradients(run.optimizer)
    run.state.sparsifier.edit_gradients()
    if run.state.probe is not None:
        run.state.probe.before_step(step + 1)
    grad_norm = _clip(run.state.model, config.optim.clip)
    for group in run.state.optimizer.param_groups:
        group["lr"] = learning_rate(config.optim, step, config.steps)
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.state.sparsifier.step(n=step + 1)
    if run.state.average is not None:
        run.state.average.update(run.state.model, step + 1)
    return loss, grad_norm


@dataclass(frozen=True)
class _Batch:
    """One micro-batch; after mixup with the places of the partners, and the part of an image that is its own."""

    inputs: Inputs
    targets: Tensor
    partners: Tensor | None = None
    own: float = 1.0


def _items_of(run: Training, step: int) -> Tensor:
    """The items of a step, of all processes."""
    config, items = run.config, run.data.train
    lengths = items.lengths if config.data.like_lengths and isinstance(items, Uneven) else None
    return batch_indices(len(items), config.batch, config.seed, step, lengths)


def _drawn(run: Training, indices: Tensor, generator: torch.Generator) -> _Batch:
    inputs, targets = run.data.train.batch(indices, generator)
    if run.config.data.mixup is None or not isinstance(inputs, Tensor):
        return _Batch(inputs, targets)
    mixed, partners, own = mix(inputs, run.config.data.mixup, generator)
    return _Batch(mixed, targets, partners, own)


def _weights(run: Training, targets: list[Tensor]) -> list[float | int]:
    """What the mean loss of every micro-batch counts in the mean over the whole batch: a factor, or a whole divisor.

    Sentences differ in length, so that a mean of means would favour the words of short batches. Where all batches
    have as many targets, that is a division by their number.
    """
    accelerator, rounds = run.accelerator, len(targets)
    counts = [int((each != NOT_COUNTED).sum()) for each in targets]
    whole = sum(counts)
    if accelerator.num_processes > 1:
        spread = torch.tensor([whole, -min(counts), max(counts)], dtype=torch.float64, device=accelerator.device)
        gathered = accelerator.gather(spread).view(-1, 3).cpu()
        whole, lowest, highest = int(gathered[:, 0].sum()), -int(gathered[:, 1].max()), int(gathered[:, 2].max())
    else:
        lowest, highest = min(counts), max(counts)
    if lowest == highest:
        return [rounds] * rounds
    # Gradients are averaged over processes, hence their number.
    return [count * accelerator.num_processes / whole for count in counts]


def calibrate(run: Training) -> None:
    """Fix the masks of a recipe that scores weights by gradients (snip), on the run's first batches; else nothing."""
    config, sparsifier = run.config, run.state.sparsifier
    if not sparsifier.recipe.needs_gradients:
        return
    steps = range(min(CALIBRATION_BATCHES, config.steps))
    batches = (run.data.train.batch(_items_of(run, step)) for step in steps)

    def loss_of(model: nn.Module, batch: tuple[Inputs, Tensor]) -> Tensor:
        inputs, targets = on_device(batch, run.accelerator.device)
        return run.data.objective.loss(logits_of(model, inputs), targets)

    run.state.model.eval()  # no dropout: every process finds the same masks
    sparsifier.calibrate(loss_of, batches)


# -- what is measured --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """How well a model does on a split: the mean loss, and the objective's measures, the main one first."""

    loss: float
    figures: dict[str, float]
    items: int
    """Items, or for language tokens."""
    further: Mapping[str, Score | None] = field(default_factory=dict)
    """Those of further test splits by name, none where one is not there."""

    @property
    def main(self) -> float:
        """The measure that a run is judged by."""
        return next(iter(self.figures.values()))

    def to_dict(self) -> dict[str, Any]:
        """As result.json has it."""
        further = {name: score and score.to_dict() for name, score in self.further.items()}
        return {"loss": self.loss, **self.figures, "items": self.items, **further}


def logits_of(model: nn.Module, inputs: Inputs) -> Tensor:
    """What a network gives for one batch, whether it takes one tensor or several by name, and however it wraps it."""
    out = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    logits: Tensor = out if isinstance(out, Tensor) else out.logits
    return logits


def on_device(batch: tuple[Inputs, Tensor], device: torch.device | str) -> tuple[Inputs, Tensor]:
    """A batch where the model is."""
    inputs, targets = batch
    if isinstance(inputs, Mapping):
        return {name: tensor.to(device) for name, tensor in inputs.items()}, targets.to(device)
    return inputs.to(device), targets.to(device)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: Data,
    split: Literal["train", "val", "test"],
    device: torch.device | str,
    accelerator: Accelerator | None = None,
) -> Score:
    """Loss and measures on a whole split, in eval mode. Given an accelerator, its processes share the work."""
    process, num_processes = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    items: Split = getattr(data, split)
    was_training = model.training
    model.eval()
    mine = torch.arange(len(items))[process::num_processes]
    order = longest_first(items, mine)
    found: list[Outcomes] = []
    places = data.sample_shape[0] if data.kind in ("text", "translation") else 1
    size = max(1, min(EVAL_BATCH, EVAL_LOGITS // (places * data.num_classes)))
    for first in range(0, -(-len(items) // num_processes), size):
        batch = mine[order[first : first + size]]
        # The layers of a spread network are gathered by all processes together: one that has run out of items
        # computes some again, to no account.
        inputs, targets = on_device(items.batch(batch if len(batch) else torch.tensor([0])), device)
        outcomes = data.objective.outcomes(logits_of(model, inputs), targets)
        if len(batch):
            found.append({name: tensor.cpu() for name, tensor in outcomes.items()})
    model.train(was_training)
    found = [in_order(found, order)] if found else []
    shares = gather_object([found]) if num_processes > 1 else [found]
    whole = interleaved(shares)
    return Score(mean_loss(whole), data.objective.figures(whole), int(whole["count"].sum()))


def _sparsity(report: SparsityReport) -> dict[str, Any]:
    """The sparsity of a run in one line. D and phase are those of all slots: they depend on the step alone."""
    return {
        "decay": report.slots[0].decay,
        "density": report.density,
        "phase": report.slots[0].phase,
        "pattern": " + ".join(dict.fromkeys(slot.pattern for slot in report.slots)),
        "flips": report.flips,
    }


def _changes(sparsifier: Sparsifier) -> set[int]:
    """The steps at which phase or pattern of some slot change."""
    kinds = {(slot.pattern, slot.axis) for slot in sparsifier.slots}
    return {
        step for pattern, axis in kinds for step in sparsifier.recipe.changes(sparsifier.total_steps, pattern, axis)
    }


# -- small things ------------------------------------------------------------------------------------------------


def seed_step(seed: int, step: int, process: int = 0) -> None:
    """Seed every global random stream for one step of one process.

    So dropout, like the order of the data, follows from (seed, step): a run resumes without saved random states,
    on any number of processes.
    """
    digest = hashlib.blake2b(f"step:{seed}:{step}:{process}".encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "little")
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.manual_seed(number >> 1)


def _clip(model: nn.Module, limit: float | None) -> Tensor:
    """Scale the gradients to a norm of at most `limit`; returns the norm before that."""
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    if limit is None:
        return full(nn.utils.get_total_norm([each.grad for each in parameters if each.grad is not None]))
    return full(nn.utils.clip_grad_norm_(parameters, limit))


def _is_due(done: int, every: int, total: int) -> bool:
    return done % every == 0 or done == total


def _mean(accelerator: Accelerator, value: Tensor) -> float:
    return float(accelerator.reduce(value, "mean") if accelerator.num_processes > 1 else value)


def _anywhere(accelerator: Accelerator, flag: bool) -> bool:
    """True on every process if it is true on one."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum") > 0)


def _check_finite(step: int, figures: dict[str, float | None], is_saved: bool) -> None:
    bad = [name for name, value in figures.items() if value is not None and not math.isfinite(value)]
    if bad:
        before = "the last checkpoint is from before; " if is_saved else ""
        raise DivergedError(
            f"step {step}: {' and '.join(bad)} NaN or inf; {before}a smaller optim.lr or optim.clip may help"
        )
