"""glue: a task of GLUE from disk, in the official files or as `datasets` keeps it: what is train, val and test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from nmflow.train.config_sections import DataConfig
from nmflow.train.data.glue_arrow import is_hub_name, is_saved, load_cached, load_saved, read_arrow
from nmflow.train.data.glue_tasks import TASKS, Row, Table, Task, task_name
from nmflow.train.data.glue_tsv import read_tsv
from nmflow.train.data.sentences import SentenceSplit, encode, load_tokenizer
from nmflow.train.data.splits import Data, missing

DEFAULT_CONTEXT = 128
HELD_OUT = 10
"""Every so many-th item of train is validation: the labels of GLUE's own test sets are not public."""

LAYOUT = (
    "train.tsv and dev.tsv (for MNLI dev_matched.tsv and dev_mismatched.tsv), plain or .gz, in a folder named after "
    "its task, or there a DatasetDict of train and validation by save_to_disk"
)


def load_glue(config: DataConfig, tokenizer: str | None) -> Data:
    """One task: train but for every tenth item, which is val; the official dev set is test, its labels being public.

    The path's last part names the task (SST-2, MRPC, ...). MNLI is tested on both its dev sets; where the mismatched
    one is not there, results show it as missing. `tokenizer` is a folder or a name that transformers knows.
    Raises `FileNotFoundError` where no such data are found, `ValueError` where a file or the task is at fault.
    """
    path = Path(config.path or "")
    name = task_name(path.name)
    task = TASKS[name]
    encoder = load_tokenizer(tokenizer, "data=glue")
    context = config.context or DEFAULT_CONTEXT
    read = _reader(path, task)
    train, test = (_needed(read, split, path) for split in ("train", task.test))
    further = {called: read(split) for called, split in task.further.items()}
    held = train.rows[HELD_OUT - 1 :: HELD_OUT]
    if not held:
        raise ValueError(
            f"{path}, {train.name}: {len(train.rows)} items are too few to set every {HELD_OUT}th aside for val"
        )

    def encoded(rows: list[Row]) -> SentenceSplit:
        targets = torch.tensor([target for _, target in rows], dtype=torch.int64 if task.labels else torch.float32)
        return encode([sentences for sentences, _ in rows], targets, encoder, context)

    return Data(
        name=f"glue {name}",
        kind="sentences",
        objective=task.objective,
        train=encoded([row for place, row in enumerate(train.rows) if place % HELD_OUT != HELD_OUT - 1]),
        val=encoded(held),
        test=encoded(test.rows),
        further={called: encoded(table.rows) if table else None for called, table in further.items()},
        num_classes=max(1, len(task.labels)),
        sample_shape=(context,),
        notes=(
            f"val is every {HELD_OUT}th item of {train.name}, test is {test.name}",
            *(f"{called} is {table.name if table else 'missing'}" for called, table in further.items()),
            *(note for table in (train, test, *further.values()) if table for note in table.notes),
        ),
    )


Reader = Callable[[str], Table | None]
"""The items of a split by the name of its official file, none where it is not there."""


def _reader(path: Path, task: Task) -> Reader:
    if is_saved(path) or is_hub_name(path):
        splits = load_saved(path) if is_saved(path) else load_cached(path)
        return lambda split: read_arrow(splits, split, task, path)
    return lambda split: read_tsv(path, split, task)


def _needed(read: Reader, split: str, path: Path) -> Table:
    table = read(split)
    if table is None:
        raise missing(path / f"{split}.tsv", LAYOUT)
    return table
