"""Inside Lightning a sparse run gives the weights that a plain loop gives."""

from __future__ import annotations

import importlib
import importlib.util

import pytest
import torch
from torch import nn
from trainers import (
    NET,
    STEPS,
    STRONG,
    PowerCutError,
    assert_same,
    assert_same_noise,
    classes,
    lightning_module,
    lightning_trainer,
    loader,
    plain_loop,
    snippets,
    vectors,
    zero_count_is_right,
)

import nmflow

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("lightning") is None and importlib.util.find_spec("pytorch_lightning") is None,
        reason="Lightning is not installed: pip install 'nmflow[lightning]'",
    ),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("max_norm", [0.0, 0.1])
@pytest.mark.parametrize("scaled", [False, True])
def test_lightning_gives_the_weights_of_a_plain_loop(tmp_path, accumulate, max_norm, scaled):
    """`scaled`: with fp16's loss scaler on a CPU and the casting left out, which may change nothing."""
    from nmflow.integrations.lightning import SparsityCallback, _package

    batches = vectors()[: STEPS * accumulate]
    changes = {}
    if scaled:
        precision = importlib.import_module(f"{_package().__name__}.plugins.precision").MixedPrecision

        class OnlyScaled(precision):
            def autocast_context_manager(self):
                return torch.autocast("cpu", enabled=False)

        changes["plugins"] = [OnlyScaled("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))]
    callback = SparsityCallback(NET, STRONG, probe_every=2)
    trainer = lightning_trainer(
        tmp_path, callback, accumulate_grad_batches=accumulate, gradient_clip_val=max_norm, **changes
    )
    module = lightning_module()
    trainer.fit(module, loader(batches))
    looks = []
    expected = plain_loop(
        lightning_module(), NET, batches, accumulate, max_norm, loss_of=lambda m, b: m.loss(b), looks=looks
    )
    assert_same(module, expected)
    assert_same_noise(callback.noise, looks, 2)
    assert callback.report.step == callback.report.total_steps == STEPS
    assert nmflow.verify(module).ok
    assert zero_count_is_right(module.net[0].weight, 1)
    assert zero_count_is_right(module.net[2].weight, 2)


def test_the_recipe_follows_lightnings_optimizer_steps_not_batches(tmp_path):
    from nmflow.integrations.lightning import SparsityCallback

    module, batches = lightning_module(), vectors()
    callback = SparsityCallback(NET, "mdgf-linear", mask_every=2)
    lightning_trainer(tmp_path, callback, accumulate_grad_batches=3).fit(module, loader(batches))
    expected = plain_loop(lightning_module(), NET, batches, 3, 0.0, "mdgf-linear", 2, loss_of=lambda m, b: m.loss(b))
    assert_same(module, expected)


def test_the_comparison_with_lightning_can_fail(tmp_path):
    from nmflow.integrations.lightning import SparsityCallback

    class TooLate(SparsityCallback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            nn.utils.clip_grad_norm_(pl_module.parameters(), 0.1)
            super().on_before_optimizer_step(trainer, pl_module, optimizer)

    module, batches = lightning_module(), vectors()[:STEPS]
    lightning_trainer(tmp_path, TooLate(NET, STRONG)).fit(module, loader(batches))
    expected = plain_loop(lightning_module(), NET, batches, 1, 0.1, loss_of=lambda m, b: m.loss(b))
    with pytest.raises(AssertionError):
        assert_same(module, expected, tolerance=1e-3)


def fit_lightning(
    folder, mask_every=1, recipe="mdgf-exponential", dies=0, resume=None, max_steps=7, probe_every=None
):
    from nmflow.integrations.lightning import SparsityCallback, _package

    class Dies(_package().Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == dies:
                raise PowerCutError

    checkpoints = importlib.import_module(f"{_package().__name__}.callbacks").ModelCheckpoint
    keep = checkpoints(dirpath=folder, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    callback = SparsityCallback(NET, recipe, mask_every=mask_every, probe_every=probe_every)
    trainer = lightning_trainer(folder, callback, Dies(), keep, enable_checkpointing=True, max_steps=max_steps,
                                max_epochs=3)  # fmt: skip
    module = lightning_module(dropout=0.2, by_step=True)
    trainer.fit(module, loader(vectors()), ckpt_path=resume)
    return module, callback, trainer


@pytest.mark.parametrize(("recipe", "mask_every"), [("mdgf-exponential", 2), (STRONG, 1), ("idp", 1)], ids=str)
def test_a_killed_lightning_run_goes_on_to_the_same_bits(tmp_path, recipe, mask_every):
    whole, _, _ = fit_lightning(tmp_path / "whole", mask_every, recipe)
    with pytest.raises(PowerCutError):
        fit_lightning(tmp_path / "cut", mask_every, recipe, dies=5)
    again, callback, _ = fit_lightning(tmp_path / "cut", mask_every, recipe, resume=tmp_path / "cut" / "step=3.ckpt")
    assert_same(again, whole, tolerance=0.0)
    assert callback.report.step == 7


def test_a_killed_lightning_run_that_was_probed_goes_on_to_the_same_averages(tmp_path):
    _, whole, _ = fit_lightning(tmp_path / "whole", probe_every=2)
    with pytest.raises(PowerCutError):
        fit_lightning(tmp_path / "cut", dies=5, probe_every=2)
    kept = tmp_path / "cut" / "step=3.ckpt"
    _, again, _ = fit_lightning(tmp_path / "cut", resume=kept, probe_every=2)
    assert again.noise == whole.noise
    assert whole.noise.step == 6
    with pytest.raises(ValueError, match="the run was probed; give it probe_every=2 again"):
        fit_lightning(tmp_path / "cut", resume=kept)


def test_resuming_lightning_where_nothing_is_left_to_train_ends_sparse(tmp_path):
    whole, _, _ = fit_lightning(tmp_path, max_steps=6)
    again, callback, _ = fit_lightning(tmp_path, max_steps=6, resume=tmp_path / "step=6.ckpt")
    assert_same(again, whole, tolerance=0.0)
    assert callback.report.step == 6


def test_lightning_refuses_checkpoints_that_do_not_fit(tmp_path):
    _, _, trainer = fit_lightning(tmp_path, max_steps=6)
    with pytest.raises(ValueError, match="trained to N:M already"):
        trainer.fit(trainer.lightning_module, loader(vectors()))
    trainer.save_checkpoint(tmp_path / "finished.ckpt")
    with pytest.raises(ValueError, match="total_steps: the state has 6, this run 9"):
        fit_lightning(tmp_path, max_steps=9, resume=tmp_path / "step=3.ckpt")
    with pytest.raises(ValueError, match="written after the weights were cut"):
        fit_lightning(tmp_path, max_steps=9, resume=tmp_path / "finished.ckpt")
    module = lightning_module(dropout=0.2)
    dense = lightning_trainer(tmp_path, max_steps=3)
    dense.fit(module, loader(vectors()))
    dense.save_checkpoint(tmp_path / "dense.ckpt")
    with pytest.raises(ValueError, match=r"dense.ckpt: holds no state of this callback"):
        fit_lightning(tmp_path, max_steps=6, resume=tmp_path / "dense.ckpt")


def test_validation_in_lightning_sees_the_sparse_weights(tmp_path):
    from nmflow.integrations.lightning import SparsityCallback

    module = lightning_module()
    trainer = lightning_trainer(
        tmp_path, SparsityCallback(NET, "sr-ste"), limit_val_batches=1, val_check_interval=5, num_sanity_val_steps=1
    )
    trainer.fit(module, loader(vectors()), loader(vectors()[:1]))
    assert len(module.validated) == 4  # the first before any training
    for state, loss in module.validated:
        pruned, dense = lightning_module(), lightning_module()
        dense.load_state_dict(state)
        pruned.load_state_dict(state)
        with torch.no_grad():
            for layer, n in ((pruned.net[0], 1), (pruned.net[2], 2)):
                for row in layer.weight:
                    for start in range(0, len(row), 8):
                        block = row[start : start + 8]
                        block[sorted(range(8), key=lambda place: -abs(block[place].item()))[n:]] = 0.0
            assert float(pruned.eval().loss(vectors()[0])) == pytest.approx(float(loss), abs=1e-6)
            assert float(dense.eval().loss(vectors()[0])) != pytest.approx(float(loss), abs=1e-4)


def test_what_lightning_logs_says_where_the_recipe_stands(tmp_path):
    from nmflow.integrations.lightning import SparsityCallback, _package

    class Keeps(importlib.import_module(f"{_package().__name__}.loggers").CSVLogger):
        lines: list[dict[str, float]] = []  # noqa: RUF012  one of its kind

        def log_metrics(self, metrics, step=None):
            self.lines.append(dict(metrics))

    callback = SparsityCallback(NET, nmflow.recipe("sdgf-stepwise", dense=0.2, decay_end=0.8), probe_every=4)
    counted = []

    class Counts(_package().Callback):
        def on_train_batch_end(self, *args):
            counted.append(callback.sparsifier.report().density)

    trainer = lightning_trainer(tmp_path, callback, Counts(), logger=Keeps(tmp_path), log_every_n_steps=1)
    trainer.fit(lightning_module(), loader(vectors()[:10]))
    lines = [line for line in Keeps.lines if "nm_density" in line]
    assert [line["nm_density"] for line in lines] == pytest.approx(counted)
    assert len(set(counted)) > 2
    assert counted[-1] == pytest.approx((16 * 32 / 8 + 32 * 16 * 2 / 8) / (2 * 16 * 32))
    assert [line["nm_decay"] for line in lines] == [1.0] + [0.0] * 9  # 1 in the dense phase
    seen = [line.get("nm_grad_abs_var") for line in lines]
    assert seen[:3] == [None] * 3
    assert seen[3] == seen[6] != seen[7] == pytest.approx(callback.noise.pooled.grad_abs_var)


@pytest.mark.parametrize(
    ("module", "changes", "recipe", "message"),
    [
        ({"optimizers": 2, "manual": True}, {}, "ste", r"(?s)manual optimization.*2 optimizers"),
        ({}, {"max_epochs": -1}, "ste", "the trainer expects inf optimizer steps"),
        ({}, {"averages": True}, "ste", "StochasticWeightAveraging: would put an average"),
        ({}, {"schedules": True}, "ste", "GradientAccumulationScheduler"),
        ({}, {"strategy_name": "FSDPStrategy"}, "ste", "FSDPStrategy: keeps the weights where"),
        ({}, {}, "snip", 'recipe "snip": scores weights'),
    ],
)
def test_what_lightning_cannot_carry_is_refused_and_nothing_changed(tmp_path, module, changes, recipe, message):
    from nmflow.integrations.lightning import SparsityCallback, _package

    changes, callbacks = dict(changes), importlib.import_module(f"{_package().__name__}.callbacks")
    others = []
    if changes.pop("averages", False):
        others.append(callbacks.StochasticWeightAveraging(1e-2))
    if changes.pop("schedules", False):
        others.append(callbacks.GradientAccumulationScheduler({0: 1, 1: 2}))
    name = changes.pop("strategy_name", None)
    trainer = lightning_trainer(tmp_path, SparsityCallback(NET, recipe), *others, **changes)
    if name:
        trainer.strategy.__class__ = type(name, (type(trainer.strategy),), {})
    made = lightning_module(**module)
    names = classes(made)
    with pytest.raises(ValueError, match=message):
        trainer.fit(made, loader(vectors()))
    assert classes(made) == names


def test_the_callback_is_lightnings_own_and_can_be_pickled():
    import pickle

    from nmflow.integrations import lightning

    callback = lightning.SparsityCallback(NET, STRONG)
    assert isinstance(callback, lightning._package().Callback)
    assert type(pickle.loads(pickle.dumps(callback))) is lightning.SparsityCallback
    with pytest.raises(AttributeError, match="no attribute 'Sparsity'"):
        lightning.Sparsity  # noqa: B018  wrong on purpose


def test_the_snippet_for_lightning_runs(tmp_path):
    from nmflow.integrations.lightning import _package

    class Encoder(_package().LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)

        def training_step(self, batch, index):
            return self.model(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters())

    module = Encoder()
    code = snippets()[2].replace("10_000", "5").replace("final.ckpt", str(tmp_path / "final.ckpt"))
    exec(code, {
        "Trainer": lambda callbacks, **settings: lightning_trainer(tmp_path, *callbacks, **settings), "module": module,
        "loader": loader([torch.randn(2, 3, 16) for _ in range(5)]),
    })  # fmt: skip
    saved = torch.load(tmp_path / "final.ckpt", weights_only=True)["state_dict"]["model.linear1.weight"]
    assert torch.equal(saved, module.model.linear1.weight)
    assert int((saved != 0).sum()) == 32  # 32 rows of one block of 16
