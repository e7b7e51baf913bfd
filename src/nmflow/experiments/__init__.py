"""Several runs together."""

from __future__ import annotations

from nmflow.experiments.collection import Collection, collect
from nmflow.experiments.comparison import CompareResult, compare, resume_compare

__all__ = ["Collection", "CompareResult", "collect", "compare", "resume_compare"]
