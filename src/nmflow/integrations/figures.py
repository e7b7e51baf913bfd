"""What a sparse run adds to the log lines of its trainer."""

from __future__ import annotations

from nmflow.slot_plans import stages_at
from nmflow.sparsifier import Sparsifier


def log_figures(sparsifier: Sparsifier) -> dict[str, float]:
    """`nm_decay` and `nm_density` of the step that the sparsifier is at.

        nm_decay = D(j), the largest over the slots,    nm_density = Σ n_s·d_s / Σ n_s

    n_s are the weights of slot s, d_s is N/M of Φ where D(j) is 0 and of Φ_outer where it is not. Both follow from the
    step alone: nothing is counted, and under FSDP2 no process waits for another.
    """
    stages = stages_at(sparsifier.slots, sparsifier.recipe, sparsifier.current_step, sparsifier.total_steps)
    left = [
        slot.weights * (stage.outer if stage.decay else stage.pattern).density
        for slot, stage in zip(sparsifier.slots, stages, strict=True)
    ]
    weights = sum(slot.weights for slot in sparsifier.slots)
    return {"nm_decay": max(stage.decay for stage in stages), "nm_density": sum(left) / weights if weights else 1.0}
