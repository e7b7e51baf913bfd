"""One page that stands alone: what was run, how well it did, the proof, the bytes, the plot, the command."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from nmflow.report.folder import RunFolder, read_json
from nmflow.report.measures import MEASURES, further_scores, measures_of
from nmflow.report.tables import run_title, verdict

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1c1c; max-width: 54rem; margin: 2.5rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.1rem; margin: 2.2rem 0 .5rem }
table { border-collapse: collapse; width: 100% } th, td { padding: .28rem .8rem .28rem 0; text-align: left }
th { border-bottom: 1px solid #999; font-weight: 600 } td { border-bottom: 1px solid #e4e4e4; vertical-align: top }
.number { text-align: right; font-variant-numeric: tabular-nums } .bad { color: #b00020; font-weight: 600 }
code, pre { font: 13px/1.5 ui-monospace, monospace; background: #f4f4f4; padding: .1rem .3rem }
pre { padding: .7rem .9rem; overflow-x: auto; white-space: pre-wrap } img { max-width: 100% } .quiet { color: #666 }
"""


def write_page(run_dir: str | Path, path: str | Path, command: str) -> None:
    """Write the HTML page of a finished run; it needs no other file.

    Figures come from the run's result.json and environment.json, the plot from its training.png; `command` trains the
    same again. Raises `FileNotFoundError` where the run is not done.
    """
    folder = RunFolder(Path(run_dir))
    result, surroundings = read_json(folder.result), read_json(folder.environment)
    picture = base64.b64encode(folder.plot.read_bytes()).decode("ascii")
    title = run_title(result)
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="quiet">{escape(result["data"])}. {result["parameters"]:,} parameters, {result["steps"]:,} '
        "optimizer steps. In N:M, N is the number of weights kept of every M.</p>",
        "<h2>On the test split</h2>",
        _scores(result),
        *_proof(result),
        *_bytes(result),
        "<h2>Training</h2>",
        f'<img alt="D(j), density, loss and validation over the steps" src="data:image/png;base64,{picture}">',
        "<h2>To train the same again</h2>",
        f"<pre>{escape(command)}</pre>",
        "<h2>Settings</h2>",
        _table(["setting", "value"], _flat(result["config"])),
        "<h2>Where it ran</h2>",
        _table(["", ""], _flat(surroundings)),
    ]
    html = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )
    Path(path).write_text(html, encoding="utf-8")


def _scores(result: dict[str, Any]) -> str:
    own = "dense" if result["compressed"] is None else "sparse, finalized"
    raw = result.get("raw")
    name = own if raw is None else f"{own}, average of the weights"
    rows: list[tuple[str, dict[str, Any], Any]] = [(name, result["test"], result["seconds"])]
    if raw is not None:
        rows.append((f"{own}, the last weights", raw["test"], None))
    if result["dense"] is not None:
        rows.insert(0, ("dense, same budget", result["dense"]["test"], result["dense"]["seconds"]))
    if result["compressed"] is not None:
        rows.append(("sparse, from the compressed file", result["compressed"]["test"], None))
    measures = measures_of(result["test"])
    cells = []
    for name, score, seconds in rows:
        cells.append([*_score_cells(name, score, measures), "" if seconds is None else f"{seconds:,.1f}"])
        for part, other in further_scores(score).items():
            cells.append([*_score_cells(f"{name}, {part}", other, measures), ""])
    heads = ["run", *(MEASURES[measure].label for measure in measures), "loss", "items", "training, s"]
    return _table(heads, cells, numbers=range(1, len(measures) + 4))


def _score_cells(name: str, score: Mapping[str, Any] | None, measures: Sequence[str]) -> list[str]:
    if score is None:
        return [name, *(MEASURES[measure].text(None) for measure in measures), "", ""]
    figures = (MEASURES[measure].text(score[measure], 2) for measure in measures)
    return [name, *figures, f"{score['loss']:.4f}", f"{score['items']:,}"]


def _proof(result: dict[str, Any]) -> list[str]:
    proof = result["verify"]
    if proof is None:
        return []
    rows = [
        [layer["label"], layer["pattern"], f"{layer['blocks']:,}", f"{layer['broken']:,}"] for layer in proof["layers"]
    ]
    kind = "" if proof["ok"] else ' class="bad"'
    return [
        "<h2>Proof</h2>",
        f"<p{kind}>{escape(verdict(proof))}: every block of every layer in <code>model.safetensors</code> was counted. "
        "<code>nmflow verify</code> on this folder counts again.</p>",
        _table(["layer", "pattern", "blocks", "broken"], rows, numbers=(2, 3)),
    ]


def _bytes(result: dict[str, Any]) -> list[str]:
    files = result["compressed"]
    if files is None:
        return []
    rows = [
        [layer["name"], layer["pattern"], f"{layer['bytes_before']:,}", f"{layer['bytes_after']:,}",
         f"{layer['bytes_before'] / layer['bytes_after']:.2f}"]
        for layer in files["layers"]
    ]  # fmt: skip
    before, after = files["bytes_before"], files["bytes_after"]
    rows.append(["whole file", "", f"{before:,}", f"{after:,}", f"{before / after:.2f}"])
    return ["<h2>Bytes</h2>", _table(["weight", "pattern", "dense", "compressed", "ratio"], rows, numbers=(2, 3, 4))]


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        made = (
            f'<{tag}{" class=number" if place in numbers else ""}>{escape(cell)}</{tag}>'
            for place, cell in enumerate(cells)
        )
        return f"<tr>{''.join(made)}</tr>"

    head = row(heads, "th") if any(heads) else ""
    return "\n".join(["<table>", head, *(row(cells, "td") for cells in rows), "</table>"])


def _flat(values: dict[str, Any], prefix: str = "") -> list[list[str]]:
    """Nested settings as rows (dotted key, value)."""
    rows: list[list[str]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append([f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)])
    return rows
