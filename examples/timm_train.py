"""timm's own train.py, unchanged, with N:M weights at the end: the script runs as it is, this file listens.

    python examples/timm_train.py --steps 312500 --targets '{"ff": "1:16"}' --out final.safetensors \\
        PATH/TO/train.py --data-dir /imagenet --model vit_tiny_patch16_224 --epochs 300 ...

train.py is the one of timm's repository (the package does not contain it). It looks timm's functions up by name, so
they are replaced before it starts: where it makes the optimizer the sparsifier attaches, where it clips SR-STE's term
is added, where the optimizer has stepped the sparsifier steps. Checkpoints hold dense weights, `--out` the N:M ones.
"""

from __future__ import annotations

import argparse
import functools
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import timm.models
import timm.optim
import timm.scheduler
import timm.utils
import timm.utils.clip_grad
import timm.utils.cuda
import torch

import nmflow
from nmflow.runtime import save_model


class Listener:
    """The sparse run inside train.py's, put together from the calls that train.py makes anyway."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.sparsifier: nmflow.Sparsifier | None = None
        self.edited = False  # whether SR-STE's term of this step has been added
        self.counted = False  # whether train.py's number of steps has been compared
        self.resumed_epoch = 0

    def install(self) -> None:
        self.replace("create_optimizer_v2", self.create_optimizer, timm.optim)
        self.replace("create_scheduler_v2", self.create_scheduler, timm.scheduler)
        self.replace("resume_checkpoint", self.resume, timm.models)
        # `utils.dispatch_clip_grad` is train.py's name for it, `cuda.dispatch_clip_grad` that of the loss scaler.
        self.replace("dispatch_clip_grad", self.clip, timm.utils.clip_grad, timm.utils, timm.utils.cuda)

    def replace(self, name: str, by: Any, *modules: Any) -> None:
        original = getattr(modules[0], name)
        for module in modules:
            setattr(module, name, functools.wraps(original)(functools.partial(by, original)))

    def create_optimizer(self, original: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        """The model is on its device, not yet loaded, averaged (EMA), wrapped (DDP) or compiled: attach here."""
        if self.sparsifier is not None or not isinstance(model, torch.nn.Module):
            raise ValueError("train.py makes its optimizer in a way that is not known here; use nmflow.Sparsifier")
        optimizer = original(model, *args, **kwargs)
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            raise ValueError("a fused optimizer takes the loss scale out too late for SR-STE; choose another --opt")
        options = self.options
        self.sparsifier = nmflow.Sparsifier(model, options.targets, options.recipe, options.steps, options.remainder)
        optimizer.register_step_pre_hook(self.before_step)
        optimizer.register_step_post_hook(self.after_step)
        return optimizer

    def resume(self, original: Any, model: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
        epoch = original(model, path, *args, **kwargs)
        if self.sparsifier is None or epoch is None:
            raise ValueError(f"{path}: does not say at which epoch it was written, so neither where the recipe stood")
        steps, recipe = self.options.steps, self.sparsifier.recipe
        if any(recipe.at(steps, steps, slot.pattern, slot.axis).mask != "fresh" for slot in self.sparsifier.slots):
            raise ValueError(f'{path}: recipe "{recipe.name}" keeps masks that train.py does not save; start anew')
        self.resumed_epoch = epoch
        return epoch

    def create_scheduler(self, original: Any, *args: Any, updates_per_epoch: int = 0, **kwargs: Any) -> Any:
        """Only here train.py knows how many steps it will make."""
        scheduler, epochs = original(*args, updates_per_epoch=updates_per_epoch, **kwargs)
        if epochs * updates_per_epoch != self.options.steps:
            raise ValueError(
                f"train.py will make {epochs} x {updates_per_epoch} steps, and the recipe was laid out over "
                f"{self.options.steps}: give --steps {epochs * updates_per_epoch}"
            )
        self.counted = True
        if self.resumed_epoch and self.sparsifier is not None:  # masks follow from the weights and the step
            self.sparsifier.step(n=self.resumed_epoch * updates_per_epoch)
        return scheduler, epochs

    def clip(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        """Once a step; the loss scale is out of the gradients by now."""
        if self.sparsifier is not None:
            self.sparsifier.edit_gradients()
            self.edited = True
        return original(*args, **kwargs)

    def before_step(self, *_: Any) -> None:
        if not self.counted:
            raise ValueError("this train.py is older than timm.scheduler.create_scheduler_v2; take a newer one")
        if self.sparsifier is not None and not self.edited:  # a run without --clip-grad
            self.sparsifier.edit_gradients()

    def after_step(self, *_: Any) -> None:
        self.edited = False
        if self.sparsifier is not None:
            self.sparsifier.step()  # a step that the loss scaler skips is none


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=json.loads, required=True, help='as JSON: {"ff": "1:16", "qkv": "1:4"}')
    parser.add_argument("--steps", type=int, required=True, help="optimizer steps; a wrong number is refused")
    parser.add_argument("--recipe", default="mdgf-exponential", help='or JSON: {"name": "sr-ste", "sr_ste": 2e-4}')
    parser.add_argument("--remainder", default="error")
    parser.add_argument("--out", type=Path, required=True, help="file for the N:M weights, safetensors")
    parser.add_argument("script", help="train.py, and after it its own arguments")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    if options.recipe.startswith("{"):
        options.recipe = nmflow.recipe(**json.loads(options.recipe))

    listener = Listener(options)
    listener.install()
    sys.argv = [options.script, *options.arguments]
    sys.path[0] = str(Path(options.script).resolve().parent)
    runpy.run_path(options.script, run_name="__main__")

    if listener.sparsifier is None or not listener.sparsifier.current_step:
        raise SystemExit("train.py took no step of an optimizer from timm.optim.create_optimizer_v2: nothing is sparse")
    report = listener.sparsifier.finalize()
    primary = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    if primary:
        save_model(listener.sparsifier.model, options.out)
        print(f"density {report.density:.4f} after {report.step} of {report.total_steps} steps: {options.out}")
        print("\n".join(nmflow.verify(options.out).lines()))


if __name__ == "__main__":
    main()
