"""Several runs together."""

from __future__ import annotations

from nmflow.experiments.comparison import CompareResult, compare, resume_compare

__all__ = ["CompareResult", "compare", "resume_compare"]
