"""translation: parallel text in two languages, with a SentencePiece vocabulary of both trained on the train part."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from nmflow.train.config_sections import DataConfig
from nmflow.train.data.lines import PARTS, lines_of
from nmflow.train.data.sentences import places_of
from nmflow.train.data.splits import Data, missing
from nmflow.train.data.vocabulary import PAD, VOCABULARY_FILE, Vocabulary, train_vocabulary
from nmflow.train.objectives import NOT_COUNTED, PredictTokens

DEFAULT_CONTEXT = 128
DEFAULT_VOCABULARY = 8000
AT_A_TIME = 10_000
"""Sentences that are cut up at a time."""
LAYOUT = (
    "for each of train, valid and test one file of tab-separated pairs (train.en-de.tsv) or one file a language "
    "(train.en, train.de), plain or .gz"
)
MULTI30K = (
    "https://raw.githubusercontent.com/multi30k/dataset/a3d2e0d26b56f3846f66a952536ffed4e401d05a/data/task1/raw/"
    "{train,val,test_2016_flickr}.{en,de}.gz"
)
"""29,000 captions and their translations, as curl reads it."""


def load_translation(config: DataConfig, tokenizer: str | None = None) -> Data:
    """Pairs of sentences, `data.languages` (en-de: from English to German); at most `context` tokens of each are read.

    The vocabulary (SentencePiece, unigram, both languages together) follows from the train part and
    `data.vocabulary` alone; a run keeps it in its folder. Raises `FileNotFoundError` where the files are not there,
    `ValueError` where they do not fit together.
    """
    folder, context = Path(config.path or ""), config.context or DEFAULT_CONTEXT
    if not folder.is_dir():
        fetch = f"curl -L --create-dirs --output-dir {shlex.quote(str(folder))} --remote-name-all '{MULTI30K}'"
        raise missing(folder, f"{LAYOUT}; to begin with Multi30k: {fetch}")
    languages = config.languages or _named_languages(folder)
    texts = {part: _pairs(folder, part, languages) for part in PARTS}
    sentences = (sentence for pair in texts["train"] for sentence in pair)
    stored = train_vocabulary(sentences, config.vocabulary or DEFAULT_VOCABULARY)
    vocabulary = Vocabulary(stored)
    splits = {part: _encode(pairs, vocabulary, context) for part, pairs in texts.items()}
    references = References(tuple(target for _, target in texts["test"]), languages.partition("-")[2])
    return Data(
        name=f"translation {languages}",
        kind="translation",
        objective=PredictTokens(("accuracy", "perplexity")),
        train=splits["train"],
        val=splits["val"],
        test=replace(splits["test"], references=references),
        num_classes=len(vocabulary),
        sample_shape=(context,),
        unit="tokens",
        notes=("accuracy is that of the next token, given the right ones before it",),
        files={VOCABULARY_FILE: stored},
    )


@dataclass(frozen=True)
class References:
    """The translations as they stand in the file, and the language that they are in."""

    lines: tuple[str, ...]
    language: str


@dataclass(frozen=True)
class PairSplit:
    """Token numbers of both sides, end to end; item i of a side lies in `starts[i]:starts[i + 1]`, END included."""

    source: Tensor
    source_starts: Tensor
    target: Tensor
    target_starts: Tensor
    references: References | None = None
    """Of test alone."""

    def __len__(self) -> int:
        return len(self.source_starts) - 1

    @cached_property
    def lengths(self) -> Tensor:
        """Tokens of every item, both sides."""
        return self.source_starts.diff() + self.target_starts.diff()

    def batch(self, indices: Tensor, generator: torch.Generator | None = None) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs by name, and the target tokens [B, T]; padding is NOT_COUNTED there. Nothing is augmented."""
        source, is_source = _padded(self.source, self.source_starts, indices)
        target, is_target = _padded(self.target, self.target_starts, indices)
        given = torch.cat([torch.full_like(target[:, :1], PAD), target[:, :-1]], dim=1)
        inputs = {"input_ids": source, "attention_mask": is_source.long(), "decoder_input_ids": given}
        return inputs, target.masked_fill(~is_target, NOT_COUNTED)

    def sources(self, count: int) -> list[list[int]]:
        """The tokens of the first `count` sentences that are to be translated."""
        ends = self.source_starts[1 : count + 1]
        return [tokens.tolist() for tokens in self.source[: int(ends[-1])].tensor_split(ends[:-1])]


def _padded(tokens: Tensor, starts: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """(tokens [B, T], which of them are there), T the longest of these items."""
    at, inside = places_of(starts, indices)
    return torch.where(inside, tokens[at].long(), PAD), inside


Pairs = list[tuple[str, str]]


def _named_languages(folder: Path) -> str:
    """From a file such as train.en-de.tsv."""
    for file in sorted(folder.iterdir()):
        found = re.search(r"\.([a-z]{2,3}-[a-z]{2,3})\.tsv(\.gz)?$", file.name)
        if found:
            return found[1]
    raise ValueError(f"{folder}: its files do not say from which language to which; give data.languages=en-de")


def _pairs(folder: Path, part: str, languages: str) -> Pairs:
    source, _, target = languages.partition("-")
    files = _files(folder, part)
    tables = [file for file in files if re.search(r"\.tsv(\.gz)?$", file.name)]
    sides = [[file for file in files if re.search(rf"\.{side}(\.gz)?$", file.name)] for side in (source, target)]
    if len(tables) == 1:
        swapped = f".{target}-{source}." in tables[0].name
        rows = [line.split("\t") for line in lines_of(tables[0])]
        short = next((number for number, row in enumerate(rows, start=1) if len(row) < 2), None)
        if short is not None:
            raise ValueError(f"{tables[0]}, line {short}: one tab-separated pair expected")
        pairs = [(row[1], row[0]) if swapped else (row[0], row[1]) for row in rows]
    elif all(len(side) == 1 for side in sides):
        one, other = (list(lines_of(side[0])) for side in sides)
        if len(one) != len(other):
            raise ValueError(f"{sides[0][0]}: {len(one):,} lines, {sides[1][0].name} has {len(other):,}")
        pairs = list(zip(one, other, strict=True))
    else:
        held = ", ".join(file.name for file in files) or "nothing"
        raise missing(folder, f"{LAYOUT}; of {part} in {languages} it holds {held}")
    if not pairs:
        raise ValueError(f"{folder}: no pairs of {part}")
    return pairs


def _files(folder: Path, part: str) -> list[Path]:
    """The files of a part, told by a word in their names; of two of WMT's newstests the later one is test."""
    files = [file for file in sorted(folder.iterdir()) if file.is_file()]
    words = dict(PARTS)
    years = sorted(set(re.findall(r"newstest\d{4}", " ".join(file.name for file in files))))
    if len(years) > 1:
        words |= {"val": f"{words['val']}|{years[-2]}", "test": years[-1]}
    return [file for file in files if re.search(words[part], file.name)]


def _encode(pairs: Pairs, vocabulary: Vocabulary, context: int) -> PairSplit:
    source, target = (_laid_out(side, vocabulary, context) for side in zip(*pairs, strict=True))
    return PairSplit(*source, *target)


def _laid_out(sentences: Sequence[str], vocabulary: Vocabulary, context: int) -> tuple[Tensor, Tensor]:
    """(tokens end to end, where items begin and the last one ends). Piece by piece: a list of numbers takes ten times
    the memory of a tensor."""
    pieces, lengths = [], [0]
    for first in range(0, len(sentences), AT_A_TIME):
        items = vocabulary.encode(sentences[first : first + AT_A_TIME], context)
        lengths += map(len, items)
        pieces.append(torch.tensor([token for item in items for token in item], dtype=torch.int32))
    return torch.cat(pieces), torch.tensor(lengths).cumsum(0)
