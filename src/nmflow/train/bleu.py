"""BLEU: the test split translated from its sources alone, and judged by sacrebleu against the lines of the file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from nmflow.train.config_sections import BleuConfig
from nmflow.train.data import Data
from nmflow.train.data.translation import PairSplit, References
from nmflow.train.data.vocabulary import VOCABULARY_FILE, Vocabulary
from nmflow.train.files import write_text
from nmflow.train.generation import translate

AGREEMENT = 0.5
"""Points of BLEU that one model's translations through dense and compressed kernels may lie apart."""


@dataclass(frozen=True)
class Translations:
    """The first sentences of a test split as a network translates them; none where none were asked for."""

    lines: tuple[str, ...] = ()
    bleu: float = 0.0
    """0 to 100."""
    how: dict[str, Any] | None = None
    """sacrebleu's signature and the settings."""

    def figures(self) -> dict[str, float]:
        """What stands among the measures of a test split."""
        return {"bleu": self.bleu} if self.lines else {}

    def described(self) -> dict[str, Any]:
        """How it was measured, for result.json."""
        return {"bleu": self.how} if self.lines else {}

    def write(self, path: Path) -> None:
        """A line a sentence, as sacrebleu reads it."""
        if self.lines:
            write_text(path, "\n".join(self.lines) + "\n")

    def agreement(self, other: Translations, path: Path) -> dict[str, int]:
        """How many lines are those of `other`, the same model from the file `path`.

        Sums in another order tip a token now and then that was as likely as the next. Raises `RuntimeError` where
        the two lie further apart than that: by more than 0.5 points, or what one sentence of few may count.
        """
        if not self.lines:
            return {}
        if abs(self.bleu - other.bleu) > max(AGREEMENT, 100 / len(self.lines)):
            raise RuntimeError(
                f"{path}: BLEU {other.bleu:.2f} on the test split, the model it was made from has {self.bleu:.2f}; "
                "this is a defect of nmflow"
            )
        return {"translations_alike": sum(a == b for a, b in zip(self.lines, other.lines, strict=True))}


def check_bleu(settings: BleuConfig, data: Data) -> None:
    """Raise `ValueError` where BLEU is asked for and could not be measured after training."""
    references = _references(settings, data)
    if references is None:
        return
    context = data.sample_shape[0]
    if settings.length is not None and settings.length > context:
        raise ValueError(f"bleu.length: {settings.length} is more than data.context, {context}, which is all it learns")
    if settings.sentences is not None and settings.sentences > len(references.lines):
        raise ValueError(f"bleu.sentences: test has {len(references.lines):,}; leave it out to translate them all")
    _metric(references.language)


def translate_test(model: nn.Module, data: Data, settings: BleuConfig) -> Translations:
    """The test split's first `bleu.sentences` sentences, translated, with their BLEU."""
    references, test = _references(settings, data), data.test
    if references is None or not isinstance(test, PairSplit):
        return Translations()
    count = settings.sentences or len(test)
    length = settings.length or data.sample_shape[0]
    targets = translate(model, test.sources(count), length, settings.beam)
    lines = Vocabulary(data.files[VOCABULARY_FILE]).decode(targets)
    metric = _metric(references.language)
    score = metric.corpus_score(lines, [list(references.lines[:count])]).score
    signature = metric.get_signature().format()
    how = {"signature": signature, "sentences": count, "beam": settings.beam, "length": length}
    return Translations(tuple(lines), score, how)


def _references(settings: BleuConfig, data: Data) -> References | None:
    """What translations are held against; None where none are asked for."""
    return data.test.references if isinstance(data.test, PairSplit) and settings.sentences != 0 else None


def _metric(language: str) -> Any:
    """sacrebleu's BLEU with the tokenizer that it gives a language."""
    try:
        from sacrebleu.metrics import BLEU

        return BLEU(trg_lang=language)
    except ImportError as error:
        missing = "sacrebleu", "nmflow[translation]"
        cause: Exception = error
    except RuntimeError as error:  # Japanese and Korean take more
        missing = f"sacrebleu's tokenizer of {language}", f"sacrebleu[{language}]"
        cause = error
    package, extra = missing
    raise ValueError(f"BLEU needs {package}: pip install '{extra}', or measure none: bleu.sentences=0") from cause
