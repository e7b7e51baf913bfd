"""Train neural networks to N:M sparsity (N kept of every M) at high ratios, prove it, shrink and run them.

Public names are loaded when first used (PEP 562): `import nmflow` alone does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nmflow.attach import refresh
    from nmflow.flops import count_flops
    from nmflow.masks import is_nm, nm_mask
    from nmflow.pattern import Pattern
    from nmflow.probes import GradientProbe
    from nmflow.runtime import (
        CompressedNM,
        compress,
        compression_report,
        decompress,
        for_inference,
        load_compressed,
        save_compressed,
        tune,
        verify,
    )
    from nmflow.schedules import Stage, recipe, recipes, sequence
    from nmflow.sparsifier import Sparsifier

__version__ = "0.1.0"

_HOMES = {
    "nmflow.attach": ("refresh",),
    "nmflow.flops": ("count_flops",),
    "nmflow.masks": ("is_nm", "nm_mask"),
    "nmflow.pattern": ("Pattern",),
    "nmflow.probes": ("GradientProbe",),
    "nmflow.schedules": ("Stage", "recipe", "recipes", "sequence"),
    "nmflow.runtime": (
        "CompressedNM", "compress", "compression_report", "decompress", "for_inference", "load_compressed",
        "save_compressed", "tune", "verify",
    ),
    "nmflow.sparsifier": ("Sparsifier",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "CompressedNM", "GradientProbe", "Pattern", "Sparsifier", "Stage", "__version__", "compress",
    "compression_report", "count_flops", "decompress", "for_inference", "is_nm", "load_compressed", "nm_mask", "recipe",
    "recipes", "refresh", "save_compressed", "sequence", "tune", "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'nmflow' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
