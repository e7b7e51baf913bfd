"""What rules take of a network and what stays dense, a line for weights that differ in a number alone; and the sums."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from nmflow.flops import FlopsReport
from nmflow.layout import rows_shape
from nmflow.report.columns import columns, short, starred
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
    count: int = 0
    kept: int = 0
    """Weights kept of all of them."""
    flops: int = 0
    """Of their products in a forward, dense; 0 where none was counted."""
    flops_kept: int = 0

    @property
    def weights(self) -> int:
        return self.count * self.rows * self.axis


@dataclass(frozen=True)
class Forward:
    """A network's products on an example."""

    example: str
    """What it was, in words."""
    report: FlopsReport


@dataclass(frozen=True)
class CoverageReport:
    """What `nmflow targets` answers."""

    model: str
    groups: tuple[Group, ...]
    parameters: int
    others: int
    """Parameters that no role reaches: biases, norms, embeddings."""
    forward: Forward | str
    """Or why it was not counted."""

    @property
    def kept(self) -> int:
        """Parameters of the network that are not zero in the end."""
        return self.others + sum(group.kept for group in self.groups)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        forward: dict[str, Any] = {"why_not": self.forward}
        if isinstance(self.forward, Forward):
            report = self.forward.report
            forward = {"example": self.forward.example, "dense": report.dense.total, "sparse": report.total}
        return {
            "model": self.model,
            "groups": [{**asdict(group), "weights": group.weights} for group in self.groups],
            "parameters": self.parameters,
            "others": self.others,
            "kept": self.kept,
            "flops": forward,
        }

    def lines(self) -> list[str]:
        """A table, what is left over, and the sums."""
        headings = ("weights", "", "role", "rows x axis", "pattern", "parameters", "kept", "FLOPs", "kept", "")
        rows: list[tuple[str, ...]] = [headings]
        for group in self.groups:
            taken = group.pattern is not None
            rows.append(
                (group.name, f"{group.count}", group.roles or "-", f"{group.rows} x {group.axis}",
                 group.pattern or "dense", f"{group.weights:,}", f"{group.kept:,}", short(group.flops),
                 short(group.flops_kept), "" if taken else group.why)
            )  # fmt: skip
        if isinstance(self.forward, str):
            rows = [(*row[:7], row[-1]) for row in rows]
        sparse = [group for group in self.groups if group.pattern is not None]
        return [
            *columns(rows, right={1, 5, 6, *((7, 8) if isinstance(self.forward, Forward) else ())}),
            f"others (biases, norms, embeddings: sparse by exact name alone): {self.others:,}",
            self._flops_line(),
            f"{self.model}: {sum(group.weights for group in sparse):,} of {self.parameters:,} parameters are N:M; "
            f"{self.kept:,} are kept, {100 * self.kept / max(self.parameters, 1):.1f} %",
        ]

    def _flops_line(self) -> str:
        if isinstance(self.forward, str):
            return f"FLOPs are not counted: {self.forward}"
        report = self.forward.report
        was, now = report.dense.total, report.total
        rest = was - sum(group.flops for group in self.groups)
        return (
            f"FLOPs of {self.forward.example}: {short(was)}, {short(rest)} of them in products without these weights; "
            f"{short(now)} are kept, {100 * now / max(was, 1):.1f} %"
        )


def report_coverage(
    model: str, candidates: Sequence[Candidate], coverage: Coverage, forward: Forward | str
) -> CoverageReport:
    """Group what `resolve` found; `candidates` are those of the network, `forward` its FLOPs by the same rules."""
    taken = {slot.label: (str(slot.pattern), slot.pattern.kept(slot.axis), slot.rule) for slot in coverage.slots}
    layers = forward.report.layers if isinstance(forward, Forward) else ()
    groups: dict[Group, Group] = {}
    others = 0
    for candidate in candidates:
        height, axis = rows_shape(candidate.shape, candidate.layout) if len(candidate.shape) > 1 else (1, 0)
        whole = candidate.name in taken
        if candidate.bare and not whole:
            others += math.prod(candidate.shape)
            continue
        mine = [layer for layer in layers if layer.parameter == candidate.name]
        for label, roles, (start, stop) in _parts(candidate, height, whole, taken, coverage):
            pattern, kept_of_row, rule = taken.get(label, (None, axis, ""))
            why = rule or coverage.dense.get(label, coverage.dense.get(candidate.name, ""))
            inside = [layer for layer in mine if layer.rows is None or start <= layer.rows[0] < stop]
            key = Group(starred(label), roles, stop - start, axis, pattern, why)
            so_far = groups.get(key, key)
            groups[key] = replace(
                so_far,
                count=so_far.count + 1,
                kept=so_far.kept + (stop - start) * kept_of_row,
                flops=so_far.flops + sum(layer.forward for layer in inside),
                flops_kept=so_far.flops_kept + sum(layer.total for layer in inside),
            )
    parameters = sum(math.prod(candidate.shape) for candidate in candidates)
    return CoverageReport(model, tuple(groups.values()), parameters, others, forward)


def _parts(
    candidate: Candidate, height: int, whole: bool, taken: dict[str, Any], coverage: Coverage
) -> Iterable[tuple[str, str, tuple[int, int]]]:
    """(label, roles, rows) of what stands on a line of its own: the whole weight, or its slices where they differ."""
    slices = [(f"{candidate.name}[{part[0]}:{part[1]}]", role, part) for role, part in candidate.slices() if part]
    parted = any(label in taken or label in coverage.dense for label, _, _ in slices)
    if whole or not parted:
        yield candidate.name, " ".join(candidate.roles), (0, height)
    else:
        yield from slices
