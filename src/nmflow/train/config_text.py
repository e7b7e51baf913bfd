"""How text becomes plain values: a YAML file, then key=value arguments, and where each value came from.

Knows nothing of the fields (`config.py` does). Scalars follow YAML 1.2: to YAML 1.1, which PyYAML reads by
default, 1:16 is the number 76, `no` is false, 010 is eight and 1e-3 is a string.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 1 << 20
"""No configuration is larger; a data file given by mistake is refused before it is read."""


@dataclass
class Source:
    """Plain nested values, the argument or file that each came from, and what was wrong with the text."""

    values: dict[str, Any] = field(default_factory=dict)
    arguments: dict[tuple[str, ...], str] = field(default_factory=dict)
    file: str | None = None
    problems: list[str] = field(default_factory=list)

    def origin(self, key: tuple[str, ...]) -> str:
        """Where the value of a key stands: ` (argument "a=b")`, ` (run.yaml)`, or nothing for a default.

        A value that several arguments made together has all of them.
        """
        parts = [text for part, text in self.arguments.items() if part[: len(key)] == key]
        whole = [self.arguments[key[:n]] for n in range(len(key), 0, -1) if key[:n] in self.arguments]
        if texts := parts or whole[:1]:
            quoted = " and ".join(f'"{text}"' for text in texts)
            return f" (argument{'s' if len(texts) > 1 else ''} {quoted})"
        return f" ({self.file})" if self.file else ""


def read_source(
    path: str | Path | None,
    overrides: Sequence[str],
    shorthand: Mapping[str, Callable[[Any], Any]],
    whole_keys: frozenset[str],
) -> Source:
    """Read a file, then the arguments over it; problems are noted, not raised, so that all are told at once.

    `shorthand` gives, for a key that may be a string, the mapping it stands for: `data.augment=true` refines
    what `data=cifar10:PATH` said. Below `whole_keys` the rest of a key is one name, dots and all.
    Raises `FileNotFoundError` where there is no file, and `ValueError` where it is no YAML mapping.
    """
    source = Source()
    if path is not None:
        source.file = str(path)
        source.values = _read_file(Path(path))
    arguments = [_split(text, whole_keys, source) for text in overrides]
    # A section given whole comes before its parts, whatever their order on the command line.
    for key, text, value in sorted((a for a in arguments if a is not None), key=lambda a: len(a[0])):
        _apply(source, key, text, value, shorthand)
    return source


def parse_value(text: str) -> Any:
    """The value of one YAML document. Raises `ValueError`.

    >>> [parse_value(text) for text in ("1:16", "1e-3", "12", "no", "true", "null", "{ff: 1:8}")]
    ['1:16', 0.001, 12, 'no', True, None, {'ff': '1:8'}]
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise ValueError(f"{error.problem}{place}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())) from error


def dump_values(values: Mapping[str, Any]) -> str:
    """YAML text that `parse_value` reads back to equal values; YAML 1.1 readers find the same text in it."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def _read_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give a YAML file, or settings as key=value")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: {path.stat().st_size:,} bytes; a configuration has at most {MAX_BYTES:,}")
    try:
        values = parse_value(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: no valid YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a mapping (lines such as \"steps: 300\"), found {values!r:.60}")
    return values


def _split(
    text: str, whole_keys: frozenset[str], source: Source
) -> tuple[tuple[str, ...], str, Any] | None:
    """(key, the argument, value) of one argument."""
    name, sign, value = text.partition("=")
    if not sign or not name.strip():
        source.problems.append(f'argument "{text}": expected key=value, such as steps=300 or optim.lr=3e-4')
        return None
    head, dot, rest = name.strip().partition(".")
    key = (head, rest) if dot and head in whole_keys else tuple(name.strip().split("."))
    try:
        return key, text, parse_value(value)
    except ValueError as error:
        source.problems.append(f'argument "{text}": the value is no valid YAML (quotes may help): {error}')
        return None


def _apply(
    source: Source,
    key: tuple[str, ...],
    text: str,
    value: Any,
    shorthand: Mapping[str, Callable[[Any], Any]],
) -> None:
    if key in source.arguments:
        source.problems.append(f'{".".join(key)}: set twice, by "{source.arguments[key]}" and by "{text}"')
        return
    place = source.values
    for depth, part in enumerate(key[:-1], start=1):
        inner = place.get(part)
        if depth == 1 and part in shorthand and not isinstance(inner, dict):
            inner = shorthand[part](inner)
        if inner is None:
            inner = {}
        if not isinstance(inner, dict):
            whole = ".".join(key[:depth])
            problem = f"{'.'.join(key)}: {whole} is {inner!r} and has no parts; give {whole} whole"
            source.problems.append(f'{problem} (argument "{text}")')
            return
        place[part] = dict(inner)
        place = place[part]
    owner = source.arguments.get(key[:1])
    if owner is not None and key[-1] in place:
        source.problems.append(f'{".".join(key)}: set twice, by "{owner}" and by "{text}"')
        return
    place[key[-1]] = value
    source.arguments[key] = text


class _Loader(yaml.SafeLoader):
    """Safe loading with YAML 1.2's scalars, and without silent duplicates."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012  PyYAML's own table, replaced

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]  # a gap in the stubs
            raise yaml.composer.ComposerError(None, None, "no aliases here: write the value out", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            plain = isinstance(key, str | int | float | None)
            if not plain or key in seen:
                problem = f'the key "{key}" stands twice' if plain else f"{key!r} cannot be a key"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _number(kind: type[int] | type[float]) -> Callable[[_Loader, yaml.ScalarNode], int | float]:
    def construct(loader: _Loader, node: yaml.ScalarNode) -> int | float:
        try:
            return kind(str(loader.construct_scalar(node)))
        except ValueError as error:
            raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from error

    return construct


_SCALARS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", list("-+.0123456789")),
)
for _name, _form, _first in _SCALARS:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"(?:{_form})\Z"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _number(int))
_Loader.add_constructor("tag:yaml.org,2002:float", _number(float))


class _Dumper(yaml.SafeDumper):
    """Quotes every string that is not a plain word: no reader may take a pattern for a time of day."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    style = None if re.fullmatch(r"[A-Za-z_][\w./-]*", text, re.ASCII) else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
