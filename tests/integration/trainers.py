"""Small models and data for other people's trainers, and the plain loop that their runs are compared with.

The plain loop knows torch and `nmflow.Sparsifier` only; what a pruned copy is, is computed block by block, and gradient
noise by torch's own variance.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import nmflow

STRONG = nmflow.recipe("sr-ste", sr_ste=3.0)
"""Its term outweighs the gradient, so that clipping it or not makes another run of it."""
BERT = {"ff": "1:8", "qk": "2:8"}
BERT_N = {"intermediate.dense": 1, "output.dense": 1, "query": 2, "key": 2}
T5 = {"ff": "1:8", "q": "1:4"}
STEPS, BATCH, EPSILON = 5, 4, 1e-3


# ---------------------------------------------------------------------------------------- models and data
def bert(dropout: float = 0.0) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    model: nn.Module = transformers.BertForSequenceClassification(transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=8, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
        initializer_range=0.2,  # what is pruned is to be missed
    ))
    return model


def t5() -> nn.Module:
    import transformers

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
    import transformers

    settings = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": BATCH, "learning_rate": 1e-2,
        "lr_scheduler_type": "constant", "weight_decay": 0.0, "adam_epsilon": EPSILON, "max_grad_norm": 0.1,
        "save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True, "logging_strategy": "no",
        **changes,
    }  # fmt: skip
    kind = transformers.Seq2SeqTrainingArguments if seq2seq else transformers.TrainingArguments
    return kind(**settings)


def trainer_of(folder: Path, model: nn.Module | None = None, kind=None, callbacks=(), labels=(), **changes):
    import transformers

    return averaging((kind or transformers.Trainer)(
        model=bert() if model is None else model, args=arguments(folder, **changes),
        train_dataset=sentences(labels=labels), eval_dataset=sentences(8, labels), data_collator=Collator(),
        callbacks=list(callbacks),
    ))  # fmt: skip


def averaging(trainer):
    """Have the trainer take the mean over micro-batches, whatever it believes of the model's own loss."""
    trainer.model_accepts_loss_kwargs = False
    return trainer


# ---------------------------------------------------------------------------------------- what to believe
def plain_loop(model, targets, batches, accumulate, max_norm, recipe=STRONG, mask_every=1, steps=STEPS, loss_of=None,
               looks=None):  # fmt: skip
    """The run as the README writes it. Micro-batches are of one size, so the mean of their means is the mean.

    `looks` is filled with the gradient noise of each step.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0, eps=EPSILON)
    sparsifier = nmflow.Sparsifier(model, targets, recipe, steps, mask_every=mask_every)
    model.train()
    for step in range(steps):
        for batch in batches[step * accumulate : (step + 1) * accumulate]:
            loss = model(**batch).loss if loss_of is None else loss_of(model, batch)
            (loss / accumulate).backward()
        sparsifier.edit_gradients()
        before = noise_of(model, sparsifier, optimizer) if looks is not None else None
        if max_norm:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad()
        sparsifier.step()
        if looks is not None:
            gradients, _, masks = before
            _, moments, now = noise_of(model, sparsifier, optimizer)
            looks.append({
                "grad_abs_var": gradients.abs().var(correction=0).item(),
                "second_moment_var": moments.var(correction=0).item(),
                "flip_rate": (masks != now).float().mean().item(),
            })
    sparsifier.finalize()
    return model


def noise_of(model, sparsifier, optimizer) -> list[torch.Tensor]:
    """Gradients, Adam's second moments and masks of all sparse weights, each as one vector; of recipes that prune."""
    weights = [sparsifier.dense_weight(slot.label) for slot in sparsifier.slots]
    sparse = [model.get_submodule(slot.label.rpartition(".")[0]).weight for slot in sparsifier.slots]
    none = torch.zeros(())
    moments = [optimizer.state.get(weight, {}).get("exp_avg_sq", none) for weight in weights]
    gradients = [none if weight.grad is None else weight.grad for weight in weights]
    return [
        torch.cat([tensor.detach().double().flatten() for tensor in tensors])
        for tensors in (gradients, moments, [weight != 0 for weight in sparse])
    ]


def assert_same_noise(noise, looks, every: int, tolerance: float = 1e-4) -> None:
    """The latest look of a run that looked every so many steps, at most ten times, so that averages are plain means."""
    due = [look for step, look in enumerate(looks, 1) if step % every == 0]
    assert noise.step == len(looks) // every * every
    for name, value in due[-1].items():
        assert getattr(noise.pooled, name) == pytest.approx(value, rel=tolerance), name
        mean = sum(look[name] for look in due) / len(due)
        assert getattr(noise.pooled, f"{name}_average") == pytest.approx(mean, rel=tolerance), name


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


# ------------------------------------------------------------------------------------------- docs/trainers.md
def snippets() -> list[str]:
    page = (Path(__file__).parents[2] / "docs" / "trainers.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
