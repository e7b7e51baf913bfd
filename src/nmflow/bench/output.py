"""What `out=DIR` leaves: results.json, table.md and plot.png, each whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Protocol

from nmflow.atomic import replacing
from nmflow.bench.results import KernelResult


class Result(Protocol):
    """What every benchmark answers."""

    def summary(self) -> list[str]: ...

    def markdown(self) -> str: ...

    def to_dict(self) -> dict[str, object]: ...


def write(result: Result, folder: Path) -> list[Path]:
    """Write the files of one result; those of an earlier one are replaced. Raises `OSError`."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "results.json", folder / "table.md"]
    texts = [json.dumps(result.to_dict(), indent=1, ensure_ascii=False) + "\n", result.markdown()]
    for path, text in zip(paths, texts, strict=True):
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    if isinstance(result, KernelResult):
        from nmflow.report.plots_bench import plot_kernels

        paths.append(folder / "plot.png")
        with replacing(paths[-1]) as temporary:
            plot_kernels(result.to_dict(), temporary)
    return paths
