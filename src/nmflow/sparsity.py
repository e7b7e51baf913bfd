"""What a sparse run says of itself: its reports."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class SlotReport:
    """State of one slot; `density` is measured on what the forward sees, `flips` entries of Φ changed last step."""

    label: str
    pattern: str
    target: str
    density: float
    decay: float
    phase: str
    flips: int
    weights: int


@dataclass(frozen=True)
class SparsityReport:
    """What `Sparsifier.report` and `Sparsifier.finalize` return."""

    step: int
    total_steps: int
    slots: tuple[SlotReport, ...]
    finalized: bool = False

    @property
    def early(self) -> bool:
        """True if the weights were finalized before the recipe had ended: the mask was cut to the target at once."""
        return self.finalized and self.step < self.total_steps

    @property
    def density(self) -> float:
        """Density over the weights of all slots."""
        weights = sum(slot.weights for slot in self.slots)
        return sum(slot.density * slot.weights for slot in self.slots) / weights if weights else 1.0

    @property
    def flips(self) -> int:
        """Mask entries that changed in the last step."""
        return sum(slot.flips for slot in self.slots)

    def lines(self) -> list[str]:
        """For people: one line a slot, then the whole."""
        width = max((len(slot.label) for slot in self.slots), default=0)
        lines = [
            f"{slot.label:{width}}  {slot.pattern:>7} of {slot.target:7}  {slot.phase:9}  density {slot.density:.4f}"
            for slot in self.slots
        ]
        state = "finalized" if self.finalized else f"step {self.step:,} of {self.total_steps:,}"
        return [*lines, f"{state}: density {self.density:.4f} over {len(self.slots)} slots, {self.flips:,} flips"]

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**asdict(self), "early": self.early, "density": self.density}
