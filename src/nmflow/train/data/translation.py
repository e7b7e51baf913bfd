"""translation: parallel text in two languages, with a SentencePiece vocabulary of both trained on the train part."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nmflow.train.config import DataConfig
from nmflow.train.data.lines import PARTS, lines_of
from nmflow.train.data.sentences import places_of
from nmflow.train.data.splits import Data, missing
from nmflow.train.objectives import NOT_COUNTED, PredictTokens

PAD, UNKNOWN, END = 0, 1, 2
"""Tokens that every vocabulary has; a target begins with PAD, as Marian's and T5's do."""
DEFAULT_CONTEXT = 128
DEFAULT_VOCABULARY = 8000
VOCABULARY_FILE = "vocabulary.model"
LAYOUT = (
    "for each of train, valid and test one file of tab-separated pairs (train.en-de.tsv) or one file a language "
    "(train.en, train.de), plain or .gz"
)


def load_translation(config: DataConfig, tokenizer: str | None = None) -> Data:
    """Pairs of sentences, `data.languages` (en-de: from English to German); at most `context` tokens of each are read.

    The vocabulary (SentencePiece, unigram, both languages together) follows from the train part and
    `data.vocabulary` alone; a run keeps it in its folder. Raises `FileNotFoundError` where the files are not there,
    `ValueError` where they do not fit together.
    """
    folder, context = Path(config.path or ""), config.context or DEFAULT_CONTEXT
    languages = config.languages or _named_languages(folder)
    texts = {part: _pairs(folder, part, languages) for part in PARTS}
    vocabulary = _trained(texts["train"], config.vocabulary or DEFAULT_VOCABULARY)
    processor = _processor(vocabulary)
    splits = {part: _encode(pairs, processor, context) for part, pairs in texts.items()}
    return Data(
        name=f"translation {languages}",
        kind="translation",
        objective=PredictTokens(("accuracy", "perplexity")),
        train=splits["train"],
        val=splits["val"],
        test=splits["test"],
        num_classes=processor.get_piece_size(),
        sample_shape=(context,),
        unit="tokens",
        notes=("accuracy is that of the next token, given the right ones before it",),
        files={VOCABULARY_FILE: vocabulary},
    )


@dataclass(frozen=True)
class PairSplit:
    """Token numbers of both sides, end to end; item i of a side lies in `starts[i]:starts[i + 1]`, END included."""

    source: Tensor
    source_starts: Tensor
    target: Tensor
    target_starts: Tensor

    def __len__(self) -> int:
        return len(self.source_starts) - 1

    def batch(self, indices: Tensor, generator: torch.Generator | None = None) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs by name, and the target tokens [B, T]; padding is NOT_COUNTED there. Nothing is augmented."""
        source, is_source = _padded(self.source, self.source_starts, indices)
        target, is_target = _padded(self.target, self.target_starts, indices)
        given = torch.cat([torch.full_like(target[:, :1], PAD), target[:, :-1]], dim=1)
        inputs = {"input_ids": source, "attention_mask": is_source.long(), "decoder_input_ids": given}
        return inputs, target.masked_fill(~is_target, NOT_COUNTED)


def _padded(tokens: Tensor, starts: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """(tokens [B, T], which of them are there), T the longest of these items."""
    at, inside = places_of(starts, indices)
    return torch.where(inside, tokens[at].long(), PAD), inside


Pairs = list[tuple[str, str]]


def _named_languages(folder: Path) -> str:
    """From a file such as train.en-de.tsv."""
    if folder.is_dir():
        for file in sorted(folder.iterdir()):
            found = re.search(r"\.([a-z]{2,3}-[a-z]{2,3})\.tsv(\.gz)?$", file.name)
            if found:
                return found[1]
    raise ValueError(f"{folder}: its files do not say from which language to which; give data.languages=en-de")


def _pairs(folder: Path, part: str, languages: str) -> Pairs:
    source, _, target = languages.partition("-")
    if not folder.is_dir():
        raise missing(folder, LAYOUT)
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and re.search(PARTS[part], file.name)]
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


def _sentencepiece() -> Any:
    try:
        import sentencepiece
    except ImportError as error:
        raise ValueError("data=translation needs sentencepiece: pip install 'nmflow[translation]'") from error
    return sentencepiece


def _trained(pairs: Pairs, size: int) -> bytes:
    """The vocabulary as SentencePiece's own file; the same bytes for the same text."""
    written = io.BytesIO()
    try:
        _sentencepiece().SentencePieceTrainer.train(
            sentence_iterator=(sentence for pair in pairs for sentence in pair), model_writer=written,
            vocab_size=size, model_type="unigram", character_coverage=1.0, pad_id=PAD, unk_id=UNKNOWN, eos_id=END,
            bos_id=-1, num_threads=1, minloglevel=2, input_sentence_size=2_000_000, shuffle_input_sentence=False,
        )  # fmt: skip
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"data.vocabulary: no vocabulary of {size} tokens from this text: {reason}") from error
    return written.getvalue()


def _processor(vocabulary: bytes) -> Any:
    return _sentencepiece().SentencePieceProcessor(model_proto=vocabulary)


def _encode(pairs: Pairs, processor: Any, context: int) -> PairSplit:
    sides = []
    for side in zip(*pairs, strict=True):
        items = [[*item[: context - 1], END] for item in processor.encode(list(side))]
        starts = torch.tensor([0, *map(len, items)]).cumsum(0)
        sides += [torch.tensor([token for item in items for token in item], dtype=torch.int32), starts]
    return PairSplit(*sides)
