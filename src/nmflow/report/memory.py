"""What `nmflow memory` answers: the bytes of one process, part by part, dense and sparse."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from nmflow.memory import Memory
from nmflow.report.columns import columns

_PARTS = {
    "weights": "W, float32",
    "gradients": "of W, and DDP's buckets",
    "optimizer": "AdamW's two moments",
    "effective": "W~ of the sparse weights",
    "masks": "a byte a sparse weight",
    "gathered": "layers that FSDP2 has gathered",
    "activations": "what autograd keeps",
}


@dataclass(frozen=True)
class MemoryAnswer:
    """The memory of one process of a run."""

    model: str
    run: str
    """How it is spread, and on what example, in words."""
    memory: Memory

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {"model": self.model, "run": self.run, **self.memory.to_dict()}

    def lines(self) -> list[str]:
        """A table and the sum."""
        parts = asdict(self.memory)
        rows = [("a process keeps", "", "")]
        rows += [(name, gigabytes(parts[name]), what) for name, what in _PARTS.items() if parts[name]]
        rows.append(("together", gigabytes(self.memory.total), f"{100 * self.memory.overhead:.1f} % over dense"))
        return [f"{self.model}: {self.run}", *columns(rows, right={1})]


def gigabytes(size: int) -> str:
    """Bytes for people.

    >>> gigabytes(1_234_567_890), gigabytes(12_000_000)
    ('1.23 GB', '0.01 GB')
    """
    return f"{size / 1e9:.2f} GB"
