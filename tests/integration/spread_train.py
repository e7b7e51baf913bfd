"""One process of several that share a run: `spread_train.py CONFIG.yaml [STEP]`, killed before that step ends."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from small_runs import failing, one_run

from nmflow.train.config import load_config
from nmflow.train.data import load_data


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    config = load_config(Path(sys.argv[1]))
    data = load_data(config.data, config.tokenizer())
    if len(sys.argv) > 2:
        data = failing(data, int(sys.argv[2]), kill)
    assert config.out is not None
    one_run(config, Path(config.out), data)
