"""Where the figures and the state of a run go: metrics.jsonl, TensorBoard, the progress bar, the checkpoint."""

from __future__ import annotations

import time
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from nmflow.report.folder import RunFolder
from nmflow.report.measures import MEASURES
from nmflow.train.checkpoint import Position, State, checkpoint_path, save_checkpoint
from nmflow.train.files import MetricsLog
from nmflow.train.progress import Display


class Recorder:
    """The memory of one run. A context manager: opened at `start`, it cuts the log back to there.

    Only one process of a run may own a recorder that writes; the others take `writes=False`.
    """

    def __init__(
        self, folder: RunFolder, start: Position, display: Display, tensorboard: bool = False, writes: bool = True
    ) -> None:
        self._folder = folder
        self._display = display
        self._seconds = start.seconds - time.monotonic()
        self._log = MetricsLog(folder.metrics, start.metrics_bytes) if writes else None
        self._board = _board(folder.path / "tensorboard", start.step) if writes and tensorboard else None
        self._shown: dict[str, Any] = {}

    @property
    def seconds(self) -> float:
        """Time spent in the loop, earlier parts of the run included."""
        return self._seconds + time.monotonic()

    def write(self, line: dict[str, Any]) -> None:
        """One line of metrics.jsonl, and the same figures wherever else they are looked at."""
        if self._log is not None:
            self._log.write(line)
        if self._board is not None:
            for name, value in line.items():
                if isinstance(value, int | float) and name != "step":
                    self._board.add_scalar(name, value, line["step"])
        self._shown.update(line)
        self._display.state(_state_text(self._shown))

    def save(self, state: State, step: int) -> None:
        """Write the checkpoint of this step; of a spread run, every process its part."""
        length = 0 if self._log is None else self._log.sync()
        if self._log is not None or state.config.shard:
            save_checkpoint(checkpoint_path(self._folder, state.config), state, Position(step, length, self.seconds))

    def advance(self, step: int) -> None:
        """`step` steps are done."""
        self._display.advance(step)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._log is not None:
            self._log.close()
        if self._board is not None:
            self._board.close()


def check_tensorboard() -> None:
    """Raise `ValueError` with the line that installs TensorBoard where it is missing."""
    if find_spec("tensorboard") is None:
        raise ValueError("tensorboard=true needs TensorBoard: pip install 'nmflow[tensorboard]'")


def _board(folder: Path, step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(log_dir=str(folder), purge_step=step + 1)


def _state_text(line: dict[str, Any]) -> str:
    """`loss 0.312  val 94.4 %  decay  D 0.12  1:16`."""
    parts = [f"loss {line['loss']:.3f}"] if "loss" in line else []
    judged = next((key for key in line if key.removeprefix("val_") in MEASURES), None)
    if judged is not None:
        parts.append(f"val {MEASURES[judged.removeprefix('val_')].text(line[judged])}")
    if "phase" in line:
        parts += [line["phase"], f"D {line['decay']:.2g}", line["pattern"]]
    return "  ".join(parts)
