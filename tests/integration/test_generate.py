"""Networks that write: BLEU in the results of a run, and `nmflow generate`, from files to files."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from language import pairs_config, sentence
from safetensors.torch import load_file
from small_runs import one_run

from nmflow.cli import cli
from nmflow.models import build_model
from nmflow.report.folder import RunFolder
from nmflow.report.tables import PlannedRun, read_cells, result_lines
from nmflow.train import train
from nmflow.train.config import TrainConfig
from nmflow.train.data import load_data

pytest.importorskip("transformers", reason="the translators come from transformers, which is an extra")


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng, path = random.Random(0), tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text("\n".join(sentence(rng) for _ in range(300)))
    return path


@pytest.fixture(scope="module")
def translated(tmp_path_factory: pytest.TempPathFactory, pairs: Path) -> RunFolder:
    """A run with its dense one; its data are gone."""
    root = tmp_path_factory.mktemp("translated")
    shutil.copytree(pairs, root / "pairs")
    bleu = {"sentences": 9, "beam": 2, "length": 20}
    result = train(pairs_config(root / "pairs", baseline=True, bleu=bleu, out=str(root / "run")))
    shutil.rmtree(root / "pairs")
    return result.folder


def test_bleu_says_how_it_was_measured(translated: RunFolder) -> None:
    result = json.loads(translated.result.read_text())
    signature = result["bleu"]["signature"]
    assert signature.startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert result["bleu"] == {"signature": signature, "sentences": 9, "beam": 2, "length": 20}
    assert result["dense"]["bleu"] == result["bleu"]
    scores = [part["test"]["bleu"] for part in (result["dense"], result, result["compressed"])]
    shown = "BLEU: dense {:.1f}, sparse {:.1f}, compressed {:.1f}".format(*scores)
    assert f"{shown} (9 sentences, beam 2, {signature})" in result_lines(translated)
    assert f"<td class=number>{scores[1]:.2f}</td>" in translated.page.read_text()
    for folder in (translated, translated.dense):
        assert len((folder.path / "translations.txt").read_text().splitlines()) == 9
    own = read_cells([PlannedRun("mdgf-exponential", "1:8", 0, translated.path)])
    assert own[0].measure == "accuracy"


def test_a_run_translates_from_its_folder_alone(translated: RunFolder, pairs: Path) -> None:
    sources = [line.split("\t")[0] for line in (pairs / "test.en-xx.tsv").read_text().splitlines()[:9]]
    said = (translated.path / "translations.txt").read_text().splitlines()
    run = str(translated.path)
    done = generate(run, "--beam", "2", "--tokens", "20", input="\r\n".join(sources) + "\n")
    assert (done.exit_code, done.output.splitlines()) == (0, said)
    done = generate(run, "--prompt", sources[1], "--prompt", sources[0], "--beam=2", "--tokens=20", "--json")
    answers = [{"prompt": source, "text": text} for source, text in zip(sources, said, strict=False)]
    assert json.loads(done.output) == {"run": run, "answers": [answers[1], answers[0]]}
    (short,) = generate(run, "--tokens=3", input="a cat\n").output.splitlines()
    assert 0 < len(short.split()) <= 3
    for arguments, told in (
        (["--temperature=1", "--seed=1"], "--temperature and --seed: of no use to a run of data=translation"),
        (["--tokens=25"], "--tokens: 25 is more than data.context, 24"),
    ):
        done = generate(run, "--prompt=a", *arguments)
        assert (done.exit_code, told in done.output) == (2, True), done.output


def generate(*arguments: str, input: str | None = None) -> Result:
    return CliRunner().invoke(cli, ["generate", *arguments], input=input)


@pytest.mark.parametrize("model", ["lm-tiny", "transformers:gpt2"])
def test_a_run_goes_on_with_a_text_from_its_folder_alone(tmp_path: Path, book: Path, model: str) -> None:
    """What the masked network of the dense file writes, character by character, while the context lasts."""
    (tmp_path / "book.txt").write_text(book.read_text())
    settings = TrainConfig(
        data={"name": "text", "path": str(tmp_path / "book.txt"), "context": 32},
        model={"name": model, "pretrained": None if model == "lm-tiny" else False, "width": 32, "depth": 1, "heads": 2},
        targets={"ff": "1:8", "qkv": "1:4"}, steps=30, batch=8, optim={"lr": 1e-2}, baseline=False,
    )  # fmt: skip
    data = load_data(settings.data)
    folder = one_run(settings, tmp_path / "run", data)
    (tmp_path / "book.txt").unlink()
    masked = build_model(settings.model, data).eval()
    masked.load_state_dict(load_file(folder.model), strict=False)
    alphabet = sorted(set(book.read_text()[: len(book.read_text()) * 8 // 10]))
    text = "the cat"
    for _ in range(25):
        out = masked(torch.tensor([[alphabet.index(letter) + 1 for letter in text]]))
        text += alphabet[int((out if isinstance(out, torch.Tensor) else out.logits)[0, -1].argmax()) - 1]
    done = generate(str(folder.path), "--prompt", "the cat", "--tokens", "25")
    assert (done.exit_code, done.output) == (0, f"{text}\n")
    drawn = [
        generate(str(folder.path), "--temperature=1", f"--seed={seed}", input="the cat\n").output for seed in (0, 0, 1)
    ]
    assert len(drawn[0]) == len("the cat") + 200 + 1
    assert drawn[0] == drawn[1] != drawn[2]
    for arguments, told in (
        (["--beam=2", "--seed=1"], "--beam and --seed without a --temperature: of no use to a run of data=text"),
        (["--prompt="], "an empty prompt"),
        (["--prompt=the \u20accat\u00e9 \u20ac"], "the run has never seen \u00e9 \u20ac; leave them out"),
    ):
        done = generate(str(folder.path), "--prompt=a", *arguments)
        assert (done.exit_code, told in done.output) == (2, True), done.output


def test_a_folder_that_cannot_speak_says_why(tmp_path: Path, translated: RunFolder) -> None:
    def refused(folder: Path) -> str:
        done = generate(str(folder), "--prompt=a")
        assert done.exit_code == 2
        return done.output

    assert "no run here, for there is no config.yaml" in refused(tmp_path)
    assert "compressed.safetensors: not found; the run is dense, or not done" in refused(translated.dense.path)
    (tmp_path / "config.yaml").write_text(TrainConfig().to_yaml())
    assert "a run on digits writes no text" in refused(tmp_path)
    shutil.copytree(translated.path, tmp_path / "half", ignore=shutil.ignore_patterns("vocabulary.model"))
    assert "vocabulary.model: not found" in refused(tmp_path / "half")
    (tmp_path / "half" / "vocabulary.model").write_bytes(b"another")
    assert "vocabulary.model: no vocabulary of SentencePiece" in refused(tmp_path / "half")
