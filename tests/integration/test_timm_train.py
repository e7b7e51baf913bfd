"""`examples/timm_train.py` adds a sparse run to a script that makes timm's calls, and changes nothing else of it.

timm's package has no train.py; the script here makes the calls of the repository's, in its order, on noise.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import nmflow

pytest.importorskip("timm", reason="the functions under test come with the extra timm")
import timm.models
import timm.optim
import timm.scheduler
import timm.utils.clip_grad
import timm.utils.cuda

EXAMPLE = Path(__file__).parents[2] / "examples" / "timm_train.py"
PER_EPOCH, EPOCHS = 4, 3
STRONG = '{"name": "sr-ste", "sr_ste": 3.0}'  # outweighs the gradient: clipping it or not makes another run of it
REPLACED = [
    (timm.optim, "create_optimizer_v2"), (timm.scheduler, "create_scheduler_v2"), (timm.models, "resume_checkpoint"),
    (timm.utils, "dispatch_clip_grad"), (timm.utils.cuda, "dispatch_clip_grad"),
    (timm.utils.clip_grad, "dispatch_clip_grad"),
]  # fmt: skip

SCRIPT = """
import argparse
import torch
from timm import utils
from timm.models import create_model, resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import NativeScaler

parser = argparse.ArgumentParser()
parser.add_argument("--clip-grad", type=float)
parser.add_argument("--accumulate", type=int, default=1)
parser.add_argument("--scale", action="store_true")
parser.add_argument("--ema", action="store_true")
parser.add_argument("--resume", default="")
parser.add_argument("--stop-after", type=int, default=99)
parser.add_argument("--save", default="")
args = parser.parse_args()


def main():
    torch.manual_seed(0)
    model = create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2,
                         num_classes=3)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-2, weight_decay=0.0, eps=1e-3)
    loss_scaler = NativeScaler(device="cpu") if args.scale else None
    resume_epoch = None
    if args.resume:
        resume_epoch = resume_checkpoint(model, args.resume, optimizer=optimizer)
    ema = utils.ModelEmaV2(model, decay=0.5) if args.ema else None
    scheduler, num_epochs = create_scheduler_v2(
        optimizer, sched="step", num_epochs=3, decay_epochs=99, warmup_epochs=0, updates_per_epoch=4)
    for epoch in range(resume_epoch or 0, min(num_epochs, args.stop_after)):
        model.train()
        optimizer.zero_grad()
        for index in range(4 * args.accumulate):
            draw = torch.Generator().manual_seed(1000 * epoch + index)
            images, labels = torch.randn(4, 3, 16, 16, generator=draw), torch.randint(0, 3, (4,), generator=draw)
            loss = torch.nn.functional.cross_entropy(model(images), labels) / args.accumulate
            need_update = (index + 1) % args.accumulate == 0
            if loss_scaler is not None:
                loss_scaler(loss, optimizer, clip_grad=args.clip_grad, clip_mode="norm",
                            parameters=model.parameters(), need_update=need_update)
            else:
                loss.backward()
                if need_update:
                    if args.clip_grad is not None:
                        utils.dispatch_clip_grad(model.parameters(), value=args.clip_grad, mode="norm")
                    optimizer.step()
            if need_update:
                optimizer.zero_grad()
                if ema is not None:
                    ema.update(model)
        if args.save:
            state = {"epoch": epoch, "version": 2, "state_dict": model.state_dict()}
            torch.save({**state, "optimizer": optimizer.state_dict()}, args.save)
    if ema is not None:
        weight = ema.module.blocks[0].mlp.fc1.weight
        print("EMA density", float(weight.count_nonzero()) / weight.numel())


if __name__ == "__main__":
    main()
"""


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the example in this process, on the script above; what it printed. timm is as it was afterwards."""

    def run(folder: Path, *arguments: str, steps: int = PER_EPOCH * EPOCHS, recipe: str = STRONG) -> str:
        (folder / "train.py").write_text(SCRIPT, encoding="utf-8")
        with monkeypatch.context() as here:
            for module, name in REPLACED:
                here.setattr(module, name, getattr(module, name))
            here.setattr(sys, "path", list(sys.path))
            here.setattr(sys, "argv", [
                str(EXAMPLE), "--steps", str(steps), "--targets", '{"ff": "1:8", "qk": "2:8"}', "--recipe", recipe,
                "--out", str(folder / "final.safetensors"), str(folder / "train.py"), *arguments,
            ])  # fmt: skip
            runpy.run_path(str(EXAMPLE), run_name="__main__")
        return capsys.readouterr().out

    return run


def plain_loop(accumulate: int, clip: float | None) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=3
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0, eps=1e-3)
    strong = nmflow.recipe("sr-ste", sr_ste=3.0)
    sparsifier = nmflow.Sparsifier(model, {"ff": "1:8", "qk": "2:8"}, strong, PER_EPOCH * EPOCHS)
    for epoch in range(EPOCHS):
        for index in range(PER_EPOCH * accumulate):
            draw = torch.Generator().manual_seed(1000 * epoch + index)
            images, labels = torch.randn(4, 3, 16, 16, generator=draw), torch.randint(0, 3, (4,), generator=draw)
            (nn.functional.cross_entropy(model(images), labels) / accumulate).backward()
            if (index + 1) % accumulate == 0:
                sparsifier.edit_gradients()
                if clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
                sparsifier.step()
    sparsifier.finalize()
    return model.state_dict()


@pytest.mark.parametrize(
    ("arguments", "accumulate", "clip"),
    [
        (["--clip-grad", "0.1", "--accumulate", "2"], 2, 0.1), (["--ema"], 1, None),
        (["--scale", "--clip-grad", "0.1"], 1, 0.1), (["--scale"], 1, None),
    ],
    ids=str,
)  # fmt: skip
def test_the_script_ends_with_the_weights_of_a_plain_loop(tmp_path, run, arguments, accumulate, clip):
    output = run(tmp_path, *arguments)
    assert "4 of 4 layers are N:M" in output
    final = load_file(tmp_path / "final.safetensors")
    for name, expected in plain_loop(accumulate, clip).items():
        torch.testing.assert_close(final[name], expected, rtol=0, atol=1e-6)
    if "--ema" in arguments:
        assert "EMA density 0.125" in output


def test_the_comparison_can_fail():
    """Other clipping is another run: the weights above would not be met by chance."""
    clipped, unclipped = plain_loop(1, 0.1), plain_loop(1, None)
    assert any((clipped[name] - tensor).abs().max() > 1e-2 for name, tensor in unclipped.items())


def test_a_run_resumes_at_an_epoch(tmp_path, run):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    run(whole, recipe="mdgf-linear")
    run(cut, "--stop-after", "2", "--save", str(cut / "last.pth"), recipe="mdgf-linear")
    output = run(cut, "--resume", str(cut / "last.pth"), recipe="mdgf-linear")
    assert "after 12 of 12 steps" in output
    one, two = load_file(whole / "final.safetensors"), load_file(cut / "final.safetensors")
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    with pytest.raises(ValueError, match=r'recipe "idp" keeps masks that train\.py does not save'):
        run(cut, "--resume", str(cut / "last.pth"), recipe="idp")


def test_a_wrong_number_of_steps_is_refused(tmp_path, run):
    with pytest.raises(ValueError, match="give --steps 12"):
        run(tmp_path, steps=10)
    assert not (tmp_path / "final.safetensors").exists()
