"""Many runs over a few processes: begun in order, stopped without loss, gone on with where they are not done."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import IO, Any, Protocol

from rich.console import Console

from nmflow.experiments.failures import Failure
from nmflow.experiments.studies import Run
from nmflow.report.folder import read_metrics
from nmflow.train.progress import bars
from nmflow.train.stop import stop_requests

if sys.platform != "win32":  # where nobody is kept off
    import fcntl

_LOOK = 0.5
"""Seconds between two looks at the processes."""
_LOCK = "lock"
_PATIENCE = 30.0
"""Seconds that a worker waits for the one before it to save and end."""


class Plan(Protocol):
    """What a sweep works on."""

    def open_runs(self) -> Sequence[Run]:
        """Runs that are not done and wait for no other, in the order in which they are begun."""

    def count(self) -> tuple[int, int]:
        """(done, all) runs."""


@dataclass
class SweepResult:
    """What became of the runs of a sweep."""

    done: int = 0
    failed: list[Failure] = field(default_factory=list)
    stopped: bool = False
    """True where somebody, or the clock, asked to stop; all that was begun goes on from its checkpoint."""


def sweep(
    plan: Plan,
    workers: int = 1,
    minutes: float | None = None,
    console: Console | None = None,
    threads: int | None = None,
) -> SweepResult:
    """Do runs, `workers` at a time, until the plan has no further one, or `minutes` are over.

    The plan is asked whenever a process is free, so that what one run decides can open others. A run that fails is
    left out and said in the result, the others go on; so is one whose process was killed. Stopped by SIGINT, SIGTERM
    or the clock, every process finishes its step, saves, and ends. A process has `threads` threads, by default
    OMP_NUM_THREADS or its share of the cores.
    """
    if workers < 1:
        raise ValueError(f"workers={workers}: expected 1 or more processes")
    result = SweepResult()
    end = None if minutes is None else time.monotonic() + 60 * minutes
    begun: set[Path] = set()
    counted = (0, 0)
    threads = threads or int(os.environ.get("OMP_NUM_THREADS", 0)) or max(1, (os.cpu_count() or 1) // workers)
    team = [_Worker(threads) for _ in range(workers)]
    with stop_requests() as asked_to_stop, bars(console) as progress:
        bar = progress.add_task("runs", state="")
        try:
            while True:
                if not result.stopped and (asked_to_stop() or (end is not None and time.monotonic() > end)):
                    result.stopped = True
                    for worker in team:
                        worker.stop()
                for worker in team:
                    worker.collect(result)
                free = [worker for worker in team if worker.run is None]
                if free:  # only a run that has ended changes the plan, which reads many files
                    waiting = [run for run in plan.open_runs() if run.folder.path not in begun]
                    for worker, run in zip(free, waiting if not result.stopped else (), strict=False):
                        begun.add(run.folder.path)
                        worker.begin(run)
                    counted = plan.count()
                busy = [worker.run for worker in team if worker.run is not None]
                parts = [_part_done(run) for run in busy]
                doing = "  ".join(f"{run.label} {part:.0%}" for run, part in zip(busy, parts, strict=True))
                progress.update(bar, completed=counted[0] + sum(parts), total=counted[1], state=doing)
                if not busy:
                    return result
                time.sleep(_LOOK)
        finally:
            for worker in team:
                worker.close()


class _Worker:
    """A process that does one run after the other, so that libraries and data are loaded once."""

    def __init__(self, threads: int) -> None:
        self.run: Run | None = None
        self._threads = threads
        self._process: SpawnProcess | None = None
        self._pipe: Connection | None = None
        self._precision = ""

    def begin(self, run: Run) -> None:
        """Do a run; Accelerate has one precision a process, so that another one takes another process."""
        if self._precision != run.config.precision:
            self.close()
        if self._process is None or self._pipe is None or not self._process.is_alive():
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_work, args=(theirs, self._threads), daemon=False)
            self._process.start()
            theirs.close()
            self._precision = run.config.precision
        self.run = run
        self._pipe.send(run)

    def collect(self, result: SweepResult) -> None:
        """Take the answer where there is one."""
        if self.run is None or self._pipe is None or self._process is None:
            return
        alive = self._process.is_alive()  # asked before the pipe, so that a last answer is not lost
        answer: str | None = None
        if self._pipe.poll():
            try:
                answer = self._pipe.recv()
            except (EOFError, OSError):  # it ended before it could answer
                alive = False
        if answer is None:
            if alive:
                return
            self._process.join()
            code = self._process.exitcode or 0
            how = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit status {code}"
            answer = f"its process ended by {how}"
        if answer == "done":
            result.done += 1
        elif result.stopped:  # as asked, in the middle of its steps or before the first
            pass
        else:
            result.failed.append(Failure(self.run.label, answer))
        self.run = None

    def stop(self) -> None:
        """Ask the run to save and end."""
        if self.run is not None and self._process is not None and self._process.is_alive():
            self._process.terminate()

    def close(self) -> None:
        """Let the process go, once its run has saved."""
        if self._process is None or self._pipe is None:
            return
        self.stop()
        if self._process.is_alive():
            with suppress(OSError):
                self._pipe.send(None)
        self._process.join()
        self._pipe.close()
        self._process = self._pipe = None


def _work(pipe: Connection, threads: int) -> None:
    """The life of a worker: runs from the pipe, a word on each back."""
    import torch

    from nmflow.train.data import Data, load_data
    from nmflow.train.loop import DivergedError
    from nmflow.train.progress import Display
    from nmflow.train.single import run_single
    from nmflow.train.stop import Interrupted

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the first one decides
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    loaded: tuple[Any, Data] | None = None
    while True:
        try:
            run: Run | None = pipe.recv()
        except EOFError:  # the first process is gone
            return
        if run is None:
            return
        wanted = (run.config.data, run.config.tokenizer())
        try:
            if loaded is None or loaded[0] != wanted:
                loaded = (wanted, load_data(*wanted))
            with _alone_at(run.folder.path):
                again = "the same command"
                run_single(run.config, run.folder, loaded[1], Display(None), again, run.label, keep_checkpoint=False)
            pipe.send("done")
        except Interrupted:
            pipe.send("stopped")
        except DivergedError as error:
            run.give_up(str(error))
            pipe.send(f"DivergedError: {error}")
        except Exception as error:  # whatever a run dies of, the others go on, and the result says it
            pipe.send(f"{type(error).__name__}: {error}")


@contextmanager
def _alone_at(folder: Path) -> Iterator[None]:
    """Keep other sweeps off a run; a process that dies lets go. Raises `RuntimeError` where one is still at it.

    A worker whose first process was killed saves before it ends, which is waited for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("w") as file:
        end = time.monotonic() + _PATIENCE
        while not _locked(file):
            if time.monotonic() > end:
                raise RuntimeError(f"{folder}: another process is at work on it")
            time.sleep(_LOOK)
        yield


def _locked(file: IO[str]) -> bool:
    if sys.platform == "win32":
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _stop_with_parent() -> None:
    """Save and end where the first process was killed: whoever begins again must find nobody at work."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def _part_done(run: Run) -> float:
    """The part of its steps that a run has logged."""
    lines = read_metrics(run.folder.metrics)
    return float(lines[-1]["step"]) / run.config.steps if lines else 0.0
