"""A script for test_train: float16 with a loss scale on a CPU, stopped and resumed. Arguments: a folder.

In a process of its own, since Accelerate keeps one precision a process; and it has a loss scale on GPUs only.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from small_runs import GENTLE, one_run, small

from nmflow.report.folder import RunFolder
from nmflow.train import Interrupted, loop
from nmflow.train.checkpoint import Position
from nmflow.train.data import load_data
from nmflow.train.progress import Display
from nmflow.train.recorder import Recorder


def connect_as_on_a_gpu(precision: str) -> Accelerator:
    """The scale is too large at first, so that steps are skipped."""
    accelerator = Accelerator(mixed_precision=precision)
    accelerator.native_amp = True
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**26, growth_interval=3)
    return accelerator


def main(path: Path) -> None:
    try:
        loop.connect("fp16")
    except ValueError as error:
        print(error)
    loop.connect = connect_as_on_a_gpu
    config = small(recipe={"name": "sr-ste", "sr_ste": 0.05}, optim=GENTLE, precision="fp16", tensorboard=True)
    folder, asked = RunFolder(path / "cut"), iter(range(1, 13))
    folder.path.mkdir()
    run = loop.prepare(config, load_data(config.data))
    try:
        with Recorder(folder, Position(), Display(None), tensorboard=True) as recorder:
            loop.fit(run, Position(), recorder, lambda: next(asked) == 7, "...")
    except Interrupted:
        print(run.accelerator.scaler.get_scale())
    one_run(config, folder.path)
    one_run(config, path / "whole")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
