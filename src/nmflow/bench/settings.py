"""What a benchmark is asked for: key=value settings as typed values, answered without importing torch."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from nmflow.pattern import Pattern

PARTS = ("linear", "cold", "bf16", "conv", "masks")
GPU_PARTS = ("decode", "masks", "many", "shared", "float32", "train", "network")
DTYPES = ("float32", "bfloat16")
SHAPES = ((3072, 768), (768, 3072), (4096, 1024), (1024, 4096))
TOKENS = (1, 4, 16, 196, 1576)
PATTERNS = ("2:4", "1:4", "1:8", "1:16", "1:32", "1:128")

Shape = tuple[int, int]


@dataclass(frozen=True)
class _Written:
    out: Path | None = None
    """Folder for results.json, table.md and, where there is something to draw, plot.png."""


@dataclass(frozen=True)
class _Common(_Written):
    threads: int = 2
    rounds: int = 15


@dataclass(frozen=True)
class KernelSettings(_Common):
    """`nmflow bench kernels`. What is None is the part's own choice (see `nmflow.bench.kernels`)."""

    parts: tuple[str, ...] = PARTS
    patterns: tuple[str, ...] | None = None
    shapes: tuple[Shape, ...] | None = None
    tokens: tuple[int, ...] | None = None
    dtype: str = "float32"
    """Of the parts linear, cold, conv and masks."""


@dataclass(frozen=True)
class LayerSettings(_Common):
    """`nmflow bench layer`."""

    tokens: tuple[int, ...] = TOKENS
    dtype: str = "float32"


@dataclass(frozen=True)
class ModelSettings(_Common):
    """`nmflow bench model` and `nmflow bench train`."""

    rounds: int = 7
    targets: Mapping[str, str] = field(default_factory=dict)
    """Rules as `nmflow.targets.resolve` takes them; `pattern=N:M` is short for targets.ff=N:M."""
    batch: int = 1
    prompt: int = 32
    """Language models: tokens that are read before the clock starts."""
    new_tokens: int = 16
    """Language models: tokens that are decoded against the clock, in each round."""


@dataclass(frozen=True)
class GpuSettings(_Written):
    """`nmflow bench gpu`."""

    parts: tuple[str, ...] = GPU_PARTS
    minutes: int = 8
    """After so many nothing new is begun; what is left stays unmeasured."""


SettingsT = TypeVar("SettingsT", bound=_Written)


def read(kind: type[SettingsT], settings: Iterable[str], defaults: Mapping[str, Any] | None = None) -> SettingsT:
    """Typed settings of key=value arguments over `defaults`. Raises one `ValueError` that lists every problem."""
    known = {each.name for each in fields(kind)}
    names = [*sorted(known), *(["pattern", "targets.RULE"] if "targets" in known else [])]
    values: dict[str, Any] = {}
    problems: list[str] = []
    for setting in settings:
        key, sign, text = setting.partition("=")
        head, dot, rule = key.partition(".")
        try:
            if not sign or not text:
                problems.append(f'"{setting}": expected key=value, such as threads=2')
            elif "targets" in known and (key == "pattern" or (head == "targets" and dot and rule)):
                targets = values.setdefault("targets", {})
                if (rule := rule or "ff") in targets:
                    problems.append(f'"{setting}": the rule "{rule}" is given twice')
                targets[rule] = text if text == "dense" else str(Pattern.parse(text))
            elif key not in known or key == "targets":
                near = difflib.get_close_matches(key, names, n=1)
                hint = f'; did you mean "{near[0]}"?' if near else ""
                problems.append(f'"{setting}": no such setting{hint or "."} Known: {", ".join(names)}')
            elif key in values:
                problems.append(f'"{setting}": {key} is given twice')
            else:
                values[key] = (_PARTS[kind] if key == "parts" else _READERS[key])(text)
        except ValueError as error:
            problems.append(f'"{setting}": {error}')
    if "targets" in known and "targets" not in values:
        values["targets"] = {"ff": "1:8"}
    out = values.get("out")
    if out is not None and out.exists() and not out.is_dir():
        problems.append(f'"out={out}": that is a file; name a folder')
    if problems:
        raise ValueError("\n".join(problems))
    return kind(**{**(defaults or {}), **values})


def read_shape(text: str) -> Shape:
    """ROWSxCOLS, outputs times inputs. Raises `ValueError`.

    >>> read_shape("3072x768")
    (3072, 768)
    """
    rows, sign, columns = text.partition("x")
    if not sign:
        raise ValueError(f'"{text}" is no ROWSxCOLS (outputs x inputs), such as 3072x768')
    return _count(rows), _count(columns)


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text)):
        raise ValueError(f'"{text}" is no whole number above 0')
    return int(text)


def _one_of(known: tuple[str, ...]) -> Callable[[str], str]:
    def read_one(text: str) -> str:
        if text not in known:
            raise ValueError(f'"{text}" is none of {", ".join(known)}')
        return text

    return read_one


def _several(read_one: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    return lambda text: tuple(dict.fromkeys(read_one(part) for part in text.split(",")))


_READERS: dict[str, Callable[[str], Any]] = {
    "patterns": _several(lambda text: str(Pattern.parse(text))),
    "tokens": _several(_count),
    "shapes": _several(read_shape),
    "dtype": _one_of(DTYPES),
    "out": Path,
    **dict.fromkeys(("threads", "rounds", "batch", "prompt", "new_tokens", "minutes"), _count),
}
_PARTS = {KernelSettings: _several(_one_of(PARTS)), GpuSettings: _several(_one_of(GPU_PARTS))}
