"""Inside Hugging Face's trainers a sparse run gives the weights that a plain loop gives; the docs' snippets run."""

from __future__ import annotations

import copy
import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy
from trainers import (
    BATCH,
    BERT,
    STEPS,
    STRONG,
    T5,
    Collator,
    PowerCutError,
    arguments,
    assert_same,
    assert_same_noise,
    averaging,
    bert,
    bert_weights_are_sparse,
    classes,
    plain_loop,
    pruned_bert,
    sentences,
    snippets,
    t5,
    trainer_of,
)

import nmflow
from nmflow.integrations.state import read_state, write_state

transformers = pytest.importorskip("transformers", reason="the trainer under test comes with the extra transformers")
from nmflow.integrations.transformers import STATE_FILE, sparsify  # noqa: E402  first the skip


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
def run(folder, callbacks=(), resume=None, recipe="mdgf-exponential", mask_every=1, accumulate=1, probe_every=None,
        **changes):  # fmt: skip
    model = bert(dropout=0.1)
    trainer = trainer_of(
        folder, model, callbacks=callbacks, gradient_accumulation_steps=accumulate, max_steps=7, save_strategy="steps",
        save_steps=3, **changes,
    )  # fmt: skip
    callback = sparsify(trainer, BERT, recipe, mask_every=mask_every, probe_every=probe_every)
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
    save_file({"a": torch.zeros(1)}, path, {"nmflow": "[" * 100_000})
    with pytest.raises(ValueError, match="no state of a sparsifier"):
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


class Sees(transformers.TrainerCallback):
    """What loggers are given, and what is counted of the weights at the same steps."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.counted: list[float] = []
        self.ours: Any = None

    def on_step_end(self, args, state, control, **kwargs):
        self.counted.append(self.ours.sparsifier.report().density)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.lines.append(dict(logs))


def test_log_lines_say_where_the_recipe_stands(tmp_path):
    sees = Sees()
    trainer = trainer_of(tmp_path, callbacks=[sees], max_steps=10, logging_strategy="steps", logging_steps=1,
                         eval_strategy="steps", eval_steps=5)  # fmt: skip
    sees.ours = sparsify(trainer, BERT, nmflow.recipe("mdgf-linear", dense=0.2, decay_end=0.6))
    trainer.train()
    lines = [line for line in sees.lines if "loss" in line]
    assert [line["nm_decay"] for line in lines] == pytest.approx([1, 1, 0.75, 0.5, 0.25, 0, 0, 0, 0, 0])
    assert [line["nm_density"] for line in lines] == pytest.approx(sees.counted)
    assert lines[-1]["nm_density"] == pytest.approx((1024 / 8 + 512 * 2 / 8) / (1024 + 512))  # FF layers, Q and K
    assert not any("nm_decay" in line for line in sees.lines if "loss" not in line)  # evaluations, the summary
    assert [line["nm_decay"] for line in trainer.state.log_history if "loss" in line] == [
        line["nm_decay"] for line in lines
    ]


@pytest.mark.parametrize(("recipe", "max_norm"), [(STRONG, 0.0), (STRONG, 0.1), ("ste", 0.1)], ids=str)
def test_gradient_noise_is_that_of_a_plain_loop(tmp_path, recipe, max_norm):
    """With SR-STE's term, before clipping, of all micro-batches together."""
    sees = Sees()
    trainer = trainer_of(tmp_path, callbacks=[sees], gradient_accumulation_steps=3, max_grad_norm=max_norm,
                         logging_strategy="steps", logging_steps=1)  # fmt: skip
    callback = sees.ours = sparsify(trainer, BERT, recipe, probe_every=2)
    trainer.train()
    looks = []
    expected = plain_loop(bert(), BERT, trainer.data_collator.batches, 3, max_norm, recipe, looks=looks)
    assert_same(trainer.model, expected)  # looking changes nothing
    assert_same_noise(callback.noise, looks, 2)
    assert any(look["flip_rate"] for look in looks[1::2]) == (recipe == "ste")  # the term holds the others down
    assert set(callback.noise.layers) == {slot.label for slot in callback.sparsifier.slots}
    names = sorted(name for name in sees.lines[1] if name.startswith("nm_") and name not in ("nm_decay", "nm_density"))
    assert names == sorted(f"nm_{name}{end}" for name in looks[0] for end in ("", "_average"))
    for line, look in zip(sees.lines, (None, looks[1], looks[1], looks[3], looks[3]), strict=False):
        for name in looks[0]:
            assert line.get(f"nm_{name}") == (look and pytest.approx(look[name], rel=1e-4))


def test_a_killed_trainer_that_was_probed_goes_on_to_the_same_averages(tmp_path):
    _, whole = run(tmp_path / "whole", probe_every=2)
    with pytest.raises(PowerCutError):
        run(tmp_path / "cut", [DiesAfter(5)], probe_every=2)
    _, again = run(tmp_path / "cut", resume=True, probe_every=2)
    assert again.noise == whole.noise
    assert whole.noise.step == 6


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (None, 2, "the run was not probed; leave out probe_every"),
        (2, None, "the run was probed; give it probe_every=2 again"),
        (2, 3, "probe: every: the state has 2, this probe 3"),
    ],
)
def test_the_checkpoint_of_a_run_that_was_probed_otherwise_is_refused(tmp_path, before, after, message):
    run(tmp_path, probe_every=before)
    trainer = trainer_of(tmp_path, max_steps=7)
    names = classes(trainer.model)
    sparsify(trainer, BERT, probe_every=after)
    with pytest.raises(ValueError, match=rf"{STATE_FILE}: {message}"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert classes(trainer.model) == names


def test_a_probe_without_second_moments_is_refused_before_training(tmp_path):
    trainer = trainer_of(tmp_path, optim="sgd")
    names = classes(trainer.model)
    sparsify(trainer, BERT, probe_every=2)
    with pytest.raises(ValueError, match="SGD keeps no second moment"):
        trainer.train()
    assert classes(trainer.model) == names


# ---------------------------------------------------------------------------------------- Trainer: refusals
def spread(trainer, version: int, cpu_offload: Any = None, precision: str = "no") -> None:
    """Have the trainer believe that FSDP is on, which it asks accelerate."""
    trainer.is_fsdp_enabled = True
    plugin = SimpleNamespace(fsdp_version=version, cpu_offload=cpu_offload)
    trainer.accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision=precision, unwrap_model=lambda model, **_: model
    )


@pytest.mark.parametrize(
    ("change", "recipe", "message"),
    [
        (lambda t: setattr(t.args, "load_best_model_at_end", True), "ste", "load_best_model_at_end: would put back"),
        (lambda t: setattr(t, "is_deepspeed_enabled", True), "ste", "DeepSpeed"),
        (lambda t: spread(t, 1), "ste", "FSDP1: flattens"),
        (lambda t: spread(t, 2, cpu_offload=CPUOffloadPolicy()), "ste", "FSDP2 with CPU offloading"),
        (lambda t: spread(t, 2, precision="fp16"), "ste", "fp16 under FSDP2"),
        (lambda t: setattr(t, "is_fsdp_xla_enabled", True), "ste", "FSDP of torch_xla"),
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


# ------------------------------------------------------------------------------------------- docs/trainers.md
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
