"""`nmflow flops`: a line for layers that differ in a number alone, the sums by kind, and what a run costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nmflow.flops import FlopsReport, LayerFlops, Stretch
from nmflow.report.columns import columns, short, starred


@dataclass(frozen=True)
class FlopsAnswer:
    """What `nmflow flops` answers."""

    model: str
    example: str
    """What the network was counted on."""
    report: FlopsReport
    recipe: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {"model": self.model, "example": self.example, "recipe": self.recipe, **self.report.to_dict()}

    def lines(self) -> list[str]:
        """Tables and sums. FLOPs of a forward, then those of the run."""
        report, dense = self.report, self.report.dense
        sums = [(kind, flops, report.by_kind[kind]) for kind, flops in dense.by_kind.items()]
        sums += [("all blocks", dense.blocks, report.blocks)] if dense.blocks else []
        sums += [("everything", dense.total, report.total)]
        shares = [(name, short(was), short(now), f"{100 * now / max(was, 1):.1f} %") for name, was, now in sums]
        return [
            f"{self.model}, a forward on {self.example}",
            "",
            *columns([("layers", "", "", "pattern", "dense", "sparse"), *_groups(report.layers)], right={1, 4, 5}),
            "",
            *columns([("", "dense", "sparse", ""), *shares], right={1, 2, 3}),
            *([f"not counted, for no formula is known: {', '.join(report.unknown)}"] if report.unknown else []),
            *(self._training(report.schedule) if report.schedule is not None else ()),
        ]

    def _training(self, schedule: tuple[Stretch, ...]) -> Iterator[str]:
        rows: list[tuple[str, ...]] = [("steps", "phase", "a step", "forward", "input gradients", "weight gradients")]
        for one in schedule:
            parts = (one.step, one.forward, one.input_gradient, one.weight_gradient)
            rows.append((f"{one.start:,}-{one.end - 1:,}", one.phase, *map(short, parts)))
        yield ""
        yield from columns(rows, right={2, 3, 4, 5})
        now, was = self.report.training or 0, self.report.dense.training or 0
        yield (
            f"training, {schedule[-1].end:,} steps by {self.recipe}: {short(now)}, {100 * now / max(was, 1):.1f} % "
            f"of {short(was)} for as many dense ones"
        )


def _groups(layers: tuple[LayerFlops, ...]) -> list[tuple[str, ...]]:
    """Rows of the table: layers (or weights) of one pattern that differ in the numbers of their names alone."""
    found: dict[tuple[str, str], list[LayerFlops]] = {}
    for layer in layers:
        found.setdefault((starred(layer.parameter or layer.layer), str(layer.pattern)), []).append(layer)
    rows = []
    for (name, pattern), group in found.items():
        count = len({layer.layer for layer in group})
        kinds = " ".join(dict.fromkeys(layer.kind for layer in group))
        sums = (sum(layer.forward for layer in group), sum(layer.total for layer in group))
        rows.append((name or "(itself)", f"{count}", kinds, pattern, *map(short, sums)))
    return rows
