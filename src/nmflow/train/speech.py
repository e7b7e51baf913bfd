"""What a finished run has to say, from its folder alone: sentences that it translates, a text that it goes on with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn

from nmflow.models import build_model
from nmflow.report.folder import RunFolder
from nmflow.runtime import for_inference, load_compressed
from nmflow.train.config import TrainConfig, load_config
from nmflow.train.data import Data
from nmflow.train.data.alphabet import ALPHABET_FILE, Alphabet
from nmflow.train.data.sentences import load_tokenizer
from nmflow.train.data.text import DEFAULT_CONTEXT, TextSplit
from nmflow.train.data.vocabulary import VOCABULARY_FILE, Vocabulary
from nmflow.train.generation import BATCH, go_on, translate
from nmflow.train.objectives import PredictTokens

DEFAULT_TOKENS = 200
"""Tokens that a text goes on for."""


@dataclass(frozen=True)
class Asked:
    """How to answer; None stands for the default, and for nothing where a setting is of no use."""

    tokens: int | None = None
    """Most tokens of an answer; of a translation data.context."""
    beam: int | None = None
    """Of a translation; 1 is greedy."""
    temperature: float | None = None
    """Of a text; 0 takes the likeliest token."""
    seed: int | None = None
    """Of a text with a temperature."""


Answers = Iterator[tuple[str, str]]
"""Prompts, and what is said to them."""


def speak(run: str | Path, prompts: Iterable[str], asked: Asked) -> Answers:
    """Every prompt with its translation, or with itself and how it goes on; by the compressed file of a run.

    Raises `FileNotFoundError` where the run lacks a file, `ValueError` where it is no run of text or translation, or a
    setting is of no use to it.
    """
    folder = RunFolder(Path(run))
    if not folder.config.is_file():
        raise FileNotFoundError(f"{folder.path}: no run here, for there is no {folder.config.name}")
    config = load_config(folder.config)
    kind = config.data.name
    if kind not in ("text", "translation"):
        raise ValueError(f"{folder.path}: a run on {kind} writes no text; runs of data=text and data=translation do")
    if not folder.compressed.is_file():
        raise FileNotFoundError(
            f"{folder.compressed}: not found; the run is dense, or not done yet (nmflow train resume={folder.path})"
        )
    useless = ("temperature", "seed") if kind == "translation" else ("beam",)
    refused = [f"--{name}" for name in useless if getattr(asked, name) is not None]
    if kind == "text" and asked.seed is not None and not asked.temperature:
        refused.append("--seed without a --temperature")
    if refused:
        raise ValueError(f"{' and '.join(refused)}: of no use to a run of data={kind}; leave it out")
    answers = _translations if kind == "translation" else _texts
    return answers(folder, config, prompts, asked)


def _translations(folder: RunFolder, config: TrainConfig, prompts: Iterable[str], asked: Asked) -> Answers:
    vocabulary = Vocabulary(_kept(folder, VOCABULARY_FILE))
    model, context = _network(folder, config, len(vocabulary))
    length = asked.tokens or context
    if length > context:
        raise ValueError(f"--tokens: {length} is more than data.context, {context}, which is all it learned")
    waiting = iter(prompts)
    while lines := list(islice(waiting, BATCH)):
        targets = translate(model, vocabulary.encode(lines, context), length, asked.beam or 1)
        yield from zip(lines, vocabulary.decode(targets), strict=True)


def _texts(folder: RunFolder, config: TrainConfig, prompts: Iterable[str], asked: Asked) -> Answers:
    source = config.tokenizer()
    tokens: Any = _Tokens(source) if source else Alphabet(_kept(folder, ALPHABET_FILE).decode())
    model, context = _network(folder, config, len(tokens))
    for prompt in prompts:
        begun = list(tokens.encode(prompt))
        if not begun:
            raise ValueError("an empty prompt: the run was taught to go on with a text, give it some")
        if isinstance(tokens, Alphabet) and (strange := tokens.strange(prompt)):
            raise ValueError(
                f'prompt "{prompt}": the run has never seen {" ".join(strange)}; leave them out ({ALPHABET_FILE} in '
                f"{folder.path} has the characters that it knows)"
            )
        count, heat = asked.tokens or DEFAULT_TOKENS, asked.temperature or 0.0
        more = go_on(model, begun, count, context, heat, asked.seed or 0)
        yield prompt, tokens.decode([*begun, *more])


class _Tokens:
    """A tokenizer of transformers, asked as an alphabet is."""

    def __init__(self, source: str) -> None:
        self._tokenizer = load_tokenizer(source, "this run")

    def __len__(self) -> int:
        return len(self._tokenizer)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens))


def _kept(folder: RunFolder, name: str) -> bytes:
    """What the run keeps beside its model."""
    path = folder.path / name
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found; the run is from before runs kept it, or it was moved without it")
    return path.read_bytes()


def _network(folder: RunFolder, config: TrainConfig, vocabulary: int) -> tuple[nn.Module, int]:
    """(the network of the compressed file, the tokens it sees at a time); no data set is read."""
    context = config.data.context or DEFAULT_CONTEXT
    nothing = TextSplit(torch.empty(0), context, stride=1)
    kind: Any = config.data.name
    data = Data(kind, kind, PredictTokens(), nothing, nothing, nothing, vocabulary, (context,))
    model = build_model(config.model, data).to(PartialState().device)
    return for_inference(load_compressed(folder.compressed, into=model)), context
