"""Several processes that share a run, as `torchrun` starts them, without its price.

Python, torch and this package are loaded once, by a server from which every process is forked: seconds of a core less
for each. What a launcher does besides is done here: each process is told who it is, and when one dies the others are
stopped. (The launcher itself is what `test_train` and `test_language` start.)
"""

from __future__ import annotations

import math
import multiprocessing
import os
import runpy
import socket
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory

_LOADED = (
    "pytest", "sklearn.datasets", "accelerate", "torch._dynamo", "torch.distributed.checkpoint",
    "torch.distributed.fsdp", "nmflow.train.config", "nmflow.train.single",
)  # fmt: skip
"""What nearly every script imports; of an extra that is not installed the server says nothing."""
_PATIENCE = 30.0
"""Seconds that processes have to end in, once one of them died."""


def on(processes: int, script: Path, *arguments: str, seconds: float = 300.0) -> tuple[int, str, str]:
    """Run a script on several processes, or on one; exit status (of the first that failed), output, errors.

    Raises `TimeoutError`, with what they said, where it takes longer than `seconds`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*_LOADED])
    port = _free_port()
    with TemporaryDirectory() as folder:
        files = [(Path(folder, f"{rank}.out"), Path(folder, f"{rank}.err")) for rank in range(processes)]
        team = [
            context.Process(target=_process, args=(rank, processes, port, *files[rank], str(script), *arguments))
            for rank in range(processes)
        ]
        for process in team:
            process.start()
        end = time.monotonic() + seconds
        status = _wait(team, end)
        out, err = ("".join(file.read_text() for file in of_one) for of_one in zip(*files, strict=True))
    if time.monotonic() > end:
        raise TimeoutError(f"{script}: not done after {seconds} s; {out} {err}")
    return status, out, err


def _process(rank: int, processes: int, port: int, out: Path, err: Path, script: str, *arguments: str) -> None:
    """What one of them is from its beginning: environment, streams and arguments as a launcher sets them."""
    for stream, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)  # noqa: SIM115  (open until it ends)
    os.environ |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    if processes > 1:
        who = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        os.environ |= {name: str(value) for name, value in who.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    import torch

    torch.set_num_threads(1)
    runpy.run_path(script, run_name="__main__")


def _wait(team: list[BaseProcess], end: float) -> int:
    """Until all have ended; where one of them dies, or the time is over, the others are stopped."""
    status, killed_at = 0, math.inf
    while any(process.is_alive() for process in team):
        status = status or _first_failure(team)
        if killed_at == math.inf and (status or time.monotonic() > end):
            killed_at = time.monotonic() + _PATIENCE
            for process in team:
                process.terminate()
        elif time.monotonic() > killed_at:
            for process in team:
                process.kill()
        time.sleep(0.02)
    return status or _first_failure(team)


def _first_failure(team: list[BaseProcess]) -> int:
    return next((process.exitcode for process in team if process.exitcode), 0)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
