"""Lightning: what of a sparse run happens at which of its hooks, and what is refused."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Mapping
from typing import Any, cast

from nmflow.attach import attached_weights
from nmflow.integrations.run import FINISHED, CarriesRun, SparseRun
from nmflow.masks import Remainder
from nmflow.schedules import Recipe
from nmflow.schedules import recipe as recipe_by_name
from nmflow.sparsifier import Sparsifier
from nmflow.targets import Targets

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")  # one project under two names; their classes are not the same
_SHARDING = {"DeepSpeedStrategy", "FSDPStrategy"}
_AVERAGING = {"StochasticWeightAveraging", "WeightAveraging"}


def __getattr__(name: str) -> Any:
    """`SparsityCallback`, made when it is first asked for: only then Lightning has to be there."""
    if name != "SparsityCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = type(name, (SparsityHooks, _package().Callback), {"__module__": __name__, "__doc__": SparsityHooks.__doc__})
    globals()[name] = made
    return made


def _package() -> Any:
    """The Lightning that the program has imported, else one that is installed."""
    for package in _PACKAGES:
        if sys.modules.get(package) is not None:
            return sys.modules[package]
    for package in _PACKAGES:
        try:
            return importlib.import_module(package)
        except ModuleNotFoundError:
            continue
    raise ModuleNotFoundError("Lightning is not installed: pip install 'nmflow[lightning]'")


class SparsityHooks(CarriesRun):
    """Makes `trainer.fit` end with N:M weights.

        from nmflow.integrations.lightning import SparsityCallback

        callback = SparsityCallback({"ff": "1:16"})
        trainer = Trainer(max_steps=10_000, callbacks=[callback])
        trainer.fit(module)                            # ckpt_path=... goes on to the same bits
        print(callback.report.density)

    Names in `targets` are those of the LightningModule. The steps of the recipe are the trainer's optimizer steps
    (`estimated_stepping_batches`). Validation sees the sparse weights; checkpoints hold the dense ones and, among the
    callbacks, the sparsifier's state; the weights are cut when training has ended. `nm_decay` and `nm_density`, where
    the recipe stands, are logged with the module's own figures and, looked at every `probe_every` steps, how noisy
    gradients are (`nm_grad_abs_var` …, see `GradientProbe`; `callback.noise` has those of each layer). Other arguments
    as in `Sparsifier`.

    `fit` raises one `ValueError` that lists every reason why a trainer cannot carry a sparse run, before it trains.
    """

    def __init__(
        self,
        targets: Targets,
        recipe: str | Recipe = "mdgf-exponential",
        remainder: Remainder = "error",
        mask_every: int = 1,
        probe_every: int | None = None,
    ) -> None:
        self._recipe = recipe_by_name(recipe) if isinstance(recipe, str) else recipe
        self._plan = (targets, remainder, mask_every)
        self._probe_every = probe_every
        self._loaded: dict[str, Any] | None = None
        self._resumed = False  # whether what the run resumes from held this callback's state
        self._late = False  # whether that is read after `on_fit_start`, as it is where the weights are spread

    # -- Lightning's hooks, in the order in which they come --------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Forget what an earlier run has loaded: what this one resumes from is read after this."""
        self._loaded, self._resumed, self._late = None, False, False

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Keep what the checkpoint holds until the run is known that it belongs to."""
        self._loaded = dict(state_dict)
        if self._late:
            self._resume()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach: the model is on its device, the optimizer made; the checkpoint's weights are loaded, or come late."""
        problems = _problems(trainer, self._recipe)
        late = trainer.strategy.restore_checkpoint_after_setup
        if trainer.ckpt_path and self._loaded is None and not late:
            problems.append(_no_state(trainer))
        elif not trainer.ckpt_path and self._has_finished(pl_module):
            problems.append(f"{FINISHED}; use a new SparsityCallback if that is meant, or resume from a checkpoint")
        if problems:
            raise ValueError("\n".join(problems))
        if self.sparsifier is not None and self.sparsifier.model is pl_module and attached_weights(pl_module):
            self.sparsifier.detach()  # of a run that was broken off
        self.report = None
        targets, remainder, mask_every = self._plan
        total = int(trainer.estimated_stepping_batches)
        sparsifier = Sparsifier(pl_module, targets, self._recipe, total, remainder, mask_every)
        try:
            self._run = SparseRun(sparsifier, trainer.optimizers[0], self._probe_every)
        except BaseException:
            sparsifier.detach()
            raise
        self._late = late
        if self._loaded is not None:
            self._resume()

    def _resume(self) -> None:
        """Go on where the checkpoint was. If its weights were cut, nothing is left, or `on_train_start` refuses."""
        loaded, self._loaded = cast("dict[str, Any]", self._loaded), None
        run, self._run = cast(SparseRun, self._run), None
        try:
            if not loaded.pop("finalized", False):
                run.load_state_dict(loaded)
                self._run = run
            self._resumed = True
        finally:
            if self._run is None:
                run.sparsifier.detach()

    def _refuse_foreign(self, trainer: Any) -> None:
        """Of a checkpoint that was read late, it is known now whether it held a state."""
        if trainer.ckpt_path and self.sparsifier is not None and not self._resumed:
            self.sparsifier.detach()
            self._run = None
            raise ValueError(_no_state(trainer))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """By now Lightning's own count of steps is restored; comes only if there is anything to train."""
        self._refuse_foreign(trainer)
        if self.sparsifier is None:
            raise ValueError("this checkpoint was written after the weights were cut to N:M; resume from one before")
        step = self.sparsifier.current_step
        if step != trainer.global_step:
            self.sparsifier.detach()
            raise ValueError(f"the state of the sparsifier is of step {step}, the run of step {trainer.global_step}")

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Once an optimizer step, after Lightning has unscaled the gradients and before it clips them."""
        if self._run is not None:
            self._run.edit_gradients(trainer.global_step + 1)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Step after an optimizer step; micro-batches that only accumulate do not count."""
        if self._run is not None and trainer.global_step > self._run.sparsifier.current_step:
            self._run.step(trainer.global_step)
            pl_module.log_dict(self._run.log_line())

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: integers, names and packed masks."""
        if self._run is None:
            return {}
        if self.report is not None:
            return {"finalized": True, "step": self._run.sparsifier.current_step}
        state = self._run.state_dict()
        return {**state, "masks": {label: bits.cpu() for label, bits in state["masks"].items()}}

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Finalize, so that what is saved from now on is N:M."""
        if self.sparsifier is None or self.report is not None:
            return
        self._finalize()

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Lightning passes over the training, its end included, where a resumed run has no step left to do."""
        self._refuse_foreign(trainer)
        self.on_train_end(trainer, pl_module)


def _no_state(trainer: Any) -> str:
    return (
        f"{trainer.ckpt_path}: holds no state of this callback, so it cannot be said where the recipe stood; "
        "resume from a checkpoint of a sparse run, or load the weights only and start anew"
    )


def _problems(trainer: Any, recipe: Recipe) -> list[str]:
    """Why this trainer cannot carry a sparse run, each with the way out."""
    problems = []
    if not trainer.lightning_module.automatic_optimization:
        problems.append(
            "manual optimization: clips and steps where no callback sees it; call nmflow.Sparsifier in training_step"
        )
    if len(trainer.optimizers) != 1:
        problems.append(f"{len(trainer.optimizers)} optimizers: a recipe follows the steps of one")
    strategy = {kind.__name__ for kind in type(trainer.strategy).__mro__} & _SHARDING
    if strategy:
        problems.append(
            f"{strategy.pop()}: keeps the weights where masks cannot follow; use 'ddp', or ModelParallelStrategy with "
            "fully_shard in configure_model"
        )
    callbacks = {kind.__name__ for callback in trainer.callbacks for kind in type(callback).__mro__}
    if callbacks & _AVERAGING:
        problems.append(
            f"{' and '.join(sorted(callbacks & _AVERAGING))}: would put an average of dense weights into the model "
            "when training has ended; leave it out"
        )
    if "GradientAccumulationScheduler" in callbacks:
        problems.append(
            "GradientAccumulationScheduler: the trainer cannot tell the number of optimizer steps in advance, and a "
            "recipe is laid out over them; use accumulate_grad_batches"
        )
    if recipe.needs_gradients:
        problems.append(
            f'recipe "{recipe.name}": scores weights by gradients before training, which a trainer has no moment '
            "for; use nmflow.Sparsifier in a loop of your own, or another recipe"
        )
    if not problems:
        total = trainer.estimated_stepping_batches
        if not math.isfinite(total) or total < 1:
            problems.append(
                f"the trainer expects {total} optimizer steps, and a recipe is laid out over them; "
                "set max_steps, or max_epochs with a loader that knows its length"
            )
    return problems
