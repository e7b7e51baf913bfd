"""What a person sees of a run while it lasts: one line with a bar, the state of the run, and the time left."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


def bars(console: Console | None) -> Progress:
    """A bar a task: what it is, how far, its `state`, the time left; on no console, none."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=14),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(compact=True),
        console=console or Console(quiet=True),
        disable=console is None,
    )


class Display:
    """Progress bars on a console, or nothing at all without one. A context manager.

    `total_steps` of several runs together adds a bar over all of them.
    """

    def __init__(self, console: Console | None, total_steps: int | None = None) -> None:
        self._progress = bars(console)
        self._current: TaskID | None = None
        self._before = 0  # steps of the runs before this one
        self._all = None
        if total_steps is not None:
            self._all = self._progress.add_task("all runs", total=total_steps, state="")

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def begin(self, label: str, total: int, done: int = 0) -> None:
        """A new run takes the line; `done` of its steps were taken earlier."""
        if self._current is not None:
            task = self._progress.tasks[self._progress.task_ids.index(self._current)]
            self._before += int(task.total or 0)
            if self._all is not None:
                self._progress.remove_task(self._current)
        self._current = self._progress.add_task(label, total=total, completed=done, state="")
        self.advance(done)

    def advance(self, done: int) -> None:
        """`done` steps of this run are taken."""
        if self._current is not None:
            self._progress.update(self._current, completed=done)
        if self._all is not None:
            self._progress.update(self._all, completed=self._before + done)

    def state(self, text: str) -> None:
        """What stands beside the bar."""
        if self._current is not None:
            self._progress.update(self._current, state=text)
