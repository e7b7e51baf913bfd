"""How a refused configuration is told: key, what stands there, what is allowed, where it came from."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ValidationError

from nmflow.train.config_text import Source

_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text (in quotes, if it looks like a number)",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "greater_than": "a value > {gt}",
    "greater_than_equal": "a value >= {ge}",
    "less_than": "a value < {lt}",
    "less_than_equal": "a value <= {le}",
    "literal_error": "one of {expected}",
    "too_short": "at least {min_length} of them",
    "too_long": "at most {max_length} of them",
    "missing": "a value",
    "invalid_key": "a key that is text",
}


def describe(error: ValidationError, kind: type[BaseModel], source: Source) -> list[str]:
    """One line a problem, in the order of the fields."""
    keys = known_keys(kind)
    return [_line(dict(problem), keys, source) for problem in error.errors(include_url=False)]


def known_keys(kind: type[BaseModel], prefix: str = "") -> list[str]:
    """Every key of a configuration with its full path: data, data.name, …"""
    keys: list[str] = []
    for name, field in kind.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += known_keys(field.annotation, f"{prefix}{name}.")
    return keys


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean "..."?` or nothing; a key's last part alone is enough (lr for optim.lr).

    >>> keys = ["optim.lr", "steps"]
    >>> nearest("lr", keys), nearest("optm.lr", keys), nearest("x", keys)
    ('; did you mean "optim.lr"?', '; did you mean "optim.lr"?', '')
    """
    known = list(known)
    last = word.rpartition(".")[2]
    by_last = {key.rpartition(".")[2]: key for key in reversed(known)}
    if last in by_last:
        return f'; did you mean "{by_last[last]}"?'
    others = [key for key in known if not word.startswith(f"{key}.")]
    close = difflib.get_close_matches(word, others, n=1, cutoff=0.5)
    close = close or [by_last[leaf] for leaf in difflib.get_close_matches(last, by_last, n=1)]
    return f'; did you mean "{close[0]}"?' if close else ""


def _line(problem: dict[str, Any], keys: list[str], source: Source) -> str:
    kind, value, context = problem["type"], problem["input"], problem.get("ctx", {})
    place = tuple(str(part) for part in problem["loc"] if part != "[key]")
    key, origin = ".".join(place), source.origin(place)
    if kind == "extra_forbidden":
        section = next((k for k in reversed(keys) if key.startswith(f"{k}.")), None)
        if section is not None and not any(k.startswith(f"{section}.") for k in keys):
            return f"{key}: {section} is a single value without parts{origin}"
        return f"{key}: no such key{nearest(key, keys)}{origin}"
    if kind == "value_error":
        return f"{key}: {context['error']}{origin}"
    limits = {name: f"{limit:.12g}" if isinstance(limit, float) else limit for name, limit in context.items()}
    expected = _EXPECTED[kind].format(**limits) if kind in _EXPECTED else problem["msg"]
    hint = nearest(value, _choices(context)) if kind == "literal_error" and isinstance(value, str) else ""
    return f"{key}: expected {expected}, found {value!r:.80}{hint}{origin}"


def _choices(context: dict[str, Any]) -> list[str]:
    return [choice.strip("' ") for choice in context["expected"].replace(" or ", ",").split(",")]
