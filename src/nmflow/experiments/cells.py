"""What a cell of a table trains, said in a few words: recipe, its options, and the patterns by role."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from nmflow.schedules import recipe
from nmflow.train.config_text import parse_value

_PATTERN = re.compile(r"\d+:\d+")


@dataclass(frozen=True)
class Setup:
    """A recipe, and what it makes sparse; `targets` is empty for a dense run."""

    recipe: str
    options: tuple[tuple[str, Any], ...] = ()
    targets: tuple[tuple[str, str], ...] = ()

    @property
    def value(self) -> str | dict[str, Any]:
        """The recipe as a configuration writes it."""
        return {"name": self.recipe, **dict(self.options)} if self.options else self.recipe

    @property
    def recipe_text(self) -> str:
        """`mdgf-linear dense=0.1`."""
        return " ".join([self.recipe, *(f"{key}={value}" for key, value in self.options)])

    @property
    def targets_text(self) -> str:
        """`ff=1:8 qk=1:4`, or `dense`."""
        return " ".join(f"{role}={pattern}" for role, pattern in self.targets) or "dense"

    @property
    def text(self) -> str:
        """Both, as `setup` reads them back."""
        return f"{self.recipe_text} {self.targets_text}" if self.targets else self.recipe_text


def setup(words: str) -> Setup:
    """Read the words of a cell, those of its row and of its column in any order.

    `dense` alone is the dense network; N:M behind a sign is a target, anything else an option of the recipe. An option
    that says what the recipe does anyway is left out: such cells share their runs. Raises `ValueError` where the words
    name no recipe, or two, or one that there is not.

    >>> setup("ff=1:8 qk=1:4 mdgf-linear dense=0.1")
    Setup(recipe='mdgf-linear', options=(('dense', 0.1),), targets=(('ff', '1:8'), ('qk', '1:4')))
    >>> setup("dense").targets_text
    'dense'
    >>> setup("mdgf-linear decay_end=0.7 ff=1:8") == setup("mdgf-linear ff=1:8")
    True
    """
    names: list[str] = []
    options: dict[str, Any] = {}
    targets: dict[str, str] = {}
    for word in words.split():
        key, sign, value = word.partition("=")
        if not sign:
            names.append(word)
        elif _PATTERN.fullmatch(value):
            targets[key] = value
        else:
            options[key] = parse_value(value)
    if len(names) != 1:
        raise ValueError(f'"{words}": expected one recipe, found {" and ".join(names) or "none"}')
    if (names[0] == "dense") == bool(targets):
        raise ValueError(f'"{words}": a recipe needs targets such as ff=1:8, and dense has none')
    standard = recipe(names[0])
    telling = {key: value for key, value in options.items() if getattr(standard, key, None) != value}
    return Setup(names[0], tuple(telling.items()), tuple(targets.items()))
