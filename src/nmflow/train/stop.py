"""What Ctrl-C and SIGTERM mean to a run: finish the step, save, say how to go on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """A run was stopped from outside, and nothing is lost; the message says how to go on.

    A `KeyboardInterrupt`, so that no `except Exception` takes it for an error of the run.
    """


def how_to_resume(command: str, where: str) -> Interrupted:
    """The exception that says where a run was stopped and which command goes on."""
    return Interrupted(f"stopped {where}; go on with: {command}")


@contextmanager
def resumable(command: str) -> Iterator[None]:
    """Tell whoever interrupts outside of the loop how to go on, too."""
    try:
        yield
    except Interrupted:
        raise
    except KeyboardInterrupt as stop:
        raise how_to_resume(command, "between two steps") from stop


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Turn SIGINT and SIGTERM into a question: has anybody asked to stop? A second SIGINT interrupts at once.

    Outside the main thread, where Python delivers no signals, the answer is always no.
    """
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
