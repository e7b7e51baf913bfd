"""What models are judged by: the name of each measure in results, how it is written, and which way is better."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Measure:
    """One measure. A `fraction` lies in 0..1 (correlations in -1..1) and is written in percent; others as they are."""

    label: str
    fraction: bool = True
    higher_is_better: bool = True
    counts: bool = False
    """It is the part of the items that are right."""

    def text(self, value: float | None, digits: int = 1) -> str:
        """A value for people.

        >>> MEASURES["accuracy"].text(0.9638), MEASURES["perplexity"].text(23.456), MEASURES["f1"].text(None)
        ('96.4 %', '23.5', 'missing')
        """
        if value is None:
            return "missing"
        return f"{100 * value:.{digits}f} %" if self.fraction else f"{value:.{digits}f}"

    def number(self, value: float | None, sign: bool = False, digits: int = 2) -> str:
        """The number alone, for a column whose head names the unit; nothing where there is none."""
        if value is None:
            return ""
        return f"{(100 if self.fraction else 1) * value:{'+' if sign else ''}.{digits}f}"

    @property
    def head(self) -> str:
        """The head of such a column."""
        return f"{self.label}, %" if self.fraction else self.label


MEASURES: dict[str, Measure] = {
    "accuracy": Measure("accuracy", counts=True),
    "top5": Measure("top-5 accuracy", counts=True),
    "f1": Measure("F1"),
    "matthews": Measure("Matthews correlation"),
    "pearson": Measure("Pearson correlation"),
    "spearman": Measure("Spearman correlation"),
    "score": Measure("score"),
    "perplexity": Measure("perplexity", fraction=False, higher_is_better=False),
    "bleu": Measure("BLEU", fraction=False),
}
"""By the name that stands in result.json and metrics.jsonl. `score` is GLUE's: the mean of a task's two measures."""

DEFAULT = "accuracy"
"""What results without a word on it are judged by."""


def main_measure(result: Mapping[str, Any]) -> str:
    """The name of the measure that a run is judged by."""
    return str(result.get("measure", DEFAULT))


def measures_of(score: Mapping[str, Any]) -> list[str]:
    """The names of all measures in one score, in its order."""
    return [name for name in score if name in MEASURES]


def further_scores(score: Mapping[str, Any]) -> dict[str, Mapping[str, Any] | None]:
    """The scores on further test splits that stand in a score, by name; none for a split that was not there.

    >>> further_scores({"loss": 0.5, "accuracy": 0.8, "items": 10, "mismatched": None})
    {'mismatched': None}
    """
    return {name: value for name, value in score.items() if value is None or isinstance(value, dict)}
