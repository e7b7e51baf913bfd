"""What the paper prints: its tables, every value with its digits."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib import resources
from typing import Any

import yaml


@dataclass(frozen=True)
class PaperTable:
    """One table of Bambhaniya et al. 2025, by rows and columns."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: dict[str, tuple[str, ...]]
    """The values of a row, in the order of the columns, as printed."""
    measure: str | None = None
    dense: str | None = None
    """The same measure of the dense network, where the table has one for all rows."""
    note: str | None = None

    def value(self, row: str, column: str) -> str:
        """One value, as printed. Raises `KeyError` where the table has none.

        >>> paper_tables()["table-2"].value("ff=1:16", "mdgf-exponential")
        '77.325'
        """
        values = dict(zip(self.columns, self.rows[row], strict=True))
        return values[column]


def half_unit(printed: str) -> float:
    """Half a unit of the last printed digit: how far a value may lie from what was printed.

    >>> half_unit("77.325"), half_unit(".709"), half_unit("64")
    (0.0005, 0.0005, 0.5)
    """
    return 0.5 * 10.0 ** -len(printed.partition(".")[2])


@functools.cache
def paper_tables() -> dict[str, PaperTable]:
    """Every table, by name (`table-2`)."""
    text = resources.files(__package__).joinpath("paper.yaml").read_text(encoding="utf-8")
    return {name: _table(name, **entry) for name, entry in yaml.load(text, Loader=yaml.BaseLoader).items()}


def _table(name: str, columns: list[str], rows: dict[str, str], **texts: Any) -> PaperTable:
    values = {row: tuple(line.split()) for row, line in rows.items()}
    for row, line in values.items():
        if len(line) != len(columns):
            raise ValueError(f"paper.yaml, {name}, {row}: {len(line)} values for {len(columns)} columns")
    return PaperTable(name, columns=tuple(columns), rows=values, **texts)
