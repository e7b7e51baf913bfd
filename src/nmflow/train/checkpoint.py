"""What a run needs to go on from any step to the same bits, in safetensors; never a pickle.

One file; of a run that FSDP2 spreads (`shard`) a folder in which every process writes what it holds, and a JSON file
that names it. There is no random state in it: the loop seeds every step from (seed, step, process), see
`loop.seed_step`.
"""

from __future__ import annotations

import difflib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import nmflow
from nmflow.atomic import replacing
from nmflow.probes import GradientProbe
from nmflow.report.folder import RunFolder
from nmflow.sparsifier import Sparsifier
from nmflow.train.average import Average
from nmflow.train.config import TrainConfig, as_stored_now
from nmflow.train.files import write_json
from nmflow.train.shard_files import described, file_sizes, read_shards, remove_others, shard_problems, write_shards

FORMAT = "nmflow-checkpoint"
VERSION = 1

_PARTS = ("model", "average", "optimizer", "mask")
_MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state beside its step count: tensors like the parameter."""


@dataclass(frozen=True)
class State:
    """The parts of a run that change from step to step, as they are without Accelerate's wrappers."""

    config: TrainConfig
    model: nn.Module
    optimizer: torch.optim.AdamW
    sparsifier: Sparsifier
    scaler: Any = None
    """The loss scaler of fp16 (`state_dict`, `load_state_dict`), else None."""
    average: Average | None = None
    """The average of the weights, where the run keeps one."""
    probe: GradientProbe | None = None
    """What looks at gradient noise, where the run is probed."""

    @property
    def judged(self) -> nn.Module:
        """The model that the run is judged by: the average of the weights where it keeps one, else the weights."""
        return self.model if self.average is None else self.average.model


@dataclass(frozen=True)
class Position:
    """Where a run is: what the loop itself has to know."""

    step: int = 0
    """Optimizer steps done."""
    metrics_bytes: int = 0
    """Length of metrics.jsonl at that step."""
    seconds: float = 0.0
    """Time spent in the loop so far."""


def checkpoint_path(folder: RunFolder, config: TrainConfig) -> Path:
    """Where the checkpoint of a run lies."""
    return folder.shards if config.shard else folder.checkpoint


def remove_checkpoint(path: Path) -> None:
    """Delete the checkpoint of a run that is done; of a run with `shard` the folder of the JSON file."""
    if path.suffix == ".json":
        shutil.rmtree(path.parent)
    else:
        path.unlink()


def save_checkpoint(path: Path, state: State, position: Position) -> None:
    """Write the state of a run, whole or not at all: until the new file is in place, the old one stays.

    Tensors: `model/NAME` (tied ones once), `average/NAME` likewise, `optimizer/NAME/MOMENT`, `mask/SLOT` (masks that
    do not follow from the weights); all else is JSON in the metadata. Raises `OSError` where the disk is full or gone.

    Of a run with `shard` every process calls it, and `path` is the JSON file; the tensors lie in `step-N` beside it.
    """
    sparsity = state.sparsifier.state_dict()
    masks = sparsity.pop("masks")
    meta = {
        "format": FORMAT,
        "version": VERSION,
        "written_by": {"nmflow": nmflow.__version__, "torch": str(torch.__version__)},
        "step": position.step,
        "metrics_bytes": position.metrics_bytes,
        "seconds": position.seconds,
        "config": state.config.stored(),
        "sparsifier": sparsity,
        "scaler": state.scaler.state_dict() if state.scaler is not None else None,
        "probe": state.probe.state_dict() if state.probe is not None else None,
    }
    tensors = {
        **_weights(state),
        **_optimizer_tensors(state),
        **{f"mask/{label}": bits for label, bits in masks.items()},
    }
    if state.config.shard:
        _save_shards(path, meta, tensors)
        return
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as partial:
        try:
            save_file(stored, partial, metadata={"nmflow": json.dumps(meta)})
        except SafetensorError as error:
            raise OSError(f"{path}: the checkpoint could not be written: {error}") from error


def _save_shards(path: Path, meta: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """The folder first, then the file that names it: until that is in place, the checkpoint before stands."""
    main = PartialState()
    folder = path.parent / f"step-{meta['step']:08d}"
    if main.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
        folder.mkdir(parents=True)
    main.wait_for_everyone()
    write_shards(folder, tensors)
    if main.is_main_process:
        write_json(path, {**meta, "folder": folder.name, "files": file_sizes(folder)})
        remove_others(path.parent, folder.name)


def load_checkpoint(path: Path, state: State) -> Position:
    """Put a run back where its checkpoint was written; the next step gives the bits it would have given then.

    Everything is checked before anything is changed. Raises `FileNotFoundError`, and one `ValueError` that lists
    every problem: a file that is cut short or no checkpoint, another configuration, another model (with the names
    that are near), another recipe, another pattern.
    """
    meta, tensors = _read_shards(path) if state.config.shard else _read(path)
    problems = [
        f"{key}: the checkpoint has {there!r}, this run {here!r}"
        for key, there, here in _differences(as_stored_now(meta["config"]), state.config.stored())
    ]
    parts = {part: _part(tensors, part) for part in _PARTS}
    mine = _weights(state)
    problems += [f"{name}: no part of a run" for name in tensors if name.partition("/")[0] not in _PARTS]
    problems += _model_problems(parts["model"] | parts["average"], mine)
    problems += _optimizer_problems(parts["optimizer"], state)
    if (meta["scaler"] is None) != (state.scaler is None):
        problems.append("precision: only one of the checkpoint and this run has a loss scaler")
    probed = meta.get("probe")  # checkpoints that are older than probes do not speak of it
    if (probed is None) != (state.probe is None):
        problems.append("probe_every: only one of the checkpoint and this run has a probe of gradient noise")
    elif state.probe is not None and probed is not None:
        problems += [f"probe: {problem}" for problem in state.probe.problems(probed)]
    if problems:
        raise ValueError(f"{path}: this checkpoint belongs to another run:\n  " + "\n  ".join(problems))
    if state.config.shard:
        tensors = _filled(path.parent / meta["folder"], tensors, state)
        parts = {part: _part(tensors, part) for part in _PARTS}
    masks = {name.removeprefix("mask/"): bits for name, bits in parts["mask"].items()}
    try:
        state.sparsifier.load_state_dict({**meta["sparsifier"], "masks": masks})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    with torch.no_grad():
        for name, tensor in mine.items():
            tensor.copy_(tensors[name])
    state.optimizer.load_state_dict(_optimizer_state(parts["optimizer"], state))
    if state.scaler is not None:
        state.scaler.load_state_dict(meta["scaler"])
    if state.probe is not None and probed is not None:
        state.probe.load_state_dict(probed)
    return Position(meta["step"], meta["metrics_bytes"], meta["seconds"])


def _filled(folder: Path, there: Mapping[str, Tensor], state: State) -> dict[str, Tensor]:
    """The tensors of a folder, each spread like the parameter that it belongs to here."""
    parameters = {name: parameter for _, name, parameter in _named_parameters(state)}
    weights = _weights(state)
    filled = {}
    for name, tensor in there.items():
        like = weights.get(name)
        if name.startswith("optimizer/"):
            owner, _, moment = name.removeprefix("optimizer/").rpartition("/")
            like = parameters[owner] if moment in _MOMENTS else None
        filled[name] = torch.zeros_like(tensor, device="cpu") if like is None else torch.zeros_like(like.detach())
    read_shards(folder, filled)
    return filled


# -- the parts ---------------------------------------------------------------------------------------------------


def _weights(state: State) -> dict[str, Tensor]:
    """`model/NAME` and `average/NAME` -> the live tensor."""
    average = {} if state.average is None else _model_tensors(state.average.model, "average")
    return {**_model_tensors(state.model, "model"), **average}


def _model_tensors(model: nn.Module, part: str) -> dict[str, Tensor]:
    """`PART/NAME` -> the live tensor, tied ones under their first name."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name}: the model's state holds a {type(tensor).__name__}, a checkpoint tensors only")
        found.setdefault(id(tensor), (f"{part}/{name}", tensor))
    return dict(found.values())


def _named_parameters(state: State) -> Iterator[tuple[int, str, nn.Parameter]]:
    """(place in the optimizer, name, parameter), in the optimizer's order."""
    names = {id(parameter): name for name, parameter in state.model.named_parameters()}
    parameters = [parameter for group in state.optimizer.param_groups for parameter in group["params"]]
    for place, parameter in enumerate(parameters):
        yield place, names[id(parameter)], parameter


def _optimizer_tensors(state: State) -> dict[str, Tensor]:
    """`optimizer/NAME/MOMENT` -> tensor; a parameter that never had a gradient has none."""
    return {
        f"optimizer/{name}/{moment}": torch.as_tensor(tensor)
        for _, name, parameter in _named_parameters(state)
        for moment, tensor in state.optimizer.state.get(parameter, {}).items()
    }


def _optimizer_state(tensors: Mapping[str, Tensor], state: State) -> dict[str, Any]:
    """The state dict that torch's optimizer loads, from tensors by name."""
    places = {name: place for place, name, _ in _named_parameters(state)}
    moments: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, moment = key.removeprefix("optimizer/").rpartition("/")
        moments.setdefault(places[name], {})[moment] = tensor
    return {"state": moments, "param_groups": state.optimizer.state_dict()["param_groups"]}


# -- reading and checking ----------------------------------------------------------------------------------------


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors. safetensors checks names, sizes and the length of the file before it reads any of them."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no checkpoint here")
    try:
        with safe_open(path, framework="pt") as file:
            written = (file.metadata() or {}).get("nmflow")
            meta = _meta(path, written)
            return meta, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
    except SafetensorError as error:
        raise ValueError(f"{path}: no checkpoint, or one that was cut short: {error}") from error


_META: dict[str, type | tuple[type, ...]] = {
    "step": int,
    "metrics_bytes": int,
    "seconds": (int, float),
    "config": dict,
    "sparsifier": dict,
    "scaler": (dict, type(None)),
}


def _read_shards(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata, and tensors that have shape and dtype but are not read yet."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no checkpoint here")
    meta = _meta(path, path.read_text(encoding="utf-8"))
    name, sizes = meta.get("folder"), meta.get("files")
    if not isinstance(name, str) or Path(name).name != name or not isinstance(sizes, dict):
        raise ValueError(f"{path}: it does not say where its tensors lie")
    problems = shard_problems(path.parent / name, sizes)
    if problems:
        raise ValueError("\n".join(problems))
    try:
        return meta, described(path.parent / name)
    except SafetensorError as error:
        raise ValueError(f"{path.parent / name}: no checkpoint, or one that was cut short: {error}") from error


def _meta(path: Path, written: str | None) -> dict[str, Any]:
    try:
        meta = json.loads(written or "null")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its metadata are no JSON: {error}") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        found = f" ({meta.get('format')})" if isinstance(meta, dict) else ""
        raise ValueError(f"{path}: a file{found}, but not the checkpoint of a run")
    if meta.get("version") != VERSION:
        raise ValueError(f"{path}: checkpoint version {meta.get('version')!r}; this nmflow reads version {VERSION}")
    broken = [key for key, kind in _META.items() if key not in meta or not isinstance(meta[key], kind)]
    if broken:
        raise ValueError(f"{path}: its metadata lack a sound {', '.join(broken)}")
    return meta


def _part(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(f"{part}/")}


def _differences(there: Any, here: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, value there, value here) wherever two configurations differ."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in dict.fromkeys((*here, *there)):
            yield from _differences(there.get(key), here.get(key), f"{prefix}{key}.")
    elif there != here:
        yield prefix.removesuffix("."), there, here


def _model_problems(there: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> Iterator[str]:
    for name in (name for name in here if name not in there):
        near = difflib.get_close_matches(name, [other for other in there if other not in here], n=1)
        hint = f"; it has {_plain(near[0])}" if near else ""
        yield f"{_plain(name)}: the checkpoint lacks this tensor{hint}"
    for name in (name for name in there if name not in here):
        near = difflib.get_close_matches(name, [other for other in here if other not in there], n=1)
        hint = f"; it has {_plain(near[0])}" if near else ""
        yield f"{_plain(name)}: this model lacks this tensor{hint}"
    for name, tensor in here.items():
        if name in there and not _alike(there[name], tensor):
            yield f"{_plain(name)}: {_form(there[name])} in the checkpoint, {_form(tensor)} in this model"


def _optimizer_problems(there: Mapping[str, Tensor], state: State) -> Iterator[str]:
    parameters = {name: parameter for _, name, parameter in _named_parameters(state)}
    for key, tensor in there.items():
        name, _, moment = key.removeprefix("optimizer/").rpartition("/")
        parameter = parameters.get(name)
        if parameter is None:
            yield f"optimizer state of {name}: no trained parameter of this model"
        elif moment == "step":
            if tensor.numel() != 1:
                yield f"{key}: {_form(tensor)}, expected one number"
        elif moment not in _MOMENTS:
            yield f"{key}: AdamW keeps no {moment}"
        elif not _alike(tensor, parameter):
            yield f"{key}: {_form(tensor)} in the checkpoint, {_form(parameter)} in this model"


def _alike(one: Tensor, two: Tensor) -> bool:
    return one.shape == two.shape and one.dtype == two.dtype


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _plain(name: str) -> str:
    return name.removeprefix("model/")
