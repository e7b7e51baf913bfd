"""A sparse run inside somebody else's training: what is done at its moments, logged in its lines and kept with it."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import nn, optim

from nmflow.probes import GradientNoise, GradientProbe
from nmflow.slot_plans import stages_at
from nmflow.sparsifier import Sparsifier
from nmflow.sparsity import SparsityReport

FINISHED = "this model has been trained to N:M already, and a second run would start dense again"
_PROBE = "probe"


class SparseRun:
    """A sparsifier and, with `probe_every`, a `GradientProbe`, between the hooks of a trainer."""

    def __init__(self, sparsifier: Sparsifier, optimizer: optim.Optimizer, probe_every: int | None) -> None:
        self.sparsifier = sparsifier
        self.noise: GradientNoise | None = None
        """What the latest look at the gradients saw."""
        self._probe = None if probe_every is None else GradientProbe(sparsifier, optimizer, probe_every)

    def edit_gradients(self, n: int) -> None:
        """Of step `n`: the gradients are unscaled and summed over micro-batches, and not clipped yet."""
        self.sparsifier.edit_gradients()
        if self._probe is not None:
            self._probe.before_step(n)

    def step(self, n: int) -> None:
        """The optimizer has done step `n`."""
        self.sparsifier.step(n=n)
        if self._probe is not None:
            self.noise = self._probe.after_step() or self.noise

    def log_line(self) -> dict[str, float]:
        """`nm_decay` and `nm_density` of the step that the sparsifier is at, and the noise of the latest look.

            nm_decay = D(j), the largest over the slots,    nm_density = Σ n_s·d_s / Σ n_s

        n_s are the weights of slot s, d_s is N/M of Φ where D(j) is 0 and of Φ_outer where it is not. Both follow from
        the step alone: nothing is counted, and under FSDP2 no process waits for another. The noise is that of all slots
        together, `nm_` before the names of `NoiseFigures`; what was not there to see is left out.
        """
        run = self.sparsifier
        stages = stages_at(run.slots, run.recipe, run.current_step, run.total_steps)
        left = [
            slot.weights * (stage.outer if stage.decay else stage.pattern).density
            for slot, stage in zip(run.slots, stages, strict=True)
        ]
        weights = sum(slot.weights for slot in run.slots)
        noise = {} if self.noise is None else asdict(self.noise.pooled)
        return {
            "nm_decay": max(stage.decay for stage in stages),
            "nm_density": sum(left) / weights if weights else 1.0,
            **{f"nm_{name}": value for name, value in noise.items() if value is not None},
        }

    def state_dict(self) -> dict[str, Any]:
        """The sparsifier's state and, where there is one, the probe's beside it. Collective under FSDP2."""
        state = self.sparsifier.state_dict()
        return state if self._probe is None else {**state, _PROBE: self._probe.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken. Raises `ValueError` naming what differs, before any change."""
        own = {key: value for key, value in state.items() if key != _PROBE}
        probed = state.get(_PROBE)
        if self._probe is None:
            if probed is not None:
                raise ValueError(f"the run was probed; give it probe_every={probed['every']} again")
            self.sparsifier.load_state_dict(own)
            return
        if probed is None:
            raise ValueError("the run was not probed; leave out probe_every")
        problems = self._probe.problems(probed)
        if problems:
            raise ValueError("\n".join(f"probe: {problem}" for problem in problems))
        self.sparsifier.load_state_dict(own)
        self._probe.load_state_dict(probed)


class CarriesRun:
    """What every trainer's callback shows of its run, and how it ends it."""

    report: SparsityReport | None = None
    """What `finalize` said, once a run has ended."""
    _run: SparseRun | None = None
    _finished: weakref.ref[nn.Module] | None = None

    @property
    def sparsifier(self) -> Sparsifier | None:
        """The one of the run, from its beginning on."""
        return None if self._run is None else self._run.sparsifier

    @property
    def noise(self) -> GradientNoise | None:
        """What the latest look at the gradients saw; None before the first one, and without `probe_every`."""
        return None if self._run is None else self._run.noise

    def _finalize(self) -> None:
        """Cut the weights, and say so where the recipe had not ended."""
        if self._run is None:
            return
        self.report = self._run.sparsifier.finalize()
        self._finished = weakref.ref(self._run.sparsifier.model)
        if self.report.early:
            warnings.warn(
                f"training stopped at step {self.report.step} of {self.report.total_steps}: the weights were cut to "
                "their pattern before the recipe had ended",
                stacklevel=3,
            )

    def _has_finished(self, model: nn.Module) -> bool:
        """Whether it was this model that the last run of this callback has cut."""
        return self._finished is not None and self._finished() is model
