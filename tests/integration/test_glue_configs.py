"""The example configurations of GLUE run as they stand, but for their length: small networks, a few lines of data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from language import WORDS, bert_folder, glue_folder

from nmflow.experiments import collect, compare
from nmflow.models import build_model
from nmflow.schedules import recipe as build_recipe
from nmflow.train import load_compare_config, load_config, train
from nmflow.train.data import load_data

pytest.importorskip("transformers", reason="the encoders come from transformers, which is an extra")

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
SHORT = ["steps=8", "batch=16", "eval_every=4", "checkpoint_every=4"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the data and networks that the configurations name, as their paths are relative ones."""
    monkeypatch.chdir(tmp_path)
    bert_folder(tmp_path / "models" / "minilm")
    for task in ("MRPC", "SST-2", "STS-B"):
        glue_folder(tmp_path / "data" / "glue", task)
    return tmp_path


def t5_folder(folder: Path) -> Path:
    """A T5 as it is saved for translation, with a head for text, and a Unigram tokenizer."""
    from transformers import T5Config, T5ForConditionalGeneration, T5TokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"\u2581{word}", -2.0) for word in WORDS)]
    T5TokenizerFast(vocab=pieces, extra_ids=0).save_pretrained(folder)
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    config = T5Config(vocab_size=len(pieces), **sizes, decoder_start_token_id=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("name", "task"), [("glue-mrpc", "MRPC"), ("glue-sst2", "SST-2")])
def test_an_encoder_is_fine_tuned(here: Path, name: str, task: str) -> None:
    settings = load_config(CONFIGS / f"{name}.yaml", [*SHORT, "out=run"])
    done = train(settings)
    result = json.loads(done.folder.result.read_text())
    assert result["data"].startswith(f"glue {task}: ")
    assert result["pattern"] == "1:4"
    assert result["verify"]["ok"]
    assert any(line == "verified: 4 of 4 layers are N:M" for line in done.lines())


def test_the_same_file_compares(here: Path) -> None:
    settings = load_compare_config(CONFIGS / "glue-mrpc.yaml", [*SHORT, "recipes=dense,ste", "seeds=1", "out=runs"])
    assert not compare(settings).failed
    [dense, sparse] = collect(["runs"]).glue
    assert (dense.columns["MRPC"].n, sparse.columns["MRPC"].n) == (1, 1)


@pytest.mark.parametrize(("task", "recipes"), [("MRPC", []), ("STS-B", ["recipes=sr-ste"])])
def test_t5_is_fine_tuned_by_the_papers_recipes(here: Path, task: str, recipes: list[str]) -> None:
    """All of its weights are those of the folder but for the head, and feed-forward layers of both sides are sparse."""
    t5_folder(here / "t5")
    changes = [*SHORT, "model=transformers:t5", f"data.path=data/glue/{task}", "data.context=12", "out=runs"]
    settings = load_compare_config(CONFIGS / "glue-t5-base.yaml", [*changes, *recipes, "pattern=1:4"])
    data = load_data(settings.data, settings.tokenizer())
    inputs, _ = data.train.batch(torch.arange(20))
    assert (inputs["input_ids"] == 1).sum(dim=1).tolist() == [2] * 20  # T5 asks for as many ends in every item
    assert "token_type_ids" not in inputs
    assert type(build_model(settings.model, data)).__name__ == "T5ForSequenceClassification"
    done = compare(settings)
    assert not done.failed
    assert [row.columns[task].n for row in collect(["runs"]).glue] == [1] * len(settings.recipes)
    proof = json.loads(next((here / "runs" / "runs").glob("sr-ste-*/result.json")).read_text())["verify"]
    sides = {layer["label"].split(".")[1] for layer in proof["layers"]}
    assert (len(proof["layers"]), sides) == (8, {"encoder", "decoder"})


def test_t5s_settings_are_the_papers() -> None:
    settings = load_compare_config(CONFIGS / "glue-t5-base.yaml")
    assert (settings.batch, settings.steps, settings.pattern) == (128, 100_000, ("1:4", "1:32"))
    assert (settings.optim.lr, settings.optim.schedule) == (1e-3, "constant")
    assert settings.optim.warmup * settings.steps == 1_000
    for each in settings.recipes[1:]:
        made = build_recipe(each["name"], dense=each["dense"])
        phases = [made.at(step, settings.steps, "1:32", 768).phase for step in (9_999, 10_000)]
        assert phases[0] == "dense" != phases[1]
