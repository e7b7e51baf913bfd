"""What rules take of a network and what stays dense, a line for weights that differ in a number alone; and the sums."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nmflow.layout import rows_shape
from nmflow.targets import Candidate, Coverage


@dataclass(frozen=True)
class Group:
    """Weights (or equal row slices of them) that differ in the numbers of their names alone."""

    name: str
    """With `*` for the numbers: `blocks.*.mlp.fc1.weight`."""
    roles: str
    rows: int
    axis: int
    pattern: str | None
    """None where they stay dense."""
    why: str
    """The rule that took them, or why they stay dense."""
    count: int
    kept: int
    """Weights kept of all of them."""

    @property
    def weights(self) -> int:
        return self.count * self.rows * self.axis


@dataclass(frozen=True)
class CoverageReport:
    """What `nmflow targets` answers."""

    model: str
    groups: tuple[Group, ...]
    parameters: int
    others: int
    """Parameters that no role reaches: biases, norms, embeddings."""

    @property
    def kept(self) -> int:
        """Parameters of the network that are not zero in the end."""
        return self.others + sum(group.kept for group in self.groups)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        groups = [{**asdict(group), "weights": group.weights} for group in self.groups]
        return {**asdict(self), "groups": groups, "kept": self.kept}

    def lines(self) -> list[str]:
        """A table, what is left over, and the sums."""
        rows = [("weights", "", "role", "rows x axis", "pattern", "parameters", "kept", "")]
        for group in self.groups:
            taken = group.pattern is not None
            rows.append(
                (group.name, f"{group.count}", group.roles or "-", f"{group.rows} x {group.axis}",
                 group.pattern or "dense", f"{group.weights:,}", f"{group.kept:,}", "" if taken else group.why)
            )  # fmt: skip
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        right = {1, 5, 6}
        table = [
            "  ".join(
                cell.rjust(width) if place in right else cell.ljust(width)
                for place, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        sparse = [group for group in self.groups if group.pattern is not None]
        return [
            *table,
            f"others (biases, norms, embeddings: sparse by exact name alone): {self.others:,}",
            f"{self.model}: {sum(group.weights for group in sparse):,} of {self.parameters:,} parameters are N:M; "
            f"{self.kept:,} are kept, {100 * self.kept / max(self.parameters, 1):.1f} %",
        ]


def report_coverage(model: str, candidates: Sequence[Candidate], coverage: Coverage) -> CoverageReport:
    """Group what `resolve` found; `candidates` are those of the network."""
    taken = {slot.label: (str(slot.pattern), slot.pattern.kept(slot.axis), slot.rule) for slot in coverage.slots}
    groups: dict[tuple[Any, ...], Group] = {}
    others = 0
    for candidate in candidates:
        height, axis = rows_shape(candidate.shape, candidate.layout) if len(candidate.shape) > 1 else (1, 0)
        whole = candidate.name in taken
        if candidate.bare and not whole:
            others += math.prod(candidate.shape)
            continue
        for label, roles, rows in _parts(candidate, height, whole, taken, coverage):
            pattern, kept_of_row, rule = taken.get(label, (None, axis, ""))
            why = rule or coverage.dense.get(label, coverage.dense.get(candidate.name, ""))
            name = re.sub(r"(?:(?<=\.)|^)\d+(?=\.)", "*", label)
            key = (name, roles, rows, axis, pattern, why)
            before = groups.get(key)
            count = before.count + 1 if before else 1
            groups[key] = Group(name, roles, rows, axis, pattern, why, count, count * rows * kept_of_row)
    parameters = sum(math.prod(candidate.shape) for candidate in candidates)
    return CoverageReport(model, tuple(groups.values()), parameters, others)


def _parts(
    candidate: Candidate, height: int, whole: bool, taken: dict[str, Any], coverage: Coverage
) -> Iterable[tuple[str, str, int]]:
    """(label, roles, rows) of what stands on a line of its own: the whole weight, or its slices where they differ."""
    slices = [(f"{candidate.name}[{part[0]}:{part[1]}]", role, part) for role, part in candidate.slices() if part]
    parted = any(label in taken or label in coverage.dense for label, _, _ in slices)
    if whole or not parted:
        yield candidate.name, " ".join(candidate.roles), height
        return
    for label, role, (start, stop) in slices:
        yield label, role, stop - start
