"""What a network's products cost: FLOPs of a forward and of a whole sparse run, counted from the network itself."""

from __future__ import annotations

from nmflow.flops.count import count_flops
from nmflow.flops.report import FlopsReport, LayerFlops, Stretch

__all__ = ["FlopsReport", "LayerFlops", "Stretch", "count_flops"]
