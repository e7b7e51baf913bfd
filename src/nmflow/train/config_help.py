"""Every setting of a configuration for people: its key, default, what it may be, and what it means."""

from __future__ import annotations

from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

_NAMES: dict[Any, str] = {int: "whole number", float: "number", bool: "true or false", str: "text", Any: "value"}
_ORIGINS: dict[Any, str] = {dict: "mapping", tuple: "list"}


def settings_lines(kind: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Two lines a setting, those of sections by their full key, as the command line takes it.

    >>> from nmflow.train.config_sections import BleuConfig
    >>> list(settings_lines(BleuConfig, "bleu."))[2:4]
    ['bleu.beam=1  (whole number)', '    Translations that are followed at a time; 1 is greedy.']
    """
    for name, field in kind.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from settings_lines(field.annotation, f"{prefix}{name}.")
            continue
        yield f"{prefix}{name}={_written(field.default)}  ({_type_text(field.annotation)})"
        yield f"    {field.description}"


def _written(default: Any) -> str:
    if isinstance(default, tuple):
        return ",".join(map(_written, default))
    return "null" if default is None else str(default).lower() if isinstance(default, bool) else f"{default}"


def _type_text(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(arguments)
    if origin is Annotated:
        return _type_text(arguments[0])
    if origin in (Union, UnionType):
        return " or ".join("null" if each is NoneType else _type_text(each) for each in arguments)
    return _ORIGINS.get(origin) or _NAMES[annotation]
