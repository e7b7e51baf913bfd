"""GLUE as Hugging Face's `datasets` has it: a folder by `save_to_disk`, or a data set by its name on the hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nmflow.train.data.glue_tasks import HIGHEST, Table, Task, plain_name

Splits = Mapping[str, Any]
"""A DatasetDict; there are no types to name."""


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote this folder."""
    return (folder / "dataset_dict.json").is_file()


def is_hub_name(path: Path) -> bool:
    """Whether a path can only be OWNER/DATASET/TASK, such as nyu-mll/glue/mrpc."""
    return len(path.parts) == 3 and not path.is_absolute() and not Path(path.parts[0]).exists()


def load_saved(folder: Path) -> Splits:
    """The splits of a folder. Raises `ValueError` where `datasets` is missing or cannot read it."""
    datasets = _datasets(f"{folder} was written by datasets, and to read it")
    try:
        splits: Splits = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: cannot be read: {error}") from error
    return splits


def load_cached(path: Path) -> Splits:
    """The splits of OWNER/DATASET/TASK as `datasets` loads them: from the hub, else from its cache.

    Raises `ValueError` where `datasets` is missing, `FileNotFoundError` with the line that fetches the data.
    """
    owner, task = path.parent.as_posix(), plain_name(path.name)
    datasets = _datasets(f"there is no folder {path}, and to look for the data set {owner}")
    try:
        splits: Splits = datasets.load_dataset(owner, task)
    except (OSError, ValueError, RuntimeError) as error:
        fetch = f"import datasets; datasets.load_dataset('{owner}', '{task}').save_to_disk('glue_data/{path.name}')"
        raise FileNotFoundError(
            f"{path}: there is no such folder, and no data set {owner} with {task} was found "
            f'({str(error).splitlines()[0]}); fetch it: python -c "{fetch}"'
        ) from error
    return splits


def read_arrow(splits: Splits, split: str, task: Task, source: Path) -> Table | None:
    """The items of a split, none where there is no such split; GLUE's dev is called validation here.

    Raises `ValueError` where columns, classes or labels are not the task's: those of hidden test sets are -1.
    """
    name = split.replace("dev", "validation")
    if name not in splits:
        return None
    data, where = splits[name], f"{source}, {name}"
    columns = task.hub_sentences or task.sentences
    absent = [column for column in (*columns, "label") if column not in data.column_names]
    if absent:
        raise ValueError(f"{where}: no column {' and '.join(absent)}; its columns are {', '.join(data.column_names)}")
    classes = getattr(data.features["label"], "names", None)
    expected = task.hub_labels or task.labels
    if classes is not None and tuple(classes) != expected:
        raise ValueError(f"{where}: its classes are {', '.join(classes)}, not {', '.join(expected) or 'scores'}")
    sentences = zip(*(data[column] for column in columns), strict=True)
    rows = list(zip(sentences, data["label"], strict=True))
    highest = len(task.labels) - 1 if task.labels else HIGHEST
    for place, (texts, target) in enumerate(rows):
        if not isinstance(target, int | float) or not 0 <= target <= highest or None in texts:
            raise ValueError(
                f"{where}, row {place}: label {target} of {texts}; expected text and a label from 0 to {highest:g} "
                "(-1 stands for the hidden labels of GLUE's own test sets)"
            )
    return Table(name, rows)


def _datasets(why: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"{why} needs datasets: pip install 'nmflow[datasets]'") from error
    return datasets
