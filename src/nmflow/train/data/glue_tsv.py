"""GLUE as it is downloaded: files of tab-separated columns in a folder named after its task."""

from __future__ import annotations

from pathlib import Path

from nmflow.train.data.glue_tasks import HIGHEST, Row, Table, Task
from nmflow.train.data.lines import lines_of

BROKEN = 0.001
"""Part of a file's lines that may lack columns; QQP's official train file has a few such."""


def read_tsv(folder: Path, split: str, task: Task) -> Table | None:
    """The items of a split, plain or .gz, none where it has no file. Quotes mean nothing in these files.

    Raises `ValueError` where columns are missing, or more than one line in a thousand is broken.
    """
    path = next((file for end in ("tsv", "tsv.gz") if (file := folder / f"{split}.{end}").is_file()), None)
    if path is None:
        return None
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
        target = _target(cells[places[-1]], task) if len(cells) == len(head) else None
        if target is None:
            broken.append(number)
            continue
        rows.append((tuple(cells[place] for place in places[:-1]), target))
    if not rows or len(broken) > BROKEN * number:
        several = f"{len(broken)} lines, the first of them " if len(broken) > 1 else ""
        what = f"{several}line {broken[0]} cannot be read" if broken else "no lines below the names of the columns"
        raise ValueError(f"{path}: {what}; a line has {len(head)} columns, parted by tabs, and {task.label_text}")
    notes = (f"{path.name}: {len(broken)} broken lines left out",) if broken else ()
    return Table(path.name, rows, notes)


def _target(text: str, task: Task) -> float | None:
    """The class or the score that a cell names, none where it names none."""
    if task.labels:
        return task.labels.index(text) if text in task.labels else None
    try:
        score = float(text)
    except ValueError:
        return None
    return score if 0 <= score <= HIGHEST else None
