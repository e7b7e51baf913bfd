"""One process of a run that several share: `spread_train.py CONFIG.yaml [STEP]`, which dies before that step ends."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from small_runs import one_run

from nmflow.train.config import load_config
from nmflow.train.data import Split, load_data


@dataclass(frozen=True)
class KillsAt:
    """A split that kills the process when it is asked for its `call`-th batch."""

    split: Split
    call: int
    calls: list[int]

    def __len__(self) -> int:
        return len(self.split)

    def batch(self, indices: Any, generator: Any = None) -> Any:
        self.calls.append(0)
        if len(self.calls) == self.call:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.split.batch(indices, generator)


if __name__ == "__main__":
    config = load_config(Path(sys.argv[1]))
    data = load_data(config.data, config.tokenizer())
    if len(sys.argv) > 2:
        data = replace(data, train=KillsAt(data.train, int(sys.argv[2]), []))
    assert config.out is not None
    one_run(config, Path(config.out), data)
