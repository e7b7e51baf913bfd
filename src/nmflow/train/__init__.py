"""Training runs: read a configuration, train, go on with a run that was stopped.

Names are loaded when first used (PEP 562), so that a wrong setting is answered without importing torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nmflow.train.config import CompareConfig, TrainConfig, load_compare_config, load_config
    from nmflow.train.run import RunResult, resume, train
    from nmflow.train.stop import Interrupted

_HOMES = {
    "nmflow.train.config": ("CompareConfig", "TrainConfig", "load_compare_config", "load_config"),
    "nmflow.train.run": ("RunResult", "resume", "train"),
    "nmflow.train.stop": ("Interrupted",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "CompareConfig", "Interrupted", "RunResult", "TrainConfig", "load_compare_config", "load_config", "resume",
    "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'nmflow.train' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
