"""One run from its first step to its proof: train, finalize, save, verify from the file, compress, measure again."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from torch import nn

from nmflow.atomic import replacing
from nmflow.models import build_model
from nmflow.report.folder import RunFolder, read_json
from nmflow.runtime import compress_file, load_compressed, save_model, verify
from nmflow.shards import full, is_spread
from nmflow.sparsity import SparsityReport
from nmflow.targets import record, recorded, slots_to_json
from nmflow.train.bleu import translate_test
from nmflow.train.checkpoint import Position, checkpoint_path, load_checkpoint, remove_checkpoint
from nmflow.train.config import TrainConfig
from nmflow.train.data import Data
from nmflow.train.environment import environment
from nmflow.train.files import remove_leftovers, write_json, write_text
from nmflow.train.flops import flops_of
from nmflow.train.loop import Score, Training, calibrate, evaluate, fit, prepare
from nmflow.train.progress import Display
from nmflow.train.recorder import Recorder
from nmflow.train.stop import stop_requests

RESULT_FORMAT = 1
AGREEMENT = 0.005
"""How far the measures of one model through dense and compressed kernels may lie apart: sums in another order."""


def run_single(
    config: TrainConfig,
    folder: RunFolder,
    data: Data,
    display: Display,
    resume: str,
    label: str,
    baseline: dict[str, Any] | None = None,
    keep_checkpoint: bool = True,
) -> dict[str, Any]:
    """Do one run in `folder`, from wherever an earlier process left it; returns what stands in its result.json.

    A run that is done is only read. `resume` is the command that a person stopping it is told; `baseline`, the
    result of a dense run beside it, is kept in the result. The checkpoint of the last step, dense weights and moments,
    stays unless `keep_checkpoint` is false: among many runs it is most of what they take on disk. Raises as `prepare`,
    `load_checkpoint` and `fit` do.
    """
    if folder.result.exists():
        return read_json(folder.result)
    run = prepare(config, data)
    main = run.accelerator.is_main_process
    if main:
        folder.path.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder.path)
        if not folder.config.exists():
            write_text(folder.config, config.to_yaml())
        if not folder.environment.exists():
            write_json(folder.environment, environment(run.accelerator))
        _keep_files(folder, data)
    run.accelerator.wait_for_everyone()
    start = Position()
    checkpoint = checkpoint_path(folder, config)
    if checkpoint.exists():
        start = load_checkpoint(checkpoint, run.state)
    else:
        calibrate(run)
    display.begin(label, config.steps, start.step)
    recorder = Recorder(folder, start, display, config.tensorboard, writes=main)
    with recorder, stop_requests() as asked_to_stop:
        fit(run, start, recorder, asked_to_stop, resume)
    seconds = round(recorder.seconds, 2)
    if main or config.shard:
        final = _finalized(run)
    if main:
        figures = {**_described(run, final[0]), "seconds": seconds, **_prove(run, folder, *final)}
        write_json(folder.result, {**figures, "dense": baseline})
        if not keep_checkpoint:
            remove_checkpoint(checkpoint)
    run.accelerator.wait_for_everyone()
    return read_json(folder.result)


def _keep_files(folder: RunFolder, data: Data) -> None:
    """What belongs to the data (a vocabulary) lies beside the model. Raises `ValueError` where another lies there."""
    for name, content in data.files.items():
        path = folder.path / name
        if not path.exists():
            with replacing(path) as partial:
                partial.write_bytes(content)
        elif path.read_bytes() != content:
            raise ValueError(
                f"{path}: the data give another one now; they, or the library that makes it, have changed since the "
                "run began"
            )


def _described(run: Training, model: nn.Module) -> dict[str, Any]:
    """What was run."""
    config, sparsifier = run.config, run.state.sparsifier
    return {
        "format": RESULT_FORMAT,
        "config": config.stored(),
        "data": run.data.describe(),
        "measure": run.data.objective.measures[0],
        "model": config.model.name,
        "parameters": sum(parameter.numel() for parameter in run.state.model.parameters()),
        "flops": flops_of(run, model),
        "recipe": sparsifier.recipe.to_dict(),
        "pattern": " + ".join(dict.fromkeys(str(slot.pattern) for slot in sparsifier.slots)),
        "skipped": sparsifier.coverage.skipped,
        "steps": config.steps,
        "seed": config.seed,
    }


def _finalized(run: Training) -> tuple[nn.Module, SparsityReport, dict[str, Any] | None]:
    """The network with N:M weights, whole: of a spread one every process does its part and gets a copy.

    Where the run keeps an average of its weights, that is the network; then there are the scores of the last step's
    weights as well, finalized too.
    """
    sparsifier, average = run.state.sparsifier, run.state.average
    model = run.accelerator.unwrap_model(run.model, keep_fp32_wrapper=False)
    device = run.accelerator.device
    if average is not None:
        sparsifier.finalize()
        raw = {split: evaluate(model, run.data, split, device).to_dict() for split in ("val", "test")}
        return average.model, sparsifier.finalize(average.model), raw
    report = sparsifier.finalize()
    if not any(is_spread(parameter) for parameter in model.parameters()):
        return model, report, None
    weights = {name: full(tensor).cpu() for name, tensor in model.state_dict().items()}
    slots = recorded(model)
    model = build_model(run.config.model, run.data)
    model.load_state_dict(weights)
    if slots is not None:
        record(model, slots)
    return model.to(device), report, None


def _prove(
    run: Training, folder: RunFolder, model: nn.Module, report: SparsityReport, raw: dict[str, Any] | None
) -> dict[str, Any]:
    """Write the finalized weights, and measure what is in the files. The dense recipe has nothing to prove."""
    device = run.accelerator.device
    test = _tested(model, run)
    said = translate_test(model, run.data, run.config.bleu)
    said.write(folder.translations)
    save_model(model, folder.model)
    figures: dict[str, Any] = {
        "val": evaluate(model, run.data, "val", device).to_dict(),
        "test": {**test.to_dict(), **said.figures()},
        **said.described(),
        "weights": "last" if raw is None else "average",
        "raw": raw,
    }
    slots = recorded(model)
    if not slots:
        return {**figures, "sparsity": None, "verify": None, "compressed": None}
    write_json(folder.targets, slots_to_json(slots))
    proof = verify(folder.model)
    if not proof.ok:
        raise RuntimeError("\n".join([f"{folder.model}: this is a defect of nmflow", *proof.lines()]))
    files = compress_file(folder.model, folder.compressed)
    packed = _from_file(run, folder)
    again = _tested(packed, run)
    if abs(again.main - test.main) > AGREEMENT * max(1.0, abs(test.main)):
        name = next(iter(test.figures))
        raise RuntimeError(
            f"{folder.compressed}: {name} {again.main:.4f} on the test split, the model it was made from has "
            f"{test.main:.4f}; this is a defect of nmflow"
        )
    said_again = translate_test(packed, run.data, run.config.bleu)
    return {
        **figures,
        "sparsity": {"density": report.density, "weights": sum(slot.weights for slot in report.slots)},
        "verify": proof.to_dict(),
        "compressed": {
            "test": {**again.to_dict(), **said_again.figures()},
            **said.agreement(said_again, folder.compressed),
            "layers": [asdict(layer) for layer in files.layers],
            "bytes_before": files.bytes_before,
            "bytes_after": files.bytes_after,
        },
    }


def _tested(model: Any, run: Training) -> Score:
    """The score on the test split, those on further ones in it."""
    device = run.accelerator.device
    further = {
        name: None if split is None else evaluate(model, replace(run.data, test=split), "test", device)
        for name, split in run.data.further.items()
    }
    return replace(evaluate(model, run.data, "test", device), further=further)


def _from_file(run: Training, folder: RunFolder) -> Any:
    """A fresh network with the weights of the compressed file, so that nothing but the file can be right."""
    model = build_model(run.config.model, run.data).to(run.accelerator.device)
    return load_compressed(folder.compressed, into=model)
