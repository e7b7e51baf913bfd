"""The kinds of values that settings have, and how what is written becomes one of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from nmflow.pattern import Pattern
from nmflow.train.config_text import parse_value

if TYPE_CHECKING:
    from nmflow.schedules import Recipe

MAX_SEEDS = 1000
"""Runs of one recipe in a comparison."""

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]


class Settings(BaseModel):
    """A section of a configuration: unknown settings are refused, and none is changed once it is read."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, use_attribute_docstrings=True)


def items(value: Any) -> Any:
    """`a,b` and a single value as the tuple they stand for; a list as a tuple."""
    if isinstance(value, str):
        return tuple(parse_value(part) for part in value.split(","))
    if isinstance(value, list):
        return tuple(value)
    return (value,) if isinstance(value, int | float | dict) else value


def _seed_items(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        if not 1 <= value <= MAX_SEEDS:
            raise ValueError(f"{value} is no count from 1 to {MAX_SEEDS}; a single seed is a list: [{value}]")
        return tuple(range(value))
    return items(value)


def _pattern_text(value: Any) -> str | None:
    """The one spelling of a pattern."""
    try:
        return None if value is None else str(Pattern.parse(value))
    except TypeError as error:
        raise ValueError(str(error)) from error


def _recipe_value(value: Any) -> Any:
    """Plain data (lists, not tuples) that builds a recipe."""
    value = _plain(value)
    try:
        build_recipe(value)
    except TypeError as error:
        raise ValueError(str(error)) from error
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, Pattern):
        return str(value)
    if value is None or isinstance(value, str | int | float):
        return value
    raise ValueError(f"{value!r} is no plain value (text, numbers, lists and mappings of them)")


def build_recipe(value: str | dict[str, Any] | list[Any]) -> Recipe:
    """A recipe from its name, from `{name: ..., option: ...}`, or from a list of the parts of a sequence.

    Raises `ValueError` or `TypeError` as `nmflow.recipe` and `nmflow.sequence` do.
    """
    from nmflow.schedules import Recipe, recipe, sequence

    if isinstance(value, str):
        return recipe(value)
    if isinstance(value, dict):
        return Recipe.from_dict(value)
    if isinstance(value, list):
        return sequence(*value)
    raise ValueError(f"a recipe is a name, a mapping with a name, or a list of parts, not {value!r}")


Seed = Annotated[int, Field(ge=0, lt=2**32)]
Seeds = Annotated[tuple[Seed, ...], BeforeValidator(_seed_items), Field(min_length=1)]
PatternText = Annotated[str, BeforeValidator(_pattern_text)]
Patterns = Annotated[tuple[PatternText, ...], BeforeValidator(items), Field(min_length=1)]
RecipeValue = Annotated[Any, BeforeValidator(_recipe_value)]
Recipes = Annotated[tuple[RecipeValue, ...], BeforeValidator(items), Field(min_length=1)]
