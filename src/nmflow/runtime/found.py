"""Which pattern a weight already has, where nobody has said: the tightest one that all of its blocks keep to."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

from nmflow.layout import to_rows
from nmflow.masks import block_counts
from nmflow.pattern import Pattern
from nmflow.runtime.blocks import finite_problems
from nmflow.targets import Candidate, Slot


def tightest(rows_RK: Tensor) -> Pattern | None:
    """The pattern of lowest density, then smallest M, that rows [R, K] have; None where none makes them smaller.

    M runs over the divisors of K up to 256 (one byte an offset), N is the largest count of non-zeros in a block:

        stored bytes = R·(K·N/M)·(bytes of a value + 1)  <  R·K·(bytes of a value)
    """
    num_rows, axis = rows_RK.shape
    patterns = []
    for m in range(2, min(axis, 256) + 1):
        if num_rows and axis % m == 0:
            fullest = int(block_counts(rows_RK, Pattern(1, m)).max())
            patterns.append(Pattern(max(fullest, 1), m))
    best = min(patterns, default=None)
    itemsize = rows_RK.element_size()
    if best is None or best.kept(axis) * (itemsize + 1) >= axis * itemsize:
        return None
    return best


def found_slots(known: Iterable[Candidate], weight_of: Callable[[str], Tensor]) -> tuple[Slot, ...]:
    """Slots for every candidate weight in which a pattern is found; row slices of one pattern are one slot.

    Biases, norms and embeddings are not looked at: they are compressed where somebody asks for it. Raises
    `ValueError` naming every weight that holds NaN or inf.
    """
    slots: list[Slot] = []
    problems: list[str] = []
    for candidate in known:
        if candidate.bare:
            continue
        weight = weight_of(candidate.name).detach()
        problems += finite_problems(candidate.name, weight)
        rows_RK = to_rows(weight, candidate.layout)
        slices = [rows or (0, rows_RK.shape[0]) for _, rows in candidate.slices()]
        found = [tightest(rows_RK[start:stop]) for start, stop in slices]
        if len(set(found)) == 1:
            found, slices = found[:1], [(0, rows_RK.shape[0])]
        for pattern, rows in zip(found, slices, strict=True):
            if pattern is not None:
                whole = None if len(slices) == 1 else rows
                slots.append(Slot(candidate.name, candidate.layout, candidate.shape, pattern, whole, "found"))
    if problems:
        raise ValueError("\n".join(problems))
    return tuple(slots)
