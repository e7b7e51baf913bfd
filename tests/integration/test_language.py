"""Networks of transformers from files to files: an encoder fine-tuned on GLUE, language models and translators that
speak when compressed."""

from __future__ import annotations

import functools
import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from language import bert_folder, glue_folder, pairs_config, sentence
from safetensors.torch import load_file, save_file
from small_runs import assert_same_bits, one_run, start

from nmflow.models import build_model
from nmflow.report.folder import RunFolder, read_metrics
from nmflow.report.plots import training_figure
from nmflow.report.tables import PlannedRun, read_cells, result_lines, table_lines
from nmflow.runtime import load_compressed, verify
from nmflow.train import train
from nmflow.train.config import TrainConfig
from nmflow.train.config_sections import DataConfig, ModelConfig
from nmflow.train.data import Data, load_data
from nmflow.train.loop import evaluate, prepare, take_step

pytest.importorskip("transformers", reason="the encoder comes from transformers, which is an extra")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bert_folder(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("glue")
    for task in ("SST-2", "MRPC", "STS-B", "MNLI"):
        glue_folder(root, task, train=200, test=60)
    return root


def config(tasks: Path, bert: Path, task: str = "SST-2", **changes: Any) -> TrainConfig:
    return TrainConfig(
        **{
            "data": f"glue:{tasks / task}", "model": f"transformers:{bert}", "pattern": "1:8", "steps": 40, "batch": 16,
            "optim": {"lr": 1e-2}, "eval_every": 20, "checkpoint_every": 15, "baseline": False, **changes,
        }
    )  # fmt: skip


def run(settings: TrainConfig, folder: Path) -> RunFolder:
    return one_run(settings, folder, load_data(settings.data, settings.tokenizer()))


def test_an_encoder_is_fine_tuned_proved_and_compressed(tmp_path: Path, tasks: Path, bert: Path) -> None:
    folder = train(config(tasks, bert, baseline=True, steps=80, out=str(tmp_path / "run"))).folder
    result = json.loads(folder.result.read_text())
    assert result["test"]["accuracy"] > 0.75 < result["dense"]["test"]["accuracy"]
    assert result["compressed"]["test"] == pytest.approx(result["test"], abs=1e-4)
    proof = verify(folder.model)
    assert proof.ok
    assert sorted(layer.label for layer in proof.layers) == [
        f"bert.encoder.layer.{i}.{part}.dense.weight" for i in range(2) for part in ("intermediate", "output")
    ]
    assert any(line.startswith("sparse test accuracy: ") for line in result_lines(folder))


def test_it_begins_with_the_weights_of_the_folder(tasks: Path, bert: Path) -> None:
    """All of the body; the head follows from the seed."""
    settings = config(tasks, bert)
    data = load_data(settings.data, settings.tokenizer())
    state = prepare(settings, data).state.model.state_dict()
    stored = load_file(bert / "model.safetensors")
    for name, tensor in stored.items():
        assert torch.equal(state[f"bert.{name}"], tensor), name
    again = prepare(settings, data).state.model.state_dict()
    assert torch.equal(state["classifier.weight"], again["classifier.weight"])
    other = prepare(config(tasks, bert, seed=1), data).state.model.state_dict()
    assert not torch.equal(state["classifier.weight"], other["classifier.weight"])
    fresh = build_model(ModelConfig(name=f"transformers:{bert}", pretrained=False, depth=1, dropout=0.25), data)
    assert fresh.config.num_hidden_layers == 1
    assert fresh.bert.encoder.layer[0].output.dropout.p == 0.25


@pytest.mark.parametrize("like_lengths", [None, True])
def test_a_run_goes_on_to_the_same_bits(tmp_path: Path, tasks: Path, bert: Path, like_lengths: bool | None) -> None:
    """Dropout included: the pretrained network has some."""
    data_config = {"name": "glue", "path": str(tasks / "MRPC"), "like_lengths": like_lengths}
    settings = config(tasks, bert, recipe="sr-ste", data=data_config)
    whole = run(settings, tmp_path / "whole")
    part = RunFolder(tmp_path / "part")
    data = load_data(settings.data, settings.tokenizer())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nmflow.train.loop.take_step", _failing_at(22))
        with pytest.raises(KeyboardInterrupt):
            one_run(settings, part.path, data)
    assert part.checkpoint.exists()
    assert not part.result.exists()
    one_run(settings, part.path, data)
    assert_same_bits(part.model, whole.model)
    assert json.loads(part.result.read_text())["test"] == json.loads(whole.result.read_text())["test"]


def test_batches_of_like_lengths_are_what_training_sees(tasks: Path, bert: Path) -> None:
    tokens = []
    for like_lengths in (None, True):
        data_config = {"name": "glue", "path": str(tasks / "MRPC"), "like_lengths": like_lengths}
        settings = config(tasks, bert, data=data_config)
        training = prepare(settings, load_data(settings.data, settings.tokenizer()))
        seen: list[int] = []
        training.state.model.register_forward_pre_hook(
            lambda _, args, inputs, seen=seen: seen.append(inputs["input_ids"].numel()), with_kwargs=True
        )
        for step in range(20):
            take_step(training, step)
        tokens.append(sum(seen))
    assert tokens[1] < 0.9 * tokens[0]


def _failing_at(last: int) -> Any:
    def step(training: Any, number: int) -> Any:
        if number == last:
            raise KeyboardInterrupt
        return take_step(training, number)

    return step


@pytest.mark.parametrize(
    ("task", "names"),
    [("MRPC", ["score", "accuracy", "f1"]), ("STS-B", ["score", "pearson", "spearman"]), ("SST-2", ["accuracy"])],
)
def test_every_task_is_judged_by_its_own_measures(
    tmp_path: Path, tasks: Path, bert: Path, task: str, names: list[str]
) -> None:
    folder = run(config(tasks, bert, task, steps=12, eval_every=6), tmp_path / "run")
    result = json.loads(folder.result.read_text())
    assert result["measure"] == names[0]
    assert list(result["test"]) == ["loss", *names, "items"]
    if names[0] == "score":
        assert result["test"]["score"] == pytest.approx((result["test"][names[1]] + result["test"][names[2]]) / 2)
    last = read_metrics(folder.metrics)[-1]
    assert [last[f"val_{name}"] for name in names] == [result["val"][name] for name in names]
    label = {"score": "score", "accuracy": "accuracy"}[names[0]]
    assert training_figure(folder.path).axes[3].get_ylabel() == f"validation {label}"
    cells = read_cells([PlannedRun("mdgf-exponential", "1:8", 0, folder.path)])
    assert f"test {label}, %" in table_lines(cells)[0]
    assert f"{100 * result['test'][names[0]]:.2f}" in table_lines(cells)[2]


def test_a_number_has_no_classes_to_smooth(tmp_path: Path, tasks: Path, bert: Path) -> None:
    with pytest.raises(ValueError, match=r"optim\.label_smoothing: a number has no classes"):
        train(config(tasks, bert, "STS-B", optim={"label_smoothing": 0.1}, out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_had_is_told_with_the_way_to_it(tmp_path: Path, tasks: Path, bert: Path) -> None:
    settings = config(tasks, bert)
    data = load_data(settings.data, settings.tokenizer())

    def refused(name: str, **changes: Any) -> str:
        with pytest.raises(ValueError, match="model") as error:
            build_model(ModelConfig(name=name, **changes), data)
        return str(error.value)

    nowhere = tmp_path / "nowhere"
    assert f"fetch it: hf download nowhere --local-dir {nowhere}" in refused(f"transformers:{nowhere}")
    assert "fetch it: hf download nobody/nothing" in refused("transformers:nobody/nothing")
    assert "it has sizes of its own" in refused(f"transformers:{bert}", width=64)
    assert "model.mlp_ratio: of no use" in refused(f"transformers:{bert}", mlp_ratio=2.0, pretrained=False)
    assert "transformers:NAME for sentences" in refused("lm-tiny")
    assert "transformers:NAME for sentences" in refused("timm:vit_tiny_patch16_224")
    assert "no weights to begin with" in refused("vit-tiny", pretrained=True)
    half = tmp_path / "half"
    half.mkdir()
    for file in bert.iterdir():
        (half / file.name).write_bytes(file.read_bytes())
    stored = load_file(half / "model.safetensors")
    del stored["encoder.layer.1.output.dense.weight"]
    save_file(stored, half / "model.safetensors", metadata={"format": "pt"})
    assert "lack 1 tensors of the network, bert.encoder.layer.1.output.dense.weight first" in refused(
        f"transformers:{half}"
    )
    (half / "model.safetensors").unlink()
    torch.save(stored, half / "pytorch_model.bin")  # a pickle is never opened
    assert "transformers" in refused(f"transformers:{half}")


# -- causal language models --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng, path = random.Random(0), tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text("\n".join(sentence(rng) for _ in range(300)))
    return path


def test_a_compressed_gpt2_writes_what_the_masked_one_writes(tmp_path: Path, book: Path) -> None:
    """Token by token with a cache, in batches of one and of three; against the dense file with its zeros."""
    settings = TrainConfig(
        data={"name": "text", "path": str(book), "context": 32},
        model={"name": "transformers:gpt2", "pretrained": False, "width": 64, "depth": 2, "heads": 4},
        targets={"ff": "1:8", "qkv": "1:4", "o": "1:4"}, steps=40, batch=8, optim={"lr": 1e-2}, eval_every=20,
        baseline=False,
    )  # fmt: skip
    data = load_data(settings.data, settings.tokenizer())
    assert data.unit == "characters"
    folder = run(settings, tmp_path / "run")
    result = json.loads(folder.result.read_text())
    assert result["measure"] == "perplexity"
    assert 1 < result["test"]["perplexity"] < data.num_classes / 2
    for batch in (1, 3):
        assert_they_write_the_same(settings, folder, data, batch)


def assert_they_write_the_same(settings: TrainConfig, folder: RunFolder, data: Data, batch: int) -> None:
    """The network with its zeros and the compressed one continue some lines by the same 20 tokens."""
    masked = build_model(settings.model, data).eval()
    masked.load_state_dict(load_file(folder.model), strict=False)  # the tied head is stored once
    masked.tie_weights()
    assert verify(folder.model).ok
    packed = load_compressed(folder.compressed, into=build_model(settings.model, data)).eval()
    assert "1:8" in repr(packed)
    prompt = data.test.batch(torch.arange(batch))[0][:, :8]
    asked = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    seen = torch.ones_like(prompt)
    written = [model.generate(prompt, attention_mask=seen, **asked) for model in (masked, packed)]
    assert written[0].shape == (batch, 28)
    assert torch.equal(*written)


@pytest.mark.slow
def test_a_gpt2_of_full_size_writes_what_the_masked_one_writes(tmp_path: Path, shared_data: Path) -> None:
    """All projections at 1:8, trained on a tenth of tinyshakespeare for two minutes."""
    source = shared_data / "lm_text" / "tinyshakespeare.txt.gz"
    if not source.is_file():
        pytest.skip(f"no text at {source}")
    (tmp_path / "plays.txt").write_bytes(gzip.decompress(source.read_bytes())[:100_000])
    settings = TrainConfig(
        data={"name": "text", "path": str(tmp_path / "plays.txt"), "context": 64},
        model={"name": "transformers:gpt2", "pretrained": False},
        targets={"ff": "1:8", "qkv": "1:8", "o": "1:8"}, steps=20, batch=8, optim={"lr": 3e-4}, eval_every=20,
        baseline=False,
    )  # fmt: skip
    data = load_data(settings.data)
    folder = run(settings, tmp_path / "run")
    assert json.loads(folder.result.read_text())["parameters"] > 80e6
    assert_they_write_the_same(settings, folder, data, batch=1)


def test_a_pretrained_network_reads_text_by_its_own_tokenizer(tmp_path: Path, bert: Path, book: Path) -> None:
    settings = TrainConfig(data=f"text:{book}", model=f"transformers:{bert}")
    assert settings.tokenizer() == str(bert)
    assert load_data(settings.data, settings.tokenizer()).unit == "tokens"
    fresh = TrainConfig(data=f"text:{book}", model={"name": f"transformers:{bert}", "pretrained": False})
    assert fresh.tokenizer() is None


def test_an_evaluation_keeps_few_logits_at_a_time(book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary of many thousands would fill the memory; the figures are the same."""
    data = load_data(DataConfig(name="text", path=str(book), context=16))
    model, sizes = build_model(ModelConfig(name="lm-tiny", width=32, heads=2), data), []
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    whole = evaluate(model, data, "test", "cpu")
    monkeypatch.setattr("nmflow.train.loop.EVAL_LOGITS", 3 * 16 * data.num_classes + 1)
    parts = evaluate(model, data, "test", "cpu")
    items = len(data.test)
    assert sizes == [items, *(min(3, items - first) for first in range(0, items, 3))]
    assert parts.to_dict() == pytest.approx(whole.to_dict(), rel=1e-5)


# -- translation -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with settings of its own, of which only the architecture is taken."""
    from transformers import T5Config

    folder = tmp_path_factory.mktemp("models") / "t5"
    T5Config(feed_forward_proj="gated-gelu", vocab_size=999, pad_token_id=7, eos_token_id=8).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["marian", "t5", "a folder of t5"])
def test_an_encoder_decoder_learns_to_translate(tmp_path: Path, pairs: Path, kind: str, t5: str) -> None:
    import sacrebleu

    sizes = pairs_config(pairs).model.model_dump()
    name = f"transformers:{kind if kind in ('marian', 't5') else t5}"
    settings = pairs_config(pairs, model={**sizes, "name": name})
    folder = run(settings, tmp_path / "run")
    result = json.loads(folder.result.read_text())
    losses = [line["val_loss"] for line in read_metrics(folder.metrics) if "val_loss" in line]
    assert losses[-1] < 3.5 < torch.tensor(60.0).log()
    assert list(result["test"]) == ["loss", "accuracy", "perplexity", "items", "bleu"]
    data = load_data(settings.data)
    _, targets = data.test.batch(torch.arange(len(data.test)))
    assert result["test"]["items"] == int((targets != -100).sum())
    assert verify(folder.model).ok
    assert (folder.path / "vocabulary.model").read_bytes() == data.files["vocabulary.model"]
    references = [line.split("\t")[1] for line in (pairs / "test.en-xx.tsv").read_text().splitlines()]
    said = (folder.path / "translations.txt").read_text().splitlines()
    assert result["test"]["bleu"] == sacrebleu.corpus_bleu(said, [references]).score > 0
    assert result["compressed"]["test"] == pytest.approx(result["test"], abs=1e-4)
    assert result["compressed"]["translations_alike"] == len(said) == 14


def test_words_count_alike_however_a_batch_is_cut_up(pairs: Path) -> None:
    """Sentences differ in length: the gradient of a batch is that of all its words, in one piece or in eight."""
    gradients = []
    for accumulate in (1, 2, 8):
        settings = pairs_config(pairs, accumulate=accumulate, optim={"lr": 1e-9, "clip": None}, recipe="dense")
        training = prepare(settings, load_data(settings.data))
        found: dict[str, torch.Tensor] = {}
        for name, parameter in training.state.model.named_parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(functools.partial(_keep, found, name))
        loss, _ = take_step(training, 0)
        gradients.append((float(loss), found))
    for loss, found in gradients[1:]:
        assert loss == pytest.approx(gradients[0][0], rel=1e-5)
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, gradients[0][1][name], rtol=1e-4, atol=1e-6)


def _keep(found: dict[str, torch.Tensor], name: str, parameter: torch.Tensor) -> None:
    assert parameter.grad is not None
    found[name] = parameter.grad.clone()  # of the last micro-batch, which stands, the sum


def test_two_processes_translate_what_one_does(tmp_path: Path, pairs: Path) -> None:
    """Their shares of a batch differ in words, and 14 test sentences do not part evenly over batches of both."""
    settings = pairs_config(pairs, steps=8, eval_every=4, optim={"lr": 0.01, "eps": 1e-3})
    one = run(settings, tmp_path / "one")
    shared = settings.model_copy(update={"accumulate": 2, "out": str(tmp_path / "two")})
    (tmp_path / "run.yaml").write_text(shared.to_yaml())
    nmflow = ("-m", "nmflow", "train", str(tmp_path / "run.yaml"))
    process = start("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *nmflow)
    _, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    two = RunFolder(tmp_path / "two")
    found, expected = load_file(two.checkpoint), load_file(one.checkpoint)
    for name in (name for name in expected if name.startswith("model/")):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4)
    for line, other in zip(read_metrics(two.metrics), read_metrics(one.metrics), strict=True):
        for key in {"loss", "val_loss", "val_perplexity"} & line.keys():
            assert line[key] == pytest.approx(other[key], rel=1e-4), (key, line["step"])


def test_another_vocabulary_is_noticed(tmp_path: Path, pairs: Path) -> None:
    """A run goes on only with the tokens that it began with."""
    settings = pairs_config(pairs, steps=12)
    data = load_data(settings.data)
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    (folder.path / "vocabulary.model").write_bytes(b"another")
    with pytest.raises(ValueError, match=r"vocabulary\.model: the data give another one now"):
        one_run(settings, folder.path, data)
