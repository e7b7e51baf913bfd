"""`nmflow bench gpu`: every place that there is time for; where there is no GPU, what would be measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nmflow.bench.gpu.cells import UNMEASURED, GpuCell
from nmflow.bench.gpu.device import GpuSetup, examine
from nmflow.bench.gpu.networks import measure_network, measure_training
from nmflow.bench.gpu.places import Place, places
from nmflow.bench.gpu.products import first_line, measure_masks, measure_product
from nmflow.bench.kernels import Tell
from nmflow.bench.results import markdown_table
from nmflow.bench.settings import GpuSettings

FORMAT, VERSION = "nmflow-bench-gpu", 1
_SAID = {
    "decode": "Products of few tokens, weights cold, in CUDA graphs",
    "masks": "The step from W to W~",
    "many": "Products of many tokens, in CUDA graphs",
    "shared": "Products whose rows share their columns by V, in CUDA graphs",
    "float32": "Float32, in CUDA graphs; F.linear without TF32 is what goals speak of",
    "train": "A training step, bfloat16 autocast",
    "network": "One forward of a network whose FF layers are sparse, compiled, in CUDA graphs",
}


@dataclass(frozen=True)
class GpuResult:
    """What `nmflow bench gpu` answers."""

    setup: GpuSetup
    cells: tuple[GpuCell, ...]

    def summary(self) -> list[str]:
        """For people, after the cells: goals reached, missed and not measured."""
        verdicts = [(cell, goal, found) for cell in self.cells for goal, found in cell.verdicts()]
        known = [(cell, goal, found) for cell, goal, found in verdicts if found is not None]
        missed = [(cell, goal, found) for cell, goal, found in known if not goal.reached(found)]
        unknown = len(verdicts) - len(known)
        lines = [f"goals: {len(known) - len(missed)} reached, {len(missed)} missed, {unknown} {UNMEASURED}"]
        for cell, goal, found in missed:
            wanted = f"goal {'at most' if goal.at_most else 'at least'} {goal.value:g}"
            lines.append(f"  {cell.place.name}: {found:.3g} {goal.figure}, {wanted}")
        return lines

    def markdown(self) -> str:
        """The same as a page: a table a part, every figure beside its goal, then every contender's time."""
        parts = ["# On a GPU", "", *(f"- {line}" for line in self.setup.lines()), ""]
        for part in dict.fromkeys(cell.place.part for cell in self.cells):
            mine = [cell for cell in self.cells if cell.place.part == part]
            names = list(dict.fromkeys(goal.figure for cell in mine for goal in cell.place.goals))
            counted = {"masks": [], "train": ["images"], "network": ["images"]}.get(part, ["tokens"])
            chosen = ["chosen"] if any(cell.way for cell in mine) else []
            rows = [
                [cell.place.what, cell.place.pattern, *([str(cell.place.tokens)] if counted else [])]
                + [_figure(cell, name) for name in names]
                + ([cell.way] if chosen else [])
                for cell in mine
            ]
            head = ["", "pattern", *counted, *names, *chosen]
            parts += [f"## {_SAID[part]}", "", *markdown_table(head, rows), ""]
        parts += ["## Goals", "", *(f"- {line.strip()}" for line in self.summary()), ""]
        if any(cell.us for cell in self.cells):
            parts += ["## Every contender", "", "```", *(cell.line() for cell in self.cells), "```", ""]
        return "\n".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "setup": self.setup.to_dict(),
            "cells": [cell.to_dict() for cell in self.cells],
        }

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> GpuResult:
        """The inverse of `to_dict`. Raises `ValueError` on anything else."""
        if (found.get("format"), found.get("version")) != (FORMAT, VERSION):
            raise ValueError(f"these are no results of nmflow bench gpu, version {VERSION}")
        return cls(GpuSetup(**found["setup"]), tuple(GpuCell.from_dict(cell) for cell in found["cells"]))


def bench_gpu(settings: GpuSettings, tell: Tell, keep: Callable[[GpuResult], object] | None = None) -> GpuResult:
    """Measure every place of `settings` on the current CUDA device; `tell` hears each line as soon as it is known.

    A place that fails is left unmeasured with the reason; so is what is left when the minutes are over. Without a
    device everything is. `keep` gets the whole result after every place, for a machine that may be taken away.
    """
    end = time.monotonic() + 60 * settings.minutes
    setup = examine()
    for line in setup.lines():
        tell(line)
    cells = {place: GpuCell(place) for place in places(settings)}
    for place in cells if setup.device is not None else ():
        over = time.monotonic() > end
        cells[place] = GpuCell(place, notes=("the minutes were over",)) if over else _measured(place)
        tell(cells[place].line())
        if keep is not None and not over:
            keep(GpuResult(setup, tuple(cells.values())))
    return GpuResult(setup, tuple(cells.values()))


def _measured(place: Place) -> GpuCell:
    try:
        if place.part == "masks":
            return measure_masks(place)
        if place.part == "train":
            return measure_training(place)
        return measure_network(place) if place.part == "network" else measure_product(place)
    except Exception as failure:  # of one place; the others are measured
        return GpuCell(place, notes=(f"failed: {first_line(failure)}",))
    finally:
        torch.cuda.empty_cache()


def _figure(cell: GpuCell, name: str) -> str:
    """The figure beside its goal, ! where it falls short."""
    goals = {goal.figure: goal for goal in cell.place.goals}
    found = cell.figures.get(name)
    goal = goals.get(name)
    text = UNMEASURED if found is None else f"{found:.3g}"
    if goal is None:
        return text
    return f"{text} / {goal.value:g}{' !' if found is not None and not goal.reached(found) else ''}"
