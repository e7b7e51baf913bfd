"""Hugging Face's `Trainer` and `Seq2SeqTrainer`: what of a sparse run happens when in theirs, and what is refused."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from nmflow.attach import attached_weights
from nmflow.integrations.run import FINISHED, CarriesRun, SparseRun
from nmflow.integrations.state import read_state, write_state
from nmflow.masks import Remainder
from nmflow.schedules import Recipe, plan
from nmflow.schedules import recipe as recipe_by_name
from nmflow.sparsifier import Sparsifier
from nmflow.targets import Targets, resolve

STATE_FILE = "nmflow_sparsity.safetensors"
"""The sparsifier's state, in every checkpoint folder of the trainer."""


def sparsify(
    trainer: Any,
    targets: Targets,
    recipe: str | Recipe = "mdgf-exponential",
    remainder: Remainder = "error",
    mask_every: int = 1,
    probe_every: int | None = None,
) -> SparsityCallback:
    """Make `trainer.train()` end with N:M weights. Call it once, before `train`; nothing changes until then.

        callback = sparsify(trainer, {"ff": "1:16"})
        trainer.train()                                # resume_from_checkpoint goes on to the same bits
        trainer.save_model("final")                    # N:M weights in the dense layout, for from_pretrained
        print(callback.report.density)

    The steps of the recipe are the trainer's optimizer steps (`state.max_steps`). Evaluation sees the sparse weights,
    checkpoints hold the dense ones and the sparsifier's state; the weights are cut when training has ended, so
    the trainer's last `checkpoint-…` is for resuming, `save_model` for using. Lines of the training log say where the
    recipe stands (`nm_decay`, `nm_density`) and, looked at every `probe_every` steps, how noisy gradients are
    (`nm_grad_abs_var` …, see `GradientProbe`; `callback.noise` has those of each layer). Other arguments as in
    `Sparsifier`.

    Raises one `ValueError` that lists every reason why this trainer, model or recipe cannot be made sparse.
    """
    chosen = recipe_by_name(recipe) if isinstance(recipe, str) else recipe
    problems = _problems(trainer, chosen)
    if problems:
        raise ValueError("\n".join(problems))
    resolve(_plain(trainer), targets, remainder)  # a rule that matches nothing is told now, not after the data is read
    callbacks: list[Any] = trainer.callback_handler.callbacks
    for other in [callback for callback in callbacks if isinstance(callback, SparsityCallback)]:
        if other.report is None:
            raise ValueError("this trainer is sparsified already; one call before train() is enough")
        other.leave()
    callback = _callback_class()(trainer, targets, chosen, remainder, mask_every, probe_every)
    trainer.add_callback(callback)
    callbacks.insert(0, callbacks.pop())  # before the user's own, which may look at the weights
    return callback


class SparsityCallback(CarriesRun):
    """The sparse run inside a trainer's; made by `sparsify`, which joins it with `transformers.TrainerCallback`."""

    def __init__(
        self,
        trainer: Any,
        targets: Targets,
        recipe: Recipe,
        remainder: Remainder,
        mask_every: int,
        probe_every: int | None,
    ) -> None:
        self._trainer = trainer
        self._plan = (targets, recipe, remainder, mask_every)
        self._probe_every = probe_every
        self._checkpoint: Path | None = None  # the folder this run resumes from
        self._edited = False  # whether SR-STE's term of this optimizer step has been added
        self._unhook: Callable[[], None] = _nothing
        # A callback is not told what the run resumes from, and hears of it after the weights were loaded.
        train, restore = trainer.train, _restoring(trainer, "train")

        @functools.wraps(train)
        def checked_train(resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
            self._checkpoint = self._checked(resume_from_checkpoint)
            try:
                return train(resume_from_checkpoint, *args, **kwargs)
            finally:
                self._unhook()

        trainer.train = checked_train
        self._restore_train = restore

    def leave(self) -> None:
        """Take the callback out of its trainer again. The model is left as it is."""
        self._trainer.remove_callback(self)
        self._restore_train()

    # -- the trainer's moments, in the order in which they come ---------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach: the model is on its device and wrapped, the optimizer made, a checkpoint's weights are loaded."""
        if state.max_steps < 1:
            raise ValueError(
                f"this run has {state.max_steps} optimizer steps, and a recipe is laid out over them; "
                "set max_steps or num_train_epochs"
            )
        if state.global_step and self._checkpoint is None:
            raise ValueError("the run resumes, but not by trainer.train(resume_from_checkpoint=...): call that")
        model = _plain(self._trainer)
        if self.sparsifier is not None and self.sparsifier.model is model and attached_weights(model):
            self.sparsifier.detach()  # of a run that was broken off
        targets, recipe, remainder, mask_every = self._plan
        self._run = self.report = None
        sparsifier = Sparsifier(model, targets, recipe, state.max_steps, remainder, mask_every)
        try:
            run = SparseRun(sparsifier, self._trainer.optimizer, self._probe_every)
            if self._checkpoint is not None:
                _resume(run, self._checkpoint / STATE_FILE, state.global_step)
        except BaseException:
            sparsifier.detach()
            raise
        self._run = run
        self._edited = False
        self._hook(self._trainer.accelerator)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The last moment before the optimizer: releases that do not clip do not unscale either."""
        if not self._edited and self.sparsifier is not None:
            if args.max_grad_norm and _edits(self.sparsifier):
                raise RuntimeError(
                    "the gradients were clipped before SR-STE's term was added, since this trainer clips without "
                    "accelerator.clip_grad_norm_; clip by that, or choose another recipe"
                )
            self._trainer.accelerator.unscale_gradients()
        self._edited = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Step, before the trainer logs, evaluates and saves."""
        if self._run is not None and state.global_step > self._run.sparsifier.current_step:
            self._run.step(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Say in each line of the training where the recipe stands; loggers come after this callback."""
        if self._run is not None and self.report is None and logs is not None and "loss" in logs:
            figures = self._run.log_line()
            logs.update(figures)
            state.log_history[-1].update(figures)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the state into the checkpoint that was just written."""
        if self._run is None or state.is_hyper_param_search:
            return  # trials are never resumed
        current = self._run.state_dict()  # a call of all processes, where FSDP2 spreads the weights
        if args.should_save:
            write_state(Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE_FILE, current)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Finalize, so that what `save_model` writes is N:M."""
        if self.sparsifier is None:
            return
        self._unhook()
        self._finalize()
        if self._trainer.is_fsdp_enabled and "SHARDED" in str(_fsdp_plugin(self._trainer).state_dict_type):
            warnings.warn(
                "under SHARDED_STATE_DICT save_model writes nothing, and the checkpoints hold dense weights; before it "
                'call trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")',
                stacklevel=2,
            )

    # -- inside --------------------------------------------------------------------------------------------------

    def _checked(self, resume_from_checkpoint: str | bool | None) -> Path | None:
        """The folder to resume from. Everything that can be refused is refused here, before anything changes."""
        trainer = self._trainer
        problems = _problems(trainer, self._plan[1])
        folder = resume_from_checkpoint or None
        if folder is True:
            from transformers.trainer_utils import get_last_checkpoint

            folder = get_last_checkpoint(trainer.args.output_dir)  # None: the trainer itself says so
        if folder is not None and not (Path(folder) / STATE_FILE).is_file():
            problems.append(
                f"{folder}: has no {STATE_FILE}, so it cannot be said where the recipe stood; the checkpoint is "
                "not of a sparse run or was cut short: resume from another, or start anew from its weights"
            )
        if folder is None and trainer.model_init is None and self._has_finished(_plain(trainer)):
            problems.append(f"{FINISHED}; call sparsify anew if that is meant, or resume from a checkpoint")
        if problems:
            raise ValueError("\n".join(problems))
        return Path(folder) if folder is not None else None

    def _hook(self, accelerator: Any) -> None:
        """Add SR-STE's term where gradients are unscaled: accelerate does that first thing when it clips.

        The trainer clips, or asks for the norm, once an optimizer step, when the micro-batches are summed.
        """
        self._unhook()
        unscale, restore = accelerator.unscale_gradients, _restoring(accelerator, "unscale_gradients")

        @functools.wraps(unscale)
        def unscale_and_edit(*args: Any, **kwargs: Any) -> None:
            unscale(*args, **kwargs)
            if not self._edited and self._run is not None:
                self._run.edit_gradients(self._trainer.state.global_step + 1)
                self._edited = True

        def unhook() -> None:
            restore()
            self._unhook = _nothing

        accelerator.unscale_gradients = unscale_and_edit
        self._unhook = unhook


def _nothing() -> None:
    pass


def _restoring(owner: Any, name: str) -> Callable[[], None]:
    """What takes back that a method is replaced on one object."""
    if name in vars(owner):  # somebody else has replaced it before
        return functools.partial(setattr, owner, name, getattr(owner, name))
    return lambda: vars(owner).pop(name, None)


@functools.cache
def _callback_class() -> type[SparsityCallback]:
    from transformers import TrainerCallback

    return type("SparsityCallback", (SparsityCallback, TrainerCallback), {"__module__": __name__})


def _plain(trainer: Any) -> nn.Module:
    """The model itself, whatever trainer and accelerate have put around it."""
    model: nn.Module = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    return model


def _resume(run: SparseRun, path: Path, step: int) -> None:
    try:
        run.load_state_dict(read_state(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if run.sparsifier.current_step != step:
        raise ValueError(f"{path}: is of step {run.sparsifier.current_step}, but the trainer resumes at step {step}")


def _edits(sparsifier: Sparsifier) -> bool:
    """Whether the recipe ever adds SR-STE's term."""
    kinds = {(slot.pattern, slot.axis) for slot in sparsifier.slots}
    return any(
        segment.first.sr_ste
        for pattern, axis in kinds
        for segment in plan(sparsifier.recipe, sparsifier.total_steps, pattern, axis)
    )


def _fsdp_plugin(trainer: Any) -> Any:
    return trainer.accelerator.state.fsdp_plugin


def _problems_of_fsdp(trainer: Any) -> list[str]:
    """What of FSDP cannot be followed; the weights' own shapes are looked at when the run begins (`nmflow.shards`)."""
    plugin = _fsdp_plugin(trainer)
    if getattr(plugin, "fsdp_version", 1) != 2:
        return ['FSDP1: flattens weights, so that their rows are lost; use FSDP2: fsdp_config={"version": 2}']
    problems = []
    if type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy":  # accelerate makes a policy of either answer
        problems.append("FSDP2 with CPU offloading: gathers another copy than the sparse one; leave cpu_offload out")
    if trainer.accelerator.mixed_precision == "fp16":
        problems.append("fp16 under FSDP2: every process would find its own loss scale; use bf16")
    return problems


def _problems(trainer: Any, recipe: Recipe) -> list[str]:
    """Why this trainer cannot carry a sparse run, each with the way out."""
    args, problems = trainer.args, []
    if args.load_best_model_at_end:
        problems.append(
            "load_best_model_at_end: would put back an earlier checkpoint, whose weights are denser than the "
            "target, after the recipe has ended; set it to False"
        )
    if trainer.is_deepspeed_enabled:
        problems.append("DeepSpeed: keeps the weights in buffers of its own, where masks cannot follow; use DDP")
    if getattr(trainer, "is_fsdp_xla_enabled", False):
        problems.append("FSDP of torch_xla: keeps the weights where masks cannot follow; use FSDP2 or DDP")
    elif trainer.is_fsdp_enabled:
        problems += _problems_of_fsdp(trainer)
    elif any(type(parameter).__name__ == "DTensor" for parameter in trainer.model.parameters()):
        problems.append("the model is split over devices (DTensor), and with it the blocks; load it whole and use DDP")
    if args.n_gpu > 1:
        problems.append(
            "several GPUs in one process (DataParallel): its replicas lose the sparse weights; start a process a "
            "GPU (torchrun or accelerate launch), or show one GPU only (CUDA_VISIBLE_DEVICES)"
        )
    if getattr(trainer.model, "peft_config", None):
        problems.append("PEFT: the adapters are trained and saved, not the weights to be made sparse; merge them first")
    if any(word in str(getattr(args.optim, "value", args.optim)) for word in ("layerwise", "lomo")):
        problems.append(f"optim={args.optim}: steps during the backward pass, before masks and gradients are ready")
    if recipe.needs_gradients:
        problems.append(
            f'recipe "{recipe.name}": scores weights by gradients before training, which a trainer has no moment '
            "for; use nmflow.Sparsifier in a loop of your own, or another recipe"
        )
    return problems
