"""Inside Hugging Face's trainers and Lightning a sparse run gives the weights that a plain loop gives.

The plain loops here know torch and `nmflow.Sparsifier` only; what a pruned copy is, is computed block by block.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import re
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs
from safetensors.torch import load_file
from torch import nn

import nmflow
from nmflow.integrations.state import read_state, write_state

transformers = pytest.importorskip("transformers", reason="the trainer under test comes with the extra transformers")
from nmflow.integrations.transformers import STATE_FILE, sparsify  # noqa: E402  first the skip

needs_lightning = pytest.mark.skipif(
    importlib.util.find_spec("lightning") is None and importlib.util.find_spec("pytorch_lightning") is None,
    reason="Lightning is not installed: pip install 'nmflow[lightning]'",
)

STRONG = nmflow.recipe("sr-ste", sr_ste=3.0)
"""Its term outweighs the gradient, so that clipping it or not makes another run of it."""
BERT = {"ff": "1:8", "qk": "2:8"}
BERT_N = {"intermediate.dense": 1, "output.dense": 1, "query": 2, "key": 2}
T5 = {"ff": "1:8", "q": "1:4"}
STEPS, BATCH, EPSILON = 5, 4, 1e-3


# ---------------------------------------------------------------------------------------- models and data
def bert(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = transformers.BertForSequenceClassification(transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=8, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
        initializer_range=0.2,  # what is pruned is to be missed
    ))
    return model


def t5() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_decoder_layers=1, num_heads=2,
        dropout_rate=0.0, decoder_start_token_id=0,
    ))
    return model


def sentences(count: int = 64, labels: tuple[int, ...] = ()) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [
        {
            "input_ids": torch.randint(1, 32, (6,), generator=draw),
            "labels": torch.randint(0 if not labels else 1, 2 if not labels else 32, labels, generator=draw),
        }
        for _ in range(count)
    ]


class Collator:
    """Collates, and remembers what it gave, in order."""

    def __init__(self) -> None:
        self.batches: list[dict[str, torch.Tensor]] = []

    def __call__(self, items):
        batch = {key: torch.stack([item[key] for item in items]) for key in items[0]}
        self.batches.append({key: value.clone() for key, value in batch.items()})
        return batch


def arguments(folder: Path, seq2seq: bool = False, **changes):
    settings = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": BATCH, "learning_rate": 1e-2,
        "lr_scheduler_type": "constant", "weight_decay": 0.0, "adam_epsilon": EPSILON, "max_grad_norm": 0.1,
        "save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True, "logging_strategy": "no",
        **changes,
    }  # fmt: skip
    kind = transformers.Seq2SeqTrainingArguments if seq2seq else transformers.TrainingArguments
    return kind(**settings)


def trainer_of(folder: Path, model: nn.Module | None = None, kind=None, callbacks=(), **changes):
    return averaging((kind or transformers.Trainer)(
        model=bert() if model is None else model, args=arguments(folder, **changes), train_dataset=sentences(),
        eval_dataset=sentences(8), data_collator=Collator(), callbacks=list(callbacks),
    ))  # fmt: skip


def averaging(trainer):
    """Have the trainer take the mean over micro-batches, whatever it believes of the model's own loss."""
    trainer.model_accepts_loss_kwargs = False
    return trainer


# ---------------------------------------------------------------------------------------- what to believe
def plain_loop(model, targets, batches, accumulate, max_norm, recipe=STRONG, mask_every=1, steps=STEPS, loss_of=None):
    """The run as the README writes it. Micro-batches are of one size, so the mean of their means is the mean."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0, eps=EPSILON)
    sparsifier = nmflow.Sparsifier(model, targets, recipe, steps, mask_every=mask_every)
    model.train()
    for step in range(steps):
        for batch in batches[step * accumulate : (step + 1) * accumulate]:
            loss = model(**batch).loss if loss_of is None else loss_of(model, batch)
            (loss / accumulate).backward()
        sparsifier.edit_gradients()
        if max_norm:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad()
        sparsifier.step()
    sparsifier.finalize()
    return model


def assert_same(one: nn.Module, two: nn.Module, tolerance: float = 1e-6) -> None:
    mine, other = one.state_dict(), two.state_dict()
    assert list(mine) == list(other)
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def zero_count_is_right(weight: torch.Tensor, n: int) -> bool:
    """Whether every 8 inputs of every output hold at most n weights, counted one by one."""
    return all(
        sum(value != 0.0 for value in row[start : start + 8]) <= n
        for row in weight.tolist()
        for start in range(0, len(row), 8)
    )


def bert_weights_are_sparse(state: dict[str, torch.Tensor]) -> bool:
    checked = [
        zero_count_is_right(state[f"bert.encoder.layer.0.{name}.weight"], n)
        for name, n in {
            "intermediate.dense": 1, "output.dense": 1, "attention.self.query": 2, "attention.self.key": 2,
        }.items()
    ]  # fmt: skip
    return all(checked)


def pruned_bert(state: dict[str, torch.Tensor]) -> nn.Module:
    """An ordinary model of dense weights in which all but the largest of every 8 were put to zero by hand."""
    state = {name: tensor.clone() for name, tensor in state.items()}
    for name, tensor in state.items():
        end = next((end for end in BERT_N if name.endswith(f"{end}.weight") and "attention.output" not in name), None)
        if end is not None:
            for row in tensor:
                for start in range(0, len(row), 8):
                    block = row[start : start + 8]
                    ranked = sorted(range(8), key=lambda place: -abs(block[place].item()))
                    block[ranked[BERT_N[end] :]] = 0.0
    model = bert()
    model.load_state_dict(state)
    return model.eval()


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


class PowerCutError(Exception):
    """The end of a process, as far as a test in one process can have it."""


class DiesAfter(transformers.TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise PowerCutError


# ------------------------------------------------------------------------------------- Trainer: the same run
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("max_norm", [0.0, 0.1])
def test_trainer_gives_the_weights_of_a_plain_loop(tmp_path, accumulate, max_norm):
    trainer = trainer_of(tmp_path, gradient_accumulation_steps=accumulate, max_grad_norm=max_norm)
    callback = sparsify(trainer, BERT, STRONG)
    trainer.train()
    expected = plain_loop(bert(), BERT, trainer.data_collator.batches, accumulate, max_norm)
    assert_same(trainer.model, expected)
    assert nmflow.verify(trainer.model).ok
    assert callback.report.finalized
    assert not callback.report.early
    assert classes(trainer.model) == classes(bert())


def test_the_recipe_follows_optimizer_steps_not_batches(tmp_path):
    trainer = trainer_of(tmp_path, gradient_accumulation_steps=3)
    sparsify(trainer, BERT, "mdgf-linear", mask_every=2)
    trainer.train()
    batches = trainer.data_collator.batches
    assert_same(trainer.model, plain_loop(bert(), BERT, batches, 3, 0.1, "mdgf-linear", mask_every=2))


@pytest.mark.parametrize(("accumulate", "max_norm"), [(1, 0.1), (3, 0.0)])
def test_seq2seq_trainer_gives_the_weights_of_a_plain_loop(tmp_path, accumulate, max_norm):
    trainer = averaging(transformers.Seq2SeqTrainer(
        model=t5(), train_dataset=sentences(labels=(5,)), data_collator=Collator(), eval_dataset=sentences(3, (5,)),
        args=arguments(
            tmp_path, seq2seq=True, gradient_accumulation_steps=accumulate, max_grad_norm=max_norm,
            predict_with_generate=True, generation_max_length=4, eval_strategy="steps", eval_steps=3,
        ),
    ))  # fmt: skip
    sparsify(trainer, T5, STRONG)
    trainer.train()
    batches = [batch for batch in trainer.data_collator.batches if len(batch["labels"]) == BATCH]
    expected = plain_loop(t5(), T5, batches, accumulate, max_norm)
    assert_same(trainer.model, expected)
    assert nmflow.verify(trainer.model).ok


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("max_norm", [0.0, 0.1])
def test_a_loss_scale_does_not_change_the_run(tmp_path, accumulate, max_norm):
    """fp16's scaler on a CPU, with the casting left out: scaling by a power of two is exact, so nothing may change."""
    trainer = trainer_of(tmp_path, gradient_accumulation_steps=accumulate, max_grad_norm=max_norm)
    accelerator: Accelerator = trainer.accelerator
    accelerator.state._mixed_precision = "fp16"
    accelerator.native_amp = True
    accelerator.autocast_handler = AutocastKwargs(enabled=False)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    unscaled: list[int] = []
    unscale = accelerator.scaler.unscale_
    accelerator.scaler.unscale_ = lambda optimizer: (unscaled.append(0), unscale(optimizer))[1]
    try:
        sparsify(trainer, BERT, STRONG)
        trainer.train()
    finally:
        accelerator.state._mixed_precision = "no"
    assert len(unscaled) == STEPS
    assert_same(trainer.model, plain_loop(bert(), BERT, trainer.data_collator.batches, accumulate, max_norm))


def test_the_comparison_can_fail(tmp_path):
    """Put SR-STE's term after clipping, or leave it out: the weights of the plain loop are not met."""
    trainer = trainer_of(tmp_path)
    callback = sparsify(trainer, BERT, STRONG)
    callback._hook = lambda accelerator: None
    with pytest.raises(RuntimeError, match=r"clipped before SR-STE's term was added.*clip_grad_norm_"):
        trainer.train()

    class TooLate(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            mine.sparsifier.edit_gradients()
            mine._edited = False

    for callbacks in ((), (TooLate(),)):
        trainer = trainer_of(tmp_path, callbacks=callbacks)
        mine = sparsify(trainer, BERT, STRONG)
        mine._hook = lambda accelerator: None
        mine.on_pre_optimizer_step = lambda *args, **kwargs: None
        trainer.train()
        expected = plain_loop(bert(), BERT, trainer.data_collator.batches, 1, 0.1)
        with pytest.raises(AssertionError):
            assert_same(trainer.model, expected, tolerance=1e-3)


def test_the_term_is_added_where_a_release_neither_clips_nor_unscales(tmp_path):
    """transformers 4 asks for no norm at max_grad_norm=0; then the last moment before the optimizer is the one."""

    class Older(transformers.Trainer):
        def _get_grad_norm(self, model, grad_norm=None):
            return grad_norm

    trainer = trainer_of(tmp_path, kind=Older, max_grad_norm=0.0)
    sparsify(trainer, BERT, STRONG)
    trainer.train()
    assert_same(trainer.model, plain_loop(bert(), BERT, trainer.data_collator.batches, 1, 0.0))


def test_a_trainer_that_clips_behind_our_back_is_stopped(tmp_path):
    def own(folder):
        trainer = trainer_of(folder)
        trainer.accelerator.clip_grad_norm_ = nn.utils.clip_grad_norm_
        return trainer

    trainer = own(tmp_path)
    sparsify(trainer, BERT, STRONG)
    with pytest.raises(RuntimeError, match="clipped before SR-STE's term"):
        trainer.train()
    trainer = own(tmp_path)
    sparsify(trainer, BERT, "mdgf-exponential")  # has no such term, so nothing can come too late
    trainer.train()
    assert nmflow.verify(trainer.model).ok


def test_a_model_that_came_compiled_is_made_sparse_inside(tmp_path):
    trainer = trainer_of(tmp_path, torch.compile(bert(), backend="eager"), remove_unused_columns=False)
    callback = sparsify(trainer, {"bert.encoder.layer.0.output.dense.weight": "1:8"}, STRONG)
    trainer.train()
    assert callback.report.density == 0.125


def test_compiled_training_gives_the_same_weights(tmp_path):
    trainer = trainer_of(tmp_path, torch_compile=True, torch_compile_backend="aot_eager", eval_strategy="steps",
                         eval_steps=2)  # fmt: skip
    sparsify(trainer, BERT, STRONG)
    trainer.train()
    batches = [batch for batch in trainer.data_collator.batches if len(batch["labels"]) == BATCH]
    assert_same(trainer.model, plain_loop(bert(), BERT, batches, 1, 0.1), tolerance=1e-5)
    after = trainer.evaluate()["eval_loss"]
    assert after == pytest.approx(mean_loss(trainer.model, sentences(8)), abs=1e-5)


# ---------------------------------------------------------------------------------------- Trainer: resuming
def run(folder, callbacks=(), resume=None, recipe="mdgf-exponential", mask_every=1, accumulate=1, **changes):
    model = bert(dropout=0.1)
    trainer = trainer_of(
        folder, model, callbacks=callbacks, gradient_accumulation_steps=accumulate, max_steps=7, save_strategy="steps",
        save_steps=3, **changes,
    )  # fmt: skip
    callback = sparsify(trainer, BERT, recipe, mask_every=mask_every)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, callback


@pytest.mark.parametrize(
    ("recipe", "mask_every", "accumulate"),
    [("mdgf-exponential", 2, 1), (STRONG, 1, 3), ("idp", 1, 1)],
    ids=str,
)
def test_a_killed_trainer_goes_on_to_the_same_bits(tmp_path, recipe, mask_every, accumulate):
    settings = {"recipe": recipe, "mask_every": mask_every, "accumulate": accumulate}
    whole, _ = run(tmp_path / "whole", **settings)
    with pytest.raises(PowerCutError):
        run(tmp_path / "cut", [DiesAfter(5)], **settings)
    assert read_state(tmp_path / "cut" / "checkpoint-3" / STATE_FILE)["step"] == 3
    again, callback = run(tmp_path / "cut", resume=True, **settings)
    assert_same(again.model, whole.model, tolerance=0.0)
    assert callback.report.step == 7


def test_the_same_trainer_goes_on_after_an_interruption(tmp_path):
    """As in a notebook: the model still carries the sparsifier of the broken run."""
    whole, _ = run(tmp_path / "whole", mask_every=2)
    death = DiesAfter(5)
    trainer = trainer_of(tmp_path / "cut", bert(0.1), callbacks=[death], max_steps=7, save_strategy="steps",
                         save_steps=3)  # fmt: skip
    sparsify(trainer, BERT, mask_every=2)
    with pytest.raises(PowerCutError):
        trainer.train()
    assert "unscale_gradients" not in vars(trainer.accelerator)
    death.step = 0
    trainer.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    assert_same(trainer.model, whole.model, tolerance=0.0)


def test_a_checkpoint_without_the_state_is_refused_before_its_weights_are_loaded(tmp_path):
    run(tmp_path)
    (tmp_path / "checkpoint-3" / STATE_FILE).unlink()
    trainer = trainer_of(tmp_path, max_steps=7)
    before, names = copy.deepcopy(trainer.model.state_dict()), classes(trainer.model)
    sparsify(trainer, BERT)
    with pytest.raises(ValueError, match=rf"checkpoint-3: has no {STATE_FILE}"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert classes(trainer.model) == names
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())


@pytest.mark.parametrize(
    ("plan", "changes", "message"),
    [
        ({"targets": {"ff": "1:4"}}, {}, "slots: the state has"),
        ({"targets": BERT, "recipe": "ste"}, {}, "recipe: the state has"),
        ({"targets": BERT}, {"max_steps": 9}, "total_steps: the state has 7, this run 9"),
    ],
)
def test_the_checkpoint_of_another_plan_is_refused(tmp_path, plan, changes, message):
    run(tmp_path)
    trainer = trainer_of(tmp_path, **{"max_steps": 7, **changes})
    names = classes(trainer.model)
    sparsify(trainer, **plan)
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert classes(trainer.model) == names


def test_states_survive_the_file_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "state"
    state = {"step": 3, "slots": [["a", 1]], "masks": {"a.weight[0:2]": torch.tensor([1, 255], dtype=torch.uint8)}}
    write_state(path, state)
    again = read_state(path)
    assert torch.equal(again["masks"].pop("a.weight[0:2]"), state["masks"].pop("a.weight[0:2]"))
    assert again == state
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="cut short"):
        read_state(path)
    nmflow.runtime.save_model(nn.Linear(2, 2), path)
    with pytest.raises(ValueError, match="not the state of a sparsifier"):
        read_state(path)
    with pytest.raises(FileNotFoundError):
        read_state(tmp_path / "nothing")


# ------------------------------------------------------------------------- Trainer: what comes out, and is seen
def test_the_saved_folder_loads_with_sparse_weights(tmp_path):
    trainer = trainer_of(tmp_path, save_strategy="steps", save_steps=2)
    sparsify(trainer, BERT)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    loaded = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "final")
    assert_same(loaded, trainer.model, tolerance=0.0)
    assert bert_weights_are_sparse(loaded.state_dict())
    assert nmflow.verify(loaded, BERT).ok
    checkpoint = load_file(tmp_path / f"checkpoint-{STEPS - 1}" / "model.safetensors")
    assert not bert_weights_are_sparse(checkpoint)  # a checkpoint is for resuming, and dense
    assert set(checkpoint) == set(load_file(tmp_path / "final" / "model.safetensors"))


@torch.no_grad()
def mean_loss(model: nn.Module, items) -> float:
    batch = {key: torch.stack([item[key] for item in items]) for key in items[0]}
    return float(model.eval()(**batch).loss)


def test_evaluation_while_training_sees_the_sparse_weights(tmp_path):
    class Records(transformers.TrainerCallback):
        seen: list[tuple[dict[str, torch.Tensor], float]]

        def on_evaluate(self, args, state, control, metrics, model, **kwargs):
            self.seen.append((copy.deepcopy(model.state_dict()), metrics["eval_loss"]))

    records = Records()
    records.seen = []
    trainer = trainer_of(tmp_path, callbacks=[records], eval_strategy="steps", eval_steps=2)
    sparsify(trainer, BERT, "sr-ste")
    trainer.train()
    assert len(records.seen) >= 2
    for state, loss in records.seen:
        assert loss == pytest.approx(mean_loss(pruned_bert(state), sentences(8)), abs=1e-6)
        dense = bert()
        dense.load_state_dict(state)
        assert loss != pytest.approx(mean_loss(dense, sentences(8)), abs=1e-4)


def test_stopping_early_cuts_the_weights_and_says_so(tmp_path):
    class Stops(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    trainer = trainer_of(tmp_path, callbacks=[Stops()])
    callback = sparsify(trainer, BERT)
    with pytest.warns(UserWarning, match="training stopped at step 2 of 5"):
        trainer.train()
    assert callback.report.early
    assert bert_weights_are_sparse(trainer.model.state_dict())


def test_epochs_are_counted_in_optimizer_steps(tmp_path):
    trainer = trainer_of(tmp_path, max_steps=-1, num_train_epochs=2, gradient_accumulation_steps=3)
    callback = sparsify(trainer, BERT)
    trainer.train()
    assert callback.report.total_steps == callback.report.step == 12  # 16 batches an epoch, 6 steps of 3 or fewer
    assert bert_weights_are_sparse(trainer.model.state_dict())


# ---------------------------------------------------------------------------------------- Trainer: refusals
@pytest.mark.parametrize(
    ("change", "recipe", "message"),
    [
        (lambda t: setattr(t.args, "load_best_model_at_end", True), "ste", "load_best_model_at_end: would put back"),
        (lambda t: setattr(t, "is_deepspeed_enabled", True), "ste", "DeepSpeed"),
        (lambda t: setattr(t, "is_fsdp_enabled", True), "ste", "FSDP: shards"),
        (lambda t: setattr(t.args, "_n_gpu", 2), "ste", "DataParallel"),
        (lambda t: setattr(t.model, "peft_config", {"default": 1}), "ste", "PEFT"),
        (lambda t: setattr(t.args, "optim", "galore_adamw_layerwise"), "ste", "optim=galore_adamw_layerwise"),
        (lambda t: None, "snip", 'recipe "snip": scores weights'),
    ],
)
@pytest.mark.parametrize("late", [False, True])
def test_what_cannot_be_carried_is_refused_and_nothing_changed(tmp_path, change, recipe, message, late):
    trainer = trainer_of(tmp_path)
    names = classes(trainer.model)
    if late and recipe == "ste":
        sparsify(trainer, BERT, recipe)
        change(trainer)
        with pytest.raises(ValueError, match=message):
            trainer.train()
    else:
        change(trainer)
        with pytest.raises(ValueError, match=message):
            sparsify(trainer, BERT, recipe)
        assert "train" not in vars(trainer)
    assert classes(trainer.model) == names


def test_all_reasons_are_told_at_once(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.args.load_best_model_at_end = trainer.is_deepspeed_enabled = True
    with pytest.raises(ValueError, match=r"(?s)load_best_model_at_end.*\nDeepSpeed.*\nrecipe .snip"):
        sparsify(trainer, BERT, "snip")


def test_rules_that_match_nothing_are_refused_at_once(tmp_path):
    trainer = trainer_of(tmp_path)
    with pytest.raises(ValueError, match="nothing_here"):
        sparsify(trainer, {"nothing_here": "1:8"})
    assert "train" not in vars(trainer)


def test_a_run_without_steps_is_refused(tmp_path):
    trainer = trainer_of(tmp_path, max_steps=-1, num_train_epochs=0)
    names = classes(trainer.model)
    sparsify(trainer, BERT)
    with pytest.raises(ValueError, match="0 optimizer steps"):
        trainer.train()
    assert classes(trainer.model) == names


def test_training_twice(tmp_path):
    """A finished model is not trained again by accident; on purpose it is, and ends N:M again."""
    trainer = trainer_of(tmp_path)
    first = sparsify(trainer, BERT)
    with pytest.raises(ValueError, match="sparsified already"):
        sparsify(trainer, BERT)
    trainer.train()
    done = copy.deepcopy(trainer.model.state_dict())
    with pytest.raises(ValueError, match="trained to N:M already"):
        trainer.train()
    assert all(torch.equal(tensor, done[name]) for name, tensor in trainer.model.state_dict().items())
    second = sparsify(trainer, BERT, "ste")
    assert first not in trainer.callback_handler.callbacks
    trainer.train()
    assert second.report is not None
    assert bert_weights_are_sparse(trainer.model.state_dict())
    second.leave()
    assert "train" not in vars(trainer)
    assert second not in trainer.callback_handler.callbacks


def test_a_trainer_that_makes_its_model_anew_trains_as_often_as_asked(tmp_path):
    trainer = transformers.Trainer(
        model_init=lambda: bert(), args=arguments(tmp_path), train_dataset=sentences(), data_collator=Collator()
    )
    callback = sparsify(trainer, BERT)
    trainer.train()
    first = copy.deepcopy(trainer.model)
    trainer.train()
    assert callback.report.step == STEPS
    assert_same(trainer.model, first, tolerance=0.0)


# ---------------------------------------------------------------------------------------------- Lightning
NET = {"net.0.weight": "1:8", "net.2.weight": "2:8"}


def vectors() -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(2)
    return [
        (torch.randn(4, 16, generator=draw), torch.randint(0, 3, (4,), generator=draw)) for _ in range(STEPS * 3)
    ]


def lightning_module(dropout: float = 0.0, optimizers: int = 1, manual: bool = False, by_step: bool = False):
    """`by_step`: batch and random state follow from the step, since Lightning's checkpoints keep neither."""
    from nmflow.integrations.lightning import _package

    class Module(_package().LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(
                nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16), nn.Dropout(dropout), nn.GELU(), nn.Linear(16, 3)
            )
            self.automatic_optimization = not manual
            self.validated: list[tuple[dict[str, torch.Tensor], torch.Tensor]] = []

        def training_step(self, batch, index):
            return self.loss(vectors()[self.global_step] if by_step else batch)

        def validation_step(self, batch, index):
            self.validated.append((copy.deepcopy(self.state_dict()), self.loss(batch)))

        def loss(self, batch):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            made = [
                torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.0, eps=EPSILON) for _ in range(optimizers)
            ]
            return made[0] if optimizers == 1 else made

        def on_train_batch_start(self, batch, index):
            torch.manual_seed(self.global_step)

    return Module()


def lightning_trainer(folder: Path, *callbacks, **changes):
    from nmflow.integrations.lightning import _package

    settings = {
        "accelerator": "cpu", "devices": 1, "max_epochs": 1, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "default_root_dir": folder, "callbacks": list(callbacks),
        "enable_checkpointing": False, "limit_val_batches": 0, **changes,
    }  # fmt: skip
    return _package().Trainer(**settings)


def loader(batches):
    return torch.utils.data.DataLoader(batches, batch_size=None, shuffle=False)


@needs_lightning
@pytest.mark.filterwarnings("ignore")
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
    callback = SparsityCallback(NET, STRONG)
    trainer = lightning_trainer(
        tmp_path, callback, accumulate_grad_batches=accumulate, gradient_clip_val=max_norm, **changes
    )
    module = lightning_module()
    trainer.fit(module, loader(batches))
    expected = plain_loop(lightning_module(), NET, batches, accumulate, max_norm, loss_of=lambda m, b: m.loss(b))
    assert_same(module, expected)
    assert callback.report.step == callback.report.total_steps == STEPS
    assert nmflow.verify(module).ok
    assert zero_count_is_right(module.net[0].weight, 1)
    assert zero_count_is_right(module.net[2].weight, 2)


@needs_lightning
@pytest.mark.filterwarnings("ignore")
def test_the_recipe_follows_lightnings_optimizer_steps_not_batches(tmp_path):
    from nmflow.integrations.lightning import SparsityCallback

    module, batches = lightning_module(), vectors()
    callback = SparsityCallback(NET, "mdgf-linear", mask_every=2)
    lightning_trainer(tmp_path, callback, accumulate_grad_batches=3).fit(module, loader(batches))
    expected = plain_loop(lightning_module(), NET, batches, 3, 0.0, "mdgf-linear", 2, loss_of=lambda m, b: m.loss(b))
    assert_same(module, expected)


@needs_lightning
@pytest.mark.filterwarnings("ignore")
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


def fit_lightning(folder, mask_every=1, recipe="mdgf-exponential", dies=0, resume=None, max_steps=7):
    from nmflow.integrations.lightning import SparsityCallback, _package

    class Dies(_package().Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == dies:
                raise PowerCutError

    checkpoints = importlib.import_module(f"{_package().__name__}.callbacks").ModelCheckpoint
    keep = checkpoints(dirpath=folder, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    callback = SparsityCallback(NET, recipe, mask_every=mask_every)
    trainer = lightning_trainer(folder, callback, Dies(), keep, enable_checkpointing=True, max_steps=max_steps,
                                max_epochs=3)  # fmt: skip
    module = lightning_module(dropout=0.2, by_step=True)
    trainer.fit(module, loader(vectors()), ckpt_path=resume)
    return module, callback, trainer


@needs_lightning
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("recipe", "mask_every"), [("mdgf-exponential", 2), (STRONG, 1), ("idp", 1)], ids=str)
def test_a_killed_lightning_run_goes_on_to_the_same_bits(tmp_path, recipe, mask_every):
    whole, _, _ = fit_lightning(tmp_path / "whole", mask_every, recipe)
    with pytest.raises(PowerCutError):
        fit_lightning(tmp_path / "cut", mask_every, recipe, dies=5)
    again, callback, _ = fit_lightning(tmp_path / "cut", mask_every, recipe, resume=tmp_path / "cut" / "step=3.ckpt")
    assert_same(again, whole, tolerance=0.0)
    assert callback.report.step == 7


@needs_lightning
@pytest.mark.filterwarnings("ignore")
def test_resuming_lightning_where_nothing_is_left_to_train_ends_sparse(tmp_path):
    whole, _, _ = fit_lightning(tmp_path, max_steps=6)
    again, callback, _ = fit_lightning(tmp_path, max_steps=6, resume=tmp_path / "step=6.ckpt")
    assert_same(again, whole, tolerance=0.0)
    assert callback.report.step == 6


@needs_lightning
@pytest.mark.filterwarnings("ignore")
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


@needs_lightning
@pytest.mark.filterwarnings("ignore")
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


@needs_lightning
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("module", "changes", "recipe", "message"),
    [
        ({"optimizers": 2, "manual": True}, {}, "ste", r"(?s)manual optimization.*2 optimizers"),
        ({}, {"max_epochs": -1}, "ste", "the trainer expects inf optimizer steps"),
        ({}, {"averages": True}, "ste", "StochasticWeightAveraging: would put an average"),
        ({}, {"schedules": True}, "ste", "GradientAccumulationScheduler"),
        ({}, {"strategy_name": "FSDPStrategy"}, "ste", "FSDPStrategy: shards"),
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


@needs_lightning
def test_the_callback_is_lightnings_own_and_can_be_pickled():
    import pickle

    from nmflow.integrations import lightning

    callback = lightning.SparsityCallback(NET, STRONG)
    assert isinstance(callback, lightning._package().Callback)
    assert type(pickle.loads(pickle.dumps(callback))) is lightning.SparsityCallback
    with pytest.raises(AttributeError, match="no attribute 'Sparsity'"):
        lightning.Sparsity  # noqa: B018  wrong on purpose


# ------------------------------------------------------------------------------------------- docs/trainers.md
def snippets() -> list[str]:
    page = (Path(__file__).parents[2] / "docs" / "trainers.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)


def test_the_snippets_for_hugging_face_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer, seq2seq = snippets()[:2]
    made = {"train": sentences(), "test": sentences(8), "nmflow": nmflow}
    exec(trainer.replace("1:16", "1:8"), {
        **made, "Trainer": functools.partial(transformers.Trainer, data_collator=Collator()),
        "model": bert(), "args": arguments(tmp_path),
    })  # fmt: skip
    assert bert_weights_are_sparse(load_file(tmp_path / "final" / "model.safetensors"))  # 1:4 is 2:8 as well
    exec(seq2seq, {
        **made, "train": sentences(labels=(5,)),
        "Seq2SeqTrainer": functools.partial(transformers.Seq2SeqTrainer, data_collator=Collator()),
        "t5": t5(), "seq2seq_args": arguments(tmp_path, seq2seq=True),
    })  # fmt: skip
    loaded = transformers.T5ForConditionalGeneration.from_pretrained("final")
    assert nmflow.verify(loaded, {"ff": "1:8", "qkv": "1:4"}).ok


@needs_lightning
@pytest.mark.filterwarnings("ignore")
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


def test_the_snippets_for_torch_and_accelerate_agree():
    results = []
    for code in snippets()[3:5]:
        model = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        torch.manual_seed(0)
        for parameter in model.parameters():
            nn.init.uniform_(parameter)
        draw = torch.Generator().manual_seed(3)
        batches = [torch.randn(2, 3, 16, generator=draw) for _ in range(4)]
        exec(code, {
            "nmflow": nmflow, "torch": torch, "model": model, "steps": 4, "batches": batches, "loader": batches,
            "optimizer": torch.optim.AdamW(model.parameters()), "accelerator": Accelerator(cpu=True),
            "loss": lambda model, batch: model(batch).square().mean(),
        })  # fmt: skip
        assert nmflow.verify(model).ok
        results.append(model)
    assert_same(*results, tolerance=0.0)
