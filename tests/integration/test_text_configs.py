"""The example configurations for text: what they say of a network and its training, and a few steps of each."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch
from language import parallel_folder, sentence

from nmflow.models import build_model
from nmflow.report.folder import RunFolder
from nmflow.targets import resolve
from nmflow.train import train
from nmflow.train.config import TrainConfig, load_config
from nmflow.train.data import Data, load_data
from nmflow.train.data.text import TextSplit
from nmflow.train.objectives import PredictTokens
from nmflow.train.optim import learning_rate

pytest.importorskip("transformers", reason="the networks come from transformers, which is an extra")

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"


def config(name: str, *overrides: str) -> TrainConfig:
    return load_config(CONFIGS / f"{name}.yaml", list(overrides))


# -- the paper's encoder-decoder ---------------------------------------------------------------------------------


def test_the_encoder_decoder_is_the_papers() -> None:
    """On torch's meta device; weights counted by hand."""
    settings = config("wmt-encoder-decoder")
    nothing = TextSplit(torch.empty(0), settings.data.context or 0, stride=1)
    data = Data("none", "translation", PredictTokens(), nothing, nothing, nothing, 32_000, (256,))
    with torch.device("meta"):
        model = build_model(settings.model, data)
    width, hidden, tokens, positions = 1024, 4096, 32_000, 256
    norm, attention = 2 * width, 4 * (width * width + width)
    feed_forward = (hidden * width + hidden) + (width * hidden + width)
    encoder = 6 * (attention + feed_forward + 2 * norm)
    decoder = 6 * (2 * attention + feed_forward + 3 * norm)
    embeddings = tokens * width  # one table for source, target and logits
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained == encoder + decoder + embeddings == 209_125_376
    fixed = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    assert fixed == 2 * positions * width  # sines, in both halves
    assert {layer.self_attn.num_heads for layer in (*model.model.encoder.layers, *model.model.decoder.layers)} == {16}
    assert (model.config.dropout, model.config.max_position_embeddings) == (0.1, 256)
    taken = {"ff": 6 * 2 * 2, "q": 6 + 2 * 6, "k": 6 + 2 * 6, "v": 6 + 2 * 6, "o": 6 + 2 * 6}
    for role, count in taken.items():
        slots = resolve(model, {role: "1:32"}).slots
        size = width * hidden if role == "ff" else width * width
        assert (len(slots), sum(math.prod(slot.shape) for slot in slots)) == (count, count * size), role


def test_its_training_is_the_papers() -> None:
    """Section 7 of the settings: 200k steps of 512, length 256, Adam (0.9, 0.92), 1,000 warm-up steps of 0.0625."""
    settings = config("wmt-encoder-decoder")
    optim = settings.optim
    assert (settings.steps, settings.batch, settings.data.context, optim.betas) == (200_000, 512, 256, (0.9, 0.92))
    assert (optim.weight_decay, settings.data.languages, settings.resolved_targets()) == (0.0, "en-de", {"ff": "1:32"})
    for step in (99, 999, 4_000, 199_999):
        wanted = 0.0625 * min(1 / math.sqrt(step + 1), (step + 1) / 1000**1.5)
        assert learning_rate(optim, step, settings.steps) == pytest.approx(wanted, rel=2e-3), step
    assert 0 < optim.label_smoothing < 1


# -- a few steps of each -----------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The paths of the configurations lead to a folder of the test's own."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ["multi30k", "wmt-encoder-decoder", "wikitext2", "gpt2-finetune"])
def test_data_that_are_not_there_are_told_with_a_way_to_them(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"^data/\S+: not found; expected .*: curl -L "):
        train(config(name, "precision=no"))  # a process has one precision
    assert not Path("runs").exists()


def short(name: str, *overrides: str) -> RunFolder:
    """The configuration with a dozen steps."""
    quick = ("steps=12", "batch=8", "eval_every=12", "log_every=4", "out=run")
    settings = config(name, *quick, *overrides)
    folder = train(settings).folder
    result = json.loads(folder.result.read_text())
    assert result["verify"]["ok"]
    assert len(result["verify"]["layers"]) > 0
    assert (result["dense"] is not None) == settings.baseline
    return folder


NARROW = ("model.width=32", "model.depth=1", "model.heads=2", "accumulate=1", "precision=no")


@pytest.mark.parametrize(
    ("name", "valid", "test", "overrides"),
    [("multi30k", "val", "test_2016_flickr", ()), ("wmt-encoder-decoder", "newstest2013", "newstest2014", NARROW)],
)
def test_a_translator(name: str, valid: str, test: str, overrides: tuple[str, ...]) -> None:
    """On a few generated pairs, under the file names of the data set."""
    pytest.importorskip("sentencepiece", reason="an extra")
    pytest.importorskip("sacrebleu", reason="an extra")
    pairs = Path(config(name).data.path or "")
    parallel_folder(pairs, "sides", packed=name == "multi30k", names={"valid": valid, "test": test})
    for file in list(pairs.iterdir()):
        file.rename(file.with_name(file.name.replace(".xx", ".de")))
    folder = short(name, "data.vocabulary=60", *overrides)
    assert json.loads(folder.result.read_text())["bleu"]["sentences"] == 14
    assert len(folder.translations.read_text().splitlines()) == 14


def words(path: Path, count: int, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    chance = random.Random(seed)
    path.write_text("".join(f" {sentence(chance)} \n" for _ in range(count)))


def test_a_language_model_of_fresh_weights() -> None:
    for seed, part in enumerate(("train", "valid", "test")):
        words(Path(f"data/wikitext-2/wiki.{part}.tokens"), 60, seed)
    result = json.loads(short("wikitext2").result.read_text())
    assert result["pattern"] == "1:4 + 1:8"
    assert result["test"]["perplexity"] == pytest.approx(math.exp(result["test"]["loss"]))


def test_gpt2_is_fine_tuned_from_a_folder() -> None:
    """A narrow one with a byte-level tokenizer that was trained on the text."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

    words(Path("data/tinyshakespeare.txt"), 600, seed=0)
    trained = ByteLevelBPETokenizer()
    trained.train("data/tinyshakespeare.txt", vocab_size=280, special_tokens=["<|endoftext|>"])
    Path("models/gpt2").mkdir(parents=True)
    trained.save_model("models/gpt2")
    GPT2TokenizerFast.from_pretrained("models/gpt2").save_pretrained("models/gpt2")
    GPT2LMHeadModel(GPT2Config(vocab_size=280, n_embd=32, n_layer=2, n_head=2)).save_pretrained("models/gpt2")
    result = json.loads(short("gpt2-finetune").result.read_text())
    assert {layer["pattern"] for layer in result["verify"]["layers"]} == {"1:8"}
    assert "280 tokens" in result["data"]


# -- on real data ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("name", "languages"), [("multi30k", "en-de"), ("tatoeba_en_de", "en-de")])
def test_real_pairs_go_through(shared_data: Path, name: str, languages: str) -> None:
    if not (shared_data / name).is_dir():
        pytest.skip(f"no {name} at {shared_data}")
    path, quick = f"data.path={shared_data / name}", ("bleu.sentences=50", "baseline=false")
    folder = short("multi30k", path, f"data.languages={languages}", *NARROW, *quick)
    result = json.loads(folder.result.read_text())
    assert result["bleu"]["sentences"] == 50
    assert result["test"]["perplexity"] < 4000


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tinyshakespeare.txt.gz", "wikitext2.test.tokens.gz"])
def test_real_text_goes_through(shared_data: Path, name: str) -> None:
    """One file, in three parts of itself."""
    if not (shared_data / "lm_text" / name).is_file():
        pytest.skip(f"no {name} at {shared_data}")
    path = f"data.path={shared_data / 'lm_text' / name}"
    result = json.loads(short("wikitext2", path, *NARROW, "baseline=false").result.read_text())
    characters = load_data(config("wikitext2", path).data).num_classes
    assert result["test"]["perplexity"] == pytest.approx(math.exp(result["test"]["loss"]))
    assert 1 < result["test"]["perplexity"] < characters
