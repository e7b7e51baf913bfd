"""The nine tasks of GLUE: where their sentences and labels stand, which files are read, and how each is judged."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from nmflow.train.objectives import Classify, Objective, Regress

HIGHEST = 5.0
"""Scores of STS-B go from 0 to this."""


@dataclass(frozen=True)
class Task:
    """One task: which columns are the sentences and the label, what its labels are, and how it is judged."""

    sentences: tuple[str, ...]
    label: str
    labels: tuple[str, ...] = ("0", "1")
    """As the files write them, class 0 first; none for a number."""
    measures: tuple[str, ...] = ("accuracy",)
    columns: tuple[str, ...] = ()
    """Of files without a head."""
    test: str = "dev"
    further: Mapping[str, str] = field(default_factory=dict)
    """Files that are tested on besides, by what results call them."""
    hub_sentences: tuple[str, ...] = ()
    """Columns of the sentences as `datasets` has them; none: the same names."""
    hub_labels: tuple[str, ...] = ()
    """Names of the classes there; none: the same names."""

    @property
    def objective(self) -> Objective:
        return Classify(self.measures) if self.labels else Regress(self.measures)

    @property
    def label_text(self) -> str:
        """What a label has to be, for people."""
        what = f"one of {', '.join(self.labels)}" if self.labels else f"a score from 0 to {HIGHEST:g}"
        return f"as its label {what}"


Row = tuple[tuple[str, ...], float]
"""Sentences, and the number of the class or the score."""


@dataclass(frozen=True)
class Table:
    """The items of one split, and what a reader of results should know of them."""

    name: str
    rows: list[Row]
    notes: tuple[str, ...] = ()


_ENTAILMENT = ("entailment", "not_entailment")
_PAIR = ("sentence1", "sentence2")

TASKS: dict[str, Task] = {
    "CoLA": Task(("sentence",), "label", measures=("matthews", "accuracy"),
                 columns=("source", "label", "star", "sentence"), hub_labels=("unacceptable", "acceptable")),
    "SST-2": Task(("sentence",), "label", hub_labels=("negative", "positive")),
    "MRPC": Task(("#1 String", "#2 String"), "Quality", measures=("score", "accuracy", "f1"),
                 hub_sentences=_PAIR, hub_labels=("not_equivalent", "equivalent")),
    "STS-B": Task(_PAIR, "score", labels=(), measures=("score", "pearson", "spearman")),
    "QQP": Task(("question1", "question2"), "is_duplicate", measures=("score", "accuracy", "f1"),
                hub_labels=("not_duplicate", "duplicate")),
    "MNLI": Task(_PAIR, "gold_label", labels=("entailment", "neutral", "contradiction"), test="dev_matched",
                 further={"mismatched": "dev_mismatched"}, hub_sentences=("premise", "hypothesis")),
    "QNLI": Task(("question", "sentence"), "label", labels=_ENTAILMENT),
    "RTE": Task(_PAIR, "label", labels=_ENTAILMENT),
    "WNLI": Task(_PAIR, "label", hub_labels=("not_entailment", "entailment")),
}  # fmt: skip
"""By the name of the task's folder. Measures are GLUE's own; `score` is the mean of a pair of them."""


def task_name(text: str) -> str:
    """The task of a folder's name, whatever its case and hyphens.

    >>> task_name("sst2"), task_name("glue-mrpc"), task_name("CoLA")
    ('SST-2', 'MRPC', 'CoLA')
    """
    found = {plain_name(name): name for name in TASKS}.get(plain_name(text).removeprefix("glue"))
    if found is None:
        raise ValueError(f'data.path: its last part, "{text}", names no task of GLUE ({", ".join(TASKS)})')
    return found


def plain_name(text: str) -> str:
    """A name in small letters and digits alone, as the hub writes tasks.

    >>> plain_name("STS-B")
    'stsb'
    """
    return re.sub(r"[^a-z0-9]", "", text.lower())
