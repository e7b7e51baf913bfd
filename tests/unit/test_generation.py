"""Writing: against plain loops that read everything anew at every token, one sentence at a time, without a cache."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nmflow.models import build_model
from nmflow.train import generation
from nmflow.train.config_sections import ModelConfig
from nmflow.train.data import Data
from nmflow.train.data.text import TextSplit
from nmflow.train.generation import go_on, translate
from nmflow.train.objectives import PredictTokens

PAD, END, CONTEXT = 0, 2, 8
SEED, SCALE = 5, 0.5


def network(name: str, kind: Any, vocabulary: int, **sizes: Any) -> nn.Module:
    """A small one with weights of ours, so large that it has opinions; in float64, where no two logits are near."""
    nothing = TextSplit(torch.empty(0), CONTEXT, stride=1)
    data = Data("none", kind, PredictTokens(), nothing, nothing, nothing, vocabulary, (CONTEXT,))
    model = build_model(ModelConfig(name=name, width=16, depth=1, heads=2, **sizes), data).double()
    chance = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=chance, dtype=torch.float64)
            if parameter.requires_grad:  # sines stay
                parameter.copy_(SCALE * noise if parameter.dim() > 1 else parameter + 0.3 * noise)
    return model


# -- translation -------------------------------------------------------------------------------------------------


@pytest.fixture(params=["marian", "t5", "bart"])
def translator(request: pytest.FixtureRequest) -> nn.Module:
    pytest.importorskip("transformers", reason="encoder-decoders come from transformers, which is an extra")
    return network(f"transformers:{request.param}", "translation", 7, pretrained=False, dropout=0.1)


@torch.no_grad()
def log_odds(model: nn.Module, source: list[int], target: list[int]) -> Tensor:
    """log p [V] of the token after `target`."""
    logits = model(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([[PAD, *target]])).logits
    return logits[0, -1].log_softmax(-1)


def sentences(count: int) -> list[list[int]]:
    chance = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 7, (count,), generator=chance).tolist()
    return [[*torch.randint(3, 7, (length,), generator=chance).tolist(), END] for length in lengths]


def test_a_batch_is_translated_as_its_sentences_are(translator: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedily, padded, in several batches, and returned in order; in eval mode, and put back in training."""
    monkeypatch.setattr(generation, "BATCH", 5)
    sources, expected = sentences(12), []
    translator.eval()
    for source in sources:
        target: list[int] = []
        while len(target) < CONTEXT and END not in target:
            target.append(int(log_odds(translator, source, target).argmax()))
        expected.append([token for token in target if token != END])
    translator.train()
    assert translate(translator, sources, CONTEXT) == expected
    assert translator.training
    assert len({tuple(target) for target in expected}) > 2
    assert translate(translator, sources, 2) == [target[:2] for target in expected]


def test_a_wide_beam_finds_the_best_of_all(translator: nn.Module) -> None:
    """Every target of up to three tokens, judged by its mean log p; a beam as wide as all their beginnings."""
    translator.eval()
    for source in sentences(4):
        scores: dict[tuple[int, ...], float] = {}
        others = [token for token in range(7) if token != END]
        for begun in ((), *((a,) for a in others), *itertools.product(others, repeat=2)):
            steps = [log_odds(translator, source, list(begun[:place])) for place in range(len(begun) + 1)]
            sofar = sum(float(step[token]) for step, token in zip(steps, begun, strict=False))
            for last in range(7) if len(begun) == 2 else (END,):
                whole = (*begun, last)
                scores[whole] = (sofar + float(steps[-1][last])) / len(whole)
        best = max(scores, key=lambda whole: scores[whole])
        (target,) = translate(translator, [source], 3, beam=42)
        assert target == [token for token in best if token != END]


# -- text --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["lm-tiny", "transformers:gpt2", "transformers:llama"])
def writer(request: pytest.FixtureRequest) -> nn.Module:
    if request.param == "lm-tiny":
        return network("lm-tiny", "text", 11)
    pytest.importorskip("transformers", reason="an extra")
    return network(request.param, "text", 11, pretrained=False)


@torch.no_grad()
def test_a_text_goes_on_with_what_is_likeliest_after_what_is_in_sight(writer: nn.Module) -> None:
    for prompt in ([3], [1, 2, 3, 4, 5], list(range(11)) * 2):
        sight = prompt[-CONTEXT:]
        written: list[int] = []
        writer.eval()
        for _ in range(25):
            if len(sight) == CONTEXT + 1:
                sight = sight[-CONTEXT // 2 :]
            out = writer(torch.tensor([sight]))
            logits = out if isinstance(out, Tensor) else out.logits
            written.append(int(logits[0, -1].argmax()))
            sight = [*sight, written[-1]]
        writer.train()
        assert go_on(writer, prompt, 25, CONTEXT) == written
        assert writer.training
        assert len(set(written)) > 1


def test_it_is_what_the_library_writes() -> None:
    pytest.importorskip("transformers", reason="an extra")
    model = network("transformers:gpt2", "text", 11, pretrained=False).eval()
    prompt = torch.tensor([[4, 7]])
    asked = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    theirs = model.generate(prompt, attention_mask=torch.ones_like(prompt), **asked)
    assert go_on(model, prompt[0].tolist(), 6, CONTEXT) == theirs[0, 2:].tolist()


class Bag(nn.Module):
    """A language model of one opinion, whatever stands before."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, ids: Tensor) -> Tensor:
        return self.logits.expand(*ids.shape, -1)


def test_a_temperature_draws_from_the_odds() -> None:
    logits = [0.0, 1.0, 2.0, -1.0]
    for temperature in (0.5, 2.0):
        drawn = go_on(Bag(logits), [0], 4000, context=4, temperature=temperature, seed=3)
        shares = torch.bincount(torch.tensor(drawn), minlength=4) / 4000
        powers = torch.tensor(logits).div(temperature).exp()
        torch.testing.assert_close(shares, powers / powers.sum(), atol=0.03, rtol=0)
        assert go_on(Bag(logits), [0], 50, 4, temperature, seed=3) == drawn[:50]
        assert go_on(Bag(logits), [0], 50, 4, temperature, seed=4) != drawn[:50]
