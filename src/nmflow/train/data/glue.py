"""glue: the nine tasks of GLUE, from the official TSV layout on disk."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from nmflow.train.config import DataConfig
from nmflow.train.data.lines import lines_of
from nmflow.train.data.sentences import SentenceSplit, Tokenizer, encode, load_tokenizer
from nmflow.train.data.splits import Data, missing
from nmflow.train.objectives import Classify, Objective, Regress

DEFAULT_CONTEXT = 128
BROKEN = 0.001
"""Part of a file's lines that may lack columns; QQP's official train file has a few such."""
HELD_OUT = 10
"""Every so many-th line of train is validation: the labels of GLUE's own test files are not public."""


@dataclass(frozen=True)
class Task:
    """One task: which columns of its files are the sentences and the label, and how it is judged."""

    sentences: tuple[str, ...]
    label: str
    labels: tuple[str, ...] = ("0", "1")
    """As the files write them, class 0 first; none for a number."""
    measures: tuple[str, ...] = ("accuracy",)
    columns: tuple[str, ...] = ()
    """Of files without a head."""
    test: str = "dev"

    @property
    def objective(self) -> Objective:
        return Classify(self.measures) if self.labels else Regress(self.measures)


_ENTAILMENT = ("entailment", "not_entailment")
_PAIR = ("sentence1", "sentence2")

TASKS: dict[str, Task] = {
    "CoLA": Task(("sentence",), "label", measures=("matthews", "accuracy"),
                 columns=("source", "label", "star", "sentence")),
    "SST-2": Task(("sentence",), "label"),
    "MRPC": Task(("#1 String", "#2 String"), "Quality", measures=("score", "accuracy", "f1")),
    "STS-B": Task(_PAIR, "score", labels=(), measures=("score", "pearson", "spearman")),
    "QQP": Task(("question1", "question2"), "is_duplicate", measures=("score", "accuracy", "f1")),
    "MNLI": Task(_PAIR, "gold_label", labels=("entailment", "neutral", "contradiction"), test="dev_matched"),
    "MNLI-MM": Task(_PAIR, "gold_label", labels=("entailment", "neutral", "contradiction"), test="dev_mismatched"),
    "QNLI": Task(("question", "sentence"), "label", labels=_ENTAILMENT),
    "RTE": Task(_PAIR, "label", labels=_ENTAILMENT),
    "WNLI": Task(_PAIR, "label"),
}  # fmt: skip
"""By the name of the task's folder. Measures are GLUE's own (docs/method.md); `score` is the mean of a pair of them."""

LAYOUT = "train.tsv and dev.tsv (for MNLI dev_matched.tsv), plain or .gz, in a folder named after its task"


def load_glue(config: DataConfig, tokenizer: str | None) -> Data:
    """One task: train but for every tenth line, which is val; the official dev file is test, its labels being public.

    The path's last part names the task (SST-2, MRPC, ...). `tokenizer` is a folder or a name that transformers knows.
    Raises `FileNotFoundError` where no such files are found, `ValueError` where a file or the task is at fault.
    """
    folder = Path(config.path or "")
    name = task_name(folder.name)
    task = TASKS[name]
    folder = folder.with_name("MNLI") if name == "MNLI-MM" and not folder.is_dir() else folder
    files = [_file(folder, split) for split in ("train", task.test)]
    encoder = load_tokenizer(tokenizer, "data=glue")
    context = config.context or DEFAULT_CONTEXT
    (train, train_notes), (test, test_notes) = (_read(file, task) for file in files)
    held = [row for place, row in enumerate(train) if place % HELD_OUT == HELD_OUT - 1]
    if not held:
        raise ValueError(f"{files[0]}: {len(train)} items are too few to set every {HELD_OUT}th aside for val")
    kept = [row for place, row in enumerate(train) if place % HELD_OUT != HELD_OUT - 1]
    return Data(
        name=f"glue {name}",
        kind="sentences",
        objective=task.objective,
        train=_split(kept, task, encoder, context),
        val=_split(held, task, encoder, context),
        test=_split(test, task, encoder, context),
        num_classes=max(1, len(task.labels)),
        sample_shape=(context,),
        notes=(
            f"val is every {HELD_OUT}th line of {files[0].name}, test is {files[1].name}",
            *train_notes,
            *test_notes,
        ),
    )


def task_name(text: str) -> str:
    """The task of a folder's name, whatever its case and hyphens.

    >>> task_name("sst2"), task_name("MNLI_mm"), task_name("CoLA")
    ('SST-2', 'MNLI-MM', 'CoLA')
    """
    plain = {re.sub(r"[^a-z0-9]", "", name.lower()): name for name in TASKS}
    found = plain.get(re.sub(r"[^a-z0-9]", "", text.lower()))
    if found is None:
        raise ValueError(f'data.path: its last part, "{text}", names no task of GLUE ({", ".join(TASKS)})')
    return found


def _file(folder: Path, split: str) -> Path:
    for name in (f"{split}.tsv", f"{split}.tsv.gz"):
        if (folder / name).is_file():
            return folder / name
    raise missing(folder / f"{split}.tsv", LAYOUT)


Row = tuple[tuple[str, ...], str]
"""Sentences, and the label as the file writes it."""


def _read(path: Path, task: Task) -> tuple[list[Row], tuple[str, ...]]:
    """The items of a file, and a note on lines that were left out. Quotes mean nothing in these files."""
    lines = (line.split("\t") for line in lines_of(path))
    head = task.columns or tuple(next(lines, ()))
    wanted = (*task.sentences, task.label)
    absent = [name for name in wanted if name not in head]
    if absent:
        raise ValueError(f"{path}: no column {' and '.join(absent)}; its columns are {', '.join(head)}")
    places = [head.index(name) for name in wanted]
    rows: list[Row] = []
    broken: list[int] = []
    number = 0
    for number, cells in enumerate(lines, start=1 if task.columns else 2):
        if len(cells) != len(head) or not _is_label(cells[places[-1]], task):
            broken.append(number)
            continue
        *sentences, label = (cells[place] for place in places)
        rows.append((tuple(sentences), label))
    if not rows or len(broken) > BROKEN * number:
        what = f"{len(broken)} of its lines, the first {broken[0]}," if broken else "it"
        allowed = f" and a label of {', '.join(task.labels) or 'any finite number'}"
        raise ValueError(f"{path}: {what} lack{'' if broken else 's'} {len(head)} columns{allowed}")
    return rows, (f"{path.name}: {len(broken)} broken lines left out",) if broken else ()


def _is_label(text: str, task: Task) -> bool:
    if task.labels:
        return text in task.labels
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _split(rows: list[Row], task: Task, tokenizer: Tokenizer, context: int) -> SentenceSplit:
    if task.labels:
        numbers = {label: number for number, label in enumerate(task.labels)}
        targets = torch.tensor([numbers[label] for _, label in rows])
    else:
        targets = torch.tensor([float(label) for _, label in rows])
    return encode([sentences for sentences, _ in rows], targets, tokenizer, context)
