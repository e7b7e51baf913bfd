"""The paper's tables of FLOPs and parameters, counted from ViT-Base itself, beside what is printed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nmflow.experiments.catalogue import Table
from nmflow.experiments.cells import setup
from nmflow.experiments.paper import half_unit
from nmflow.flops import count_flops
from nmflow.models.skeleton import skeleton
from nmflow.report.coverage import Forward, report_coverage
from nmflow.report.tables import markdown
from nmflow.targets import Coverage, candidates

GIGA, MEGA = 1e9, 1e6


@dataclass(frozen=True)
class Counted:
    """A table of the paper that is counted, value by value."""

    table: Table
    values: dict[str, tuple[float, ...]]

    @classmethod
    def of(cls, table: Table) -> Counted:
        """Count it. Raises `ValueError` where timm, which has ViT-Base, is missing."""
        return cls(table, flops_table(table.name))

    def misses(self) -> list[str]:
        """Values that are further than 0.5 % and further than one unit of the last printed digit from the paper's."""
        assert self.table.paper is not None
        found = []
        for row, printed in self.table.paper.rows.items():
            for column, text, value in zip(self.table.columns, printed, self.values[row], strict=True):
                if abs(value - float(text)) > max(2 * half_unit(text), 0.005 * float(text)):
                    found.append(f"{row}, {column}: printed {text}, counted {value:.4f}")
        return found

    def lines(self) -> list[str]:
        """For people: printed and counted side by side, and the verdict."""
        assert self.table.paper is not None
        rows = [["", *self.table.columns]]
        for row, printed in self.table.paper.rows.items():
            pairs = zip(printed, self.values[row], strict=True)
            rows.append([row, *(f"{text} / {value:.{len(text.partition('.')[2]) + 1}f}" for text, value in pairs)])
        misses = self.misses()
        count = sum(map(len, self.table.paper.rows.values()))
        verdict = f"all {count} values agree to one unit of the last printed digit or 0.5 %"
        title = f"{self.table.name}: {self.table.title}"
        note = [self.table.paper.note] if self.table.paper.note else []
        return [title, "", *markdown(rows), "", "printed / counted", *(misses or [verdict]), *note]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        assert self.table.paper is not None
        return {
            "format": 1,
            "title": self.table.title,
            "cells": [
                {"row": row, "column": column, "paper": text, "counted": value}
                for row, printed in self.table.paper.rows.items()
                for column, text, value in zip(self.table.columns, printed, self.values[row], strict=True)
            ],
            "misses": self.misses(),
        }

    def draw(self, path: Path) -> bool:
        """Numbers that agree make no picture."""
        return False


def flops_table(name: str) -> dict[str, tuple[float, ...]]:
    """The values of table-1, table-17 or table-18, by row, in the paper's units.

    Of the blocks alone, with 196 tokens: without class token, patch embedding and head. A multiply-add is two FLOPs.
    """
    return {"table-1": _table_1, "table-17": _table_17, "table-18": _table_18}[name]()


def _table_1() -> dict[str, tuple[float, ...]]:
    vit = _vit_base()
    report = count_flops(vit, _image())
    groups = report_coverage("ViT-Base", candidates(vit), Coverage(()), Forward("an image", report)).groups
    parts = {"Q, K, V and O": ("q k v", "o"), "FF1 and FF2": ("ff",)}
    flops = {part: sum(each.flops for each in groups if each.roles in roles) for part, roles in parts.items()}
    weights = {part: sum(each.weights for each in groups if each.roles in roles) for part, roles in parts.items()}
    flops = {"Logit and Attend": report.blocks - sum(flops.values()), **flops}
    every = sum(weights.values())
    return {
        part: (
            count / GIGA, 100 * count / report.blocks, weights.get(part, 0) / MEGA, 100 * weights.get(part, 0) / every
        )
        for part, count in flops.items()
    }  # fmt: skip


def _table_17() -> dict[str, tuple[float, ...]]:
    report = count_flops(_vit_base(), _image())
    kinds = {kind: flops for kind, flops in report.by_kind.items() if kind != "other"}
    rows = {kind: flops for kind, flops in kinds.items() if kind != "FF"}
    for row, layer in (("FF1", "fc1"), ("FF2", "fc2")):
        rows[row] = sum(flops for name, flops in report.by_layer.items() if name.endswith(f"mlp.{layer}"))
    rows["self-attention"] = sum(flops for kind, flops in kinds.items() if kind != "FF")
    rows["FF"] = kinds["FF"]
    return {row: (flops / GIGA,) for row, flops in rows.items()}


def _table_18() -> dict[str, tuple[float, ...]]:
    vit = _vit_base()
    rows: dict[str, tuple[float, ...]] = {}
    for row in ("dense", "ff=2:4", "ff=1:4", "ff=1:8", "ff=1:16", "ff=1:32", "ff=1:128"):
        targets = None if row == "dense" else dict(setup(f"ste {row}").targets)
        rows[row] = (count_flops(vit, _image(), targets).blocks / GIGA,)
    return rows


def _vit_base() -> nn.Module:
    return skeleton("timm:vit_base_patch16_224", class_token=False, global_pool="avg")


def _image() -> torch.Tensor:
    return torch.empty(1, 3, 224, 224, device="meta")
