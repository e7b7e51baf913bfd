"""How the rows of one stored weight are divided: slices with a pattern, and the dense rows between them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from nmflow.layout import Layout, rows_shape
from nmflow.pattern import Pattern
from nmflow.targets import Slot


@dataclass(frozen=True)
class Part:
    """Rows [start, stop) of a weight, stored under `label`; `pattern` None where they stay dense."""

    label: str
    start: int
    stop: int
    pattern: Pattern | None
    rule: str = ""


@dataclass(frozen=True)
class StoredWeight:
    """A weight of which at least one row slice is compressed. Its parts cover all rows, in order."""

    name: str
    shape: tuple[int, ...]
    layout: Layout
    parts: tuple[Part, ...]

    @property
    def axis(self) -> int:
        """Length K of the reduction axis."""
        return rows_shape(self.shape, self.layout)[1]

    def slots(self) -> Iterator[Slot]:
        """The slots that these parts came from."""
        for part in self.parts:
            if part.pattern is not None:
                rows = None if len(self.parts) == 1 else (part.start, part.stop)
                yield Slot(self.name, self.layout, self.shape, part.pattern, rows, part.rule)


def stored_weights(slots: Iterable[Slot]) -> tuple[StoredWeight, ...]:
    """The weights that these slots describe, in their order; dense slots are left out.

    Raises `ValueError` listing all problems: slots of one weight that differ in shape or layout, or overlap.

    >>> [weight] = stored_weights([Slot("qkv.weight", "rows", (12, 4), Pattern(1, 4), (0, 4))])
    >>> [(part.label, str(part.pattern)) for part in weight.parts]
    [('qkv.weight[0:4]', '1:4'), ('qkv.weight[4:12]', 'None')]
    """
    by_name: dict[str, list[Slot]] = {}
    for slot in slots:
        if not slot.pattern.is_dense:
            by_name.setdefault(slot.name, []).append(slot)
    problems: list[str] = []
    weights = tuple(_divide(name, mine, problems) for name, mine in by_name.items())
    if problems:
        raise ValueError("\n".join(problems))
    return weights


def _divide(name: str, slots: list[Slot], problems: list[str]) -> StoredWeight:
    shape, layout = slots[0].shape, slots[0].layout
    if any((slot.shape, slot.layout) != (shape, layout) for slot in slots):
        problems.append(f"{name}: its slots disagree about its shape or layout")
    num_rows = rows_shape(shape, layout)[0]
    parts: list[Part] = []
    end = 0
    for slot in sorted(slots, key=lambda slot: slot.row_range):
        start, stop = slot.row_range
        if start < end:
            problems.append(f"{slot.label}: its rows are part of another slot too")
        if start > end:
            parts.append(Part(f"{name}[{end}:{start}]", end, start, None))
        whole = (start, stop) == (0, num_rows)
        parts.append(Part(name if whole else f"{name}[{start}:{stop}]", start, stop, slot.pattern, slot.rule))
        end = stop
    if end < num_rows:
        parts.append(Part(f"{name}[{end}:{num_rows}]", end, num_rows, None))
    return StoredWeight(name, shape, layout, tuple(parts))
