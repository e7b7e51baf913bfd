"""`nmflow train`: a dense run and a sparse one of the same budget in one folder, and what is said at the end."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from rich.console import Console

from nmflow.atomic import replacing
from nmflow.report.folder import RunFolder, read_json
from nmflow.report.page import write_page
from nmflow.report.plots import plot_training
from nmflow.report.tables import result_lines
from nmflow.train.config import RunConfig, TrainConfig, load_config
from nmflow.train.data import Data, load_data
from nmflow.train.files import check_new, write_text
from nmflow.train.loop import connect, prepare
from nmflow.train.progress import Display
from nmflow.train.recorder import check_tensorboard
from nmflow.train.single import run_single
from nmflow.train.stop import resumable


@dataclass(frozen=True)
class RunResult:
    """A run that is done: its folder, in which every figure stands."""

    folder: RunFolder

    def lines(self) -> list[str]:
        """For people: accuracies, proof, bytes, and where everything lies."""
        return result_lines(self.folder)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON: result.json and the folder."""
        return {"folder": str(self.folder.path), **read_json(self.folder.result)}


def train(config: TrainConfig, console: Console | None = None) -> RunResult:
    """Train a network to N:M, next to a dense run of the same budget, prove it, and write it all down.

    Order: the dense run, the sparse run, its proof from the file, the compressed file, the plot, the page. All of it
    can be stopped and resumed at any moment. `console` gets a progress bar.

    Raises `ValueError`, `FileNotFoundError` or `FileExistsError` before anything is written where the settings, the
    data, the network and this machine do not fit together or the folder is taken; `Interrupted` where the run was
    stopped.
    """
    main = connect(config.precision).is_main_process
    folder = RunFolder(Path(config.out) if config.out else agree_on(_folder_name(config)))
    check_new(folder.path, "train")
    data = load_data(config.data, config.tokenizer())
    check_runnable(config, data)
    create(folder.path, folder.config, config)
    return _go_on(config, folder, data, console if main else None)


def resume(path: str | Path, console: Console | None = None) -> RunResult:
    """Go on with a run that was stopped or killed, to the bits it would have given; one that is done is only read.

    Raises `FileNotFoundError` where `path` holds no run, else as `train` does.
    """
    folder = RunFolder(Path(path))
    if not folder.config.is_file():
        raise FileNotFoundError(f"{folder.path}: no run to resume here, for there is no {folder.config.name}")
    if (folder.path / "runs").is_dir():
        raise ValueError(f"{folder.path}: this is a comparison; go on with: nmflow compare resume={folder.path}")
    config = load_config(folder.config)
    main = connect(config.precision).is_main_process
    return _go_on(config, folder, load_data(config.data, config.tokenizer()), console if main else None)


def _go_on(config: TrainConfig, folder: RunFolder, data: Data, console: Console | None) -> RunResult:
    again = f"nmflow train resume={shlex.quote(str(folder.path))}"
    dense = None
    is_dense = config.build_recipe().name == "dense"
    with resumable(again), Display(console) as display:
        if config.baseline and not is_dense:
            baseline = config.model_copy(update={"recipe": "dense", "baseline": False})
            dense = run_single(baseline, folder.dense, data, display, again, "dense")
        run_single(config, folder, data, display, again, "dense" if is_dense else "sparse", baseline=dense)
        if PartialState().is_main_process and not folder.page.exists():
            with replacing(folder.plot) as partial:
                plot_training(folder.path, partial)
            with replacing(folder.page) as partial:
                write_page(folder.path, partial, reproduce_command(config))
        PartialState().wait_for_everyone()
    return RunResult(folder)


# -- what a comparison needs as well -----------------------------------------------------------------------------


def check_runnable(config: TrainConfig, data: Data) -> None:
    """Raise what `prepare` raises, before anything is written."""
    if config.tensorboard:
        check_tensorboard()
    prepare(config, data)


def create(folder: Path, config_file: Path, config: RunConfig) -> None:
    """Make a run's folder and write its configuration, once for all processes."""
    state = PartialState()
    state.wait_for_everyone()  # all have seen that the folder is new
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(config_file, config.to_yaml())
    state.wait_for_everyone()


def agree_on(path: Path) -> Path:
    """One path for all processes of a run: the main one's."""
    paths = [str(path)]
    broadcast_object_list(paths)
    return Path(paths[0])


def slug(text: str) -> str:
    """A part of a folder's name.

    >>> slug("1:16"), slug("ff=1:8 + qk=1:4")
    ('1-16', 'ff-1-8-qk-1-4')
    """
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-")


def targets_text(config: RunConfig, pattern: str | None) -> str:
    """What is made sparse, in a few words: the pattern, or the rules of `targets`."""
    targets: dict[str, str | None] = getattr(config, "targets", None) or {}
    return pattern or " + ".join(f"{key}={value or 'dense'}" for key, value in targets.items())


def stamp() -> str:
    """The time, for a folder's name."""
    return datetime.now().strftime("%Y%m%d-%H%M%S")


def _folder_name(config: TrainConfig) -> Path:
    """`runs/<data>-<recipe>-<pattern>-s<seed>-<time>`."""
    parts = (config.data.name, config.build_recipe().name, slug(targets_text(config, config.pattern)))
    return Path("runs") / "-".join([*parts, f"s{config.seed}", stamp()])


# -- the command that trains the same again ----------------------------------------------------------------------


def reproduce_command(config: TrainConfig) -> str:
    """The shortest `nmflow train` that says the same, but for the folder.

    >>> reproduce_command(TrainConfig(recipe="ste", optim={"lr": 3e-4}, data="text:a book.txt"))
    "nmflow train data.name=text 'data.path=a book.txt' optim.lr=0.0003 recipe=ste"
    """
    default = TrainConfig().model_dump(mode="json")
    given = config.stored()
    if config.targets is not None:
        del given["pattern"]  # a null beside targets goes without saying
    return " ".join(["nmflow train", *(shlex.quote(setting) for setting in _settings(given, default))])


def _settings(given: dict[str, Any], default: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in given.items():
        usual = default[key]
        if value == usual:
            continue
        if isinstance(value, dict) and isinstance(usual, dict):
            yield from _settings(value, usual, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}={value if _is_plain(value) else json.dumps(value)}"


def _is_plain(value: Any) -> bool:
    """True for text that YAML takes for nothing but text."""
    is_word = isinstance(value, str) and re.fullmatch(r"[A-Za-z][\w ./:-]*|\d+:\d+", value) is not None
    return is_word and value.lower() not in ("null", "true", "false")
