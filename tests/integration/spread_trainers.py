"""Other people's trainers, with spread weights on several processes; started by test_spread_trainers.

Every process trains its share, then the plain loop on what all of them were given, and asserts that they agree.
"""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from trainers import (
    BATCH,
    BERT,
    NET,
    STEPS,
    STRONG,
    PowerCutError,
    assert_same_noise,
    bert,
    bert_weights_are_sparse,
    lightning_module,
    lightning_trainer,
    loader,
    plain_loop,
    sentences,
    trainer_of,
    vectors,
)

import nmflow

MASKED = nmflow.recipe("mdgf-linear", pruned_gradient="masked")
"""Its gradients are made dL/dW of dL/dW~ where weights are spread."""
RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
OUT = Path(sys.argv[1] if len(sys.argv) > 1 else ".")


def whole(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a spread model, on every process."""
    state: dict[str, Any] = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return state


def given_to_all(batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """What the processes were given together, batch by batch."""
    of_each: list[Any] = [None] * PROCESSES
    dist.all_gather_object(of_each, batches)
    batches = zip(*of_each, strict=True)
    return [{key: torch.cat([batch[key] for batch in shares]) for key in shares[0]} for shares in batches]


def assert_alike(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def noted(recipe: Any) -> list[dict[str, float]] | None:
    """Where the plain loop notes gradient noise: of a decaying mask the weights do not show what flips."""
    return [] if recipe is STRONG else None


# -- Hugging Face --------------------------------------------------------------------------------------------------


def open_fsdp_on_cpus() -> None:
    """Accelerate has FSDP on accelerators alone. All that keeps it from CPUs is the name of the kind of run."""
    set_up = AcceleratorState.__init__

    def set_up_fsdp(self: Any, *args: Any, fsdp_plugin: Any = None, **settings: Any) -> None:
        set_up(self, *args, fsdp_plugin=fsdp_plugin, **settings)
        if fsdp_plugin is not None:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            PartialState._shared_state["distributed_type"] = self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = set_up_fsdp


def spread_trainer(folder: Path, model: nn.Module | None = None, layer: str = "BertLayer", **changes: Any) -> Any:
    """A trainer under FSDP2, whose processes are given `BATCH` items together."""
    config = {"version": 2, "transformer_layer_cls_to_wrap": [layer], **changes.pop("fsdp_config", {})}
    share = BATCH // PROCESSES
    trainer = trainer_of(folder, model, fsdp=True, fsdp_config=config, per_device_train_batch_size=share, **changes)
    assert trainer.accelerator.is_fsdp2
    return trainer


def check_copies() -> None:
    """DDP: the weights of a plain loop, and killed after five steps, gone on from the third."""
    from nmflow.integrations.transformers import sparsify

    def run(
        folder: Path, recipe: Any, dropout: float, dies: int = 0, resume: bool = False, **changes: Any
    ) -> Any:
        trainer = trainer_of(
            folder, bert(dropout), per_device_train_batch_size=BATCH // PROCESSES, callbacks=[dying_trainer(dies)],
            ddp_find_unused_parameters=False, **changes,
        )  # fmt: skip
        sparsify(trainer, BERT, recipe)
        trainer.train(resume_from_checkpoint=resume)
        assert isinstance(trainer.model_wrapped, nn.parallel.DistributedDataParallel)
        return trainer

    trainer = run(OUT / "copies", STRONG, 0.0)
    expected = plain_loop(bert(), BERT, given_to_all(trainer.data_collator.batches), 1, 0.1)
    assert_alike(trainer.model.state_dict(), expected.state_dict(), 1e-6)
    kept = {"max_steps": 7, "save_strategy": "steps", "save_steps": 3}
    for recipe in ("mdgf-exponential", "idp"):  # masks of the second are not found again from the weights
        for name in ("uncut", "cut"):
            clear(OUT / name)
        uncut = run(OUT / "uncut", recipe, 0.1, **kept)
        with pytest.raises(PowerCutError):
            run(OUT / "cut", recipe, 0.1, dies=5, **kept)
        resumed = run(OUT / "cut", recipe, 0.1, resume=True, **kept)
        assert_alike(resumed.model.state_dict(), uncut.model.state_dict(), 0.0)


def check_trainer() -> None:
    """The weights of a plain loop; what `save_model` writes is N:M."""
    from nmflow.integrations.transformers import sparsify

    for accumulate, max_norm, recipe in ((1, 0.1, STRONG), (3, 0.0, STRONG), (1, 0.1, MASKED)):
        trainer = spread_trainer(
            OUT / "same", bert(), gradient_accumulation_steps=accumulate, max_grad_norm=max_norm, logging_strategy="no"
        )
        callback = sparsify(trainer, BERT, recipe, probe_every=2)
        trainer.train()
        batches, looks = given_to_all(trainer.data_collator.batches), noted(recipe)
        expected = plain_loop(bert(), BERT, batches, accumulate, max_norm, recipe, looks=looks).state_dict()
        assert_alike(whole(trainer.model), expected, 1e-6)
        assert callback.report.step == STEPS
        if looks is not None:
            assert_same_noise(callback.noise, looks, 2)
    trainer.save_model(OUT / "final")
    dist.barrier()
    saved = load_file(OUT / "final" / "model.safetensors")
    assert_alike(saved, expected, 1e-6)
    assert bert_weights_are_sparse(saved)


def llama() -> nn.Module:
    import transformers

    torch.manual_seed(0)
    model: nn.Module = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, tie_word_embeddings=True, initializer_range=0.2,
    ))  # fmt: skip
    return model


def check_language_model() -> None:
    """Tied embeddings, and generating with the spread weights."""
    from nmflow.integrations.transformers import sparsify

    targets = {"ff": "1:8", "qkv": "2:8"}
    trainer = spread_trainer(OUT / "llama", llama(), "LlamaDecoderLayer", labels=(6,))
    sparsify(trainer, targets, STRONG)
    trainer.train()
    expected = plain_loop(llama(), targets, given_to_all(trainer.data_collator.batches), 1, 0.1)
    assert_alike(whole(trainer.model), expected.state_dict(), 1e-6)
    ids = sentences(PROCESSES)[RANK]["input_ids"][None]
    written = [model.eval().generate(ids, max_new_tokens=4, do_sample=False) for model in (trainer.model, expected)]
    assert torch.equal(*written)


def check_trainer_resumes() -> None:
    """Killed after five steps, gone on from the third; checkpoints in one file and in parts, masks that are kept."""
    from nmflow.integrations.transformers import sparsify

    def run(folder: Path, recipe: Any, kept: dict[str, Any], dies: int = 0, resume: bool = False) -> Any:
        trainer = spread_trainer(
            folder, bert(0.1), max_steps=7, save_strategy="steps", save_steps=3, callbacks=[dying_trainer(dies)], **kept
        )
        callback = sparsify(trainer, BERT, recipe, probe_every=2)
        trainer.train(resume_from_checkpoint=resume)
        return whole(trainer.model), callback.noise

    for recipe, kept in (
        ("mdgf-exponential", {}),
        ("idp", {"fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}}),
        (STRONG, {"fsdp_config": {"activation_checkpointing": True}}),
        (STRONG, {"fsdp_config": {"cpu_ram_efficient_loading": True}, "bf16": True}),
    ):
        for folder in (OUT / "uncut", OUT / "cut"):
            clear(folder)
        expected, noise = run(OUT / "uncut", recipe, kept)
        with pytest.raises(PowerCutError):
            run(OUT / "cut", recipe, kept, dies=5)
        resumed, again = run(OUT / "cut", recipe, kept, resume=True)
        assert_alike(resumed, expected, 0.0)
        assert again == noise


def check_parts() -> None:
    """Where checkpoints are written in parts `save_model` writes nothing, which is said, until it is told otherwise."""
    from nmflow.integrations.transformers import sparsify

    trainer = spread_trainer(OUT / "parts", bert(), fsdp_config={"state_dict_type": "SHARDED_STATE_DICT"})
    sparsify(trainer, BERT)
    with pytest.warns(UserWarning, match=r'set_state_dict_type\("FULL_STATE_DICT"\)'):
        trainer.train()
    trainer.save_model(OUT / "parts")
    assert not list((OUT / "parts").glob("*.safetensors"))
    trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(OUT / "parts")
    dist.barrier()
    assert bert_weights_are_sparse(load_file(OUT / "parts" / "model.safetensors"))


def dying_trainer(step: int) -> Any:
    from transformers import TrainerCallback

    class Dies(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                raise PowerCutError

    return Dies()


def clear(folder: Path) -> None:
    """Empty a folder that all processes write to."""
    dist.barrier()
    if RANK == 0:
        shutil.rmtree(folder, ignore_errors=True)
    dist.barrier()


# -- Lightning -----------------------------------------------------------------------------------------------------


def spread_lightning(folder: Path, *callbacks: Any, keeps: str = "parts", **changes: Any) -> Any:
    """`keeps`: checkpoints in "parts" or in "one file" under FSDP2, or under DDP, where processes keep "copies"."""
    from nmflow.integrations.lightning import _package

    strategies = _package().strategies
    strategy = strategies.DDPStrategy() if keeps == "copies" else strategies.ModelParallelStrategy(
        data_parallel_size=PROCESSES, tensor_parallel_size=1, save_distributed_checkpoint=keeps == "parts"
    )  # fmt: skip
    settings = {"devices": PROCESSES, "strategy": strategy, "use_distributed_sampler": False, **changes}
    return lightning_trainer(folder, *callbacks, **settings)


def spread_module(by_step: bool = False) -> Any:
    """The module of the other tests, whose layers are spread where Lightning asks for it."""
    from nmflow.integrations.lightning import _package

    module = lightning_module(dropout=0.2 if by_step else 0.0)
    base = type(module)

    class Spread(base):  # type: ignore[misc, valid-type]  # a class made of Lightning's
        def configure_model(self) -> None:
            if isinstance(self.trainer.strategy, _package().strategies.DDPStrategy):
                return
            mesh = self.device_mesh["data_parallel"]
            for part in (*(layer for layer in self.net if isinstance(layer, nn.Linear)), self):
                fully_shard(part, mesh=mesh)

        def training_step(self, batch: Any, index: int) -> Tensor:
            items = vectors()[self.global_step] if by_step else batch
            return self.loss(tuple(tensor[RANK::PROCESSES] for tensor in items))

    module.__class__ = Spread
    return module


def check_lightning() -> None:
    """The weights of a plain loop."""
    from nmflow.integrations.lightning import SparsityCallback

    for keeps, accumulate, max_norm, recipe in (
        ("copies", 1, 0.1, STRONG),
        ("parts", 1, 0.1, STRONG),
        ("parts", 3, 0.0, STRONG),
        ("parts", 1, 0.1, MASKED),
    ):
        batches = vectors()[: STEPS * accumulate]
        callback, module, looks = SparsityCallback(NET, recipe, probe_every=2), spread_module(), noted(recipe)
        trainer = spread_lightning(
            OUT, callback, keeps=keeps, accumulate_grad_batches=accumulate, gradient_clip_val=max_norm
        )
        trainer.fit(module, loader(batches))
        expected = plain_loop(
            lightning_module(), NET, batches, accumulate, max_norm, recipe,
            loss_of=lambda m, batch: m.loss(batch), looks=looks,
        )  # fmt: skip
        assert_alike(whole(module), expected.state_dict(), 1e-6)
        assert callback.report.step == callback.report.total_steps == STEPS
        if looks is not None:
            assert_same_noise(callback.noise, looks, 2)


def fit(folder: Path, plan: dict[str, Any] | None, dies: int = 0, resume: str = "", steps: int = 7, **kept: Any) -> Any:
    """Fit, keeping every third step; the weights and the callback. Without a plan, densely."""
    from nmflow.integrations.lightning import SparsityCallback, _package

    class Dies(_package().Callback):  # type: ignore[misc]  # a class made of Lightning's
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == dies:
                raise PowerCutError

    keep = _package().callbacks.ModelCheckpoint(
        dirpath=folder, every_n_train_steps=3, save_top_k=-1, filename="{step}"
    )
    callback = SparsityCallback(NET, **plan) if plan else None
    trainer = spread_lightning(
        folder, *([callback] if callback else []), Dies(), keep, enable_checkpointing=True, max_steps=steps,
        max_epochs=3, **kept,
    )  # fmt: skip
    module = spread_module(by_step=True)
    trainer.fit(module, loader(vectors()), ckpt_path=folder / resume if resume else None)
    return whole(module), callback, trainer


def check_lightning_resumes() -> None:
    """Killed after five steps, gone on from the third; where nothing is left; what does not fit is refused."""
    sparser = {"recipe": "mdgf-exponential", "mask_every": 2, "probe_every": 2}
    for plan, kept in (
        (sparser, {"keeps": "copies"}),
        ({"recipe": "idp", "probe_every": 2}, {"keeps": "parts"}),
        (sparser, {"keeps": "one file"}),
    ):
        for name in ("uncut", "cut", "dense"):
            clear(OUT / name)
        expected, uncut, trainer = fit(OUT / "uncut", plan, **kept)
        trainer.save_checkpoint(OUT / "uncut" / "ended.ckpt")
        with pytest.raises(PowerCutError):
            fit(OUT / "cut", plan, dies=5, **kept)
        found, callback, _ = fit(OUT / "cut", plan, resume="step=3.ckpt", **kept)
        assert_alike(found, expected, 0.0)
        assert callback.report.step == 7
        assert callback.noise == uncut.noise
        assert callback.noise.step == 6
        with pytest.raises(ValueError, match="written after the weights were cut"):
            fit(OUT / "uncut", plan, resume="ended.ckpt", steps=9, **kept)
        with pytest.raises(ValueError, match="total_steps: the state has 7, this run 9"):
            fit(OUT / "uncut", plan, resume="step=3.ckpt", steps=9, **kept)
        fit(OUT / "dense", None, **kept)
        for steps in (7, 6):  # 6: nothing is left to train
            with pytest.raises(ValueError, match=r"step=6.ckpt: holds no state of this callback"):
                fit(OUT / "dense", plan, resume="step=6.ckpt", steps=steps, **kept)
    clear(OUT / "cut")
    expected, _, _ = fit(OUT / "cut", plan, steps=6)
    found, callback, _ = fit(OUT / "cut", plan, steps=6, resume="step=6.ckpt")
    assert_alike(found, expected, 0.0)
    assert callback.report.step == 6


CHECKS: dict[str, Callable[[], None]] = {
    "copies": check_copies,  # before the others: accelerate does not forget that a process had FSDP
    "trainer": check_trainer,
    "language-model": check_language_model,
    "resumed-trainer": check_trainer_resumes,
    "parts": check_parts,
    "lightning": check_lightning,
    "resumed-lightning": check_lightning_resumes,
}


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    open_fsdp_on_cpus()
    for name in sys.argv[2:]:
        CHECKS[name]()
        if RANK == 0:
            print(name, "agrees", flush=True)
    dist.destroy_process_group()
