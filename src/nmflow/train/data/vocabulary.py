"""A SentencePiece vocabulary: trained on text, from sentences to token numbers and back."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import Any

PAD, UNKNOWN, END = 0, 1, 2
"""Tokens that every vocabulary has; a target begins with PAD, as Marian's and T5's do."""
VOCABULARY_FILE = "vocabulary.model"
"""Where a run keeps its vocabulary."""


class Vocabulary:
    """A vocabulary as SentencePiece's own file has it. Raises `ValueError` where that is none."""

    def __init__(self, content: bytes) -> None:
        try:
            self._processor = _sentencepiece().SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise ValueError(f"{VOCABULARY_FILE}: no vocabulary of SentencePiece: {error}") from error

    def __len__(self) -> int:
        size: int = self._processor.get_piece_size()
        return size

    def encode(self, sentences: Sequence[str], context: int) -> list[list[int]]:
        """At most `context` tokens of every sentence, END included."""
        return [[*tokens[: context - 1], END] for tokens in self._processor.encode(list(sentences))]

    def decode(self, items: Sequence[Sequence[int]]) -> list[str]:
        """The sentences of token numbers, as text that nobody has cut up."""
        return [self._processor.decode(list(tokens)) for tokens in items]


def train_vocabulary(sentences: Iterable[str], size: int) -> bytes:
    """The file of a vocabulary of `size` tokens (unigram); the same bytes for the same text.

    Raises `ValueError` where the text does not give that many.
    """
    written = io.BytesIO()
    try:
        _sentencepiece().SentencePieceTrainer.train(
            sentence_iterator=iter(sentences), model_writer=written, vocab_size=size, model_type="unigram",
            character_coverage=1.0, pad_id=PAD, unk_id=UNKNOWN, eos_id=END, bos_id=-1, num_threads=1, minloglevel=2,
            input_sentence_size=2_000_000, shuffle_input_sentence=False,
        )  # fmt: skip
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"data.vocabulary: no vocabulary of {size} tokens from this text: {reason}") from error
    return written.getvalue()


def _sentencepiece() -> Any:
    try:
        import sentencepiece
    except ImportError as error:
        raise ValueError("data=translation needs sentencepiece: pip install 'nmflow[translation]'") from error
    return sentencepiece
