"""Which recipes there are, by name, and how one is made of a name and options."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from nmflow.schedules.base import Recipe
from nmflow.schedules.mask_decay import MdgfExponential, MdgfLinear
from nmflow.schedules.pruning import Idp, Snip
from nmflow.schedules.sequence import Part, Sequence, read_part
from nmflow.schedules.straight import Dense, SrSte, Ste
from nmflow.schedules.structure_decay import SdgfGeometric, SdgfStepwise

_RECIPES: dict[str, type[Any]] = {
    kind.name: kind
    for kind in (Dense, Ste, SrSte, MdgfLinear, MdgfExponential, SdgfStepwise, SdgfGeometric, Snip, Idp)
}


def recipes() -> list[str]:
    """The names that `recipe` knows.

    >>> recipes()
    ['dense', 'ste', 'sr-ste', 'mdgf-linear', 'mdgf-exponential', 'sdgf-stepwise', 'sdgf-geometric', 'snip', 'idp']
    """
    return list(_RECIPES)


def recipe(name: str, **options: Any) -> Recipe:
    """The recipe of this name.

    Options of all but `dense`: `dense`, `decay_end` (fractions of the run), `pruned_gradient`, `schedule`;
    of the mask decays `beta` per step; of mdgf-exponential `floor`; of sr-ste `sr_ste`. Raises `ValueError`
    on an unknown name or option, naming the nearest, and on values out of range. Source: docs/method.md, section 4.

    >>> recipe("mdgf-linear", dense=0.0, decay_end=0.5).at(1, 8, "1:16").decay
    0.75
    """
    if not isinstance(name, str):
        raise TypeError(f"a recipe is called by its name, such as {recipes()[-2]!r}, not {name!r}")
    if name not in _RECIPES:
        raise ValueError(f'unknown recipe "{name}"{_nearest(name, _RECIPES)}; one of {", ".join(_RECIPES)}')
    kind = _RECIPES[name]
    known = [field.name for field in fields(kind)]
    unknown = [option for option in options if option not in known]
    if unknown:
        named = "; ".join(f'no option "{option}"{_nearest(option, known)}' for option in unknown)
        raise ValueError(f"recipe {name}: {named}; it takes {', '.join(known)}")
    made: Recipe = kind(**options)
    return made


def sequence(*parts: Any) -> Recipe:
    """Recipes that follow each other; a part is (recipe or name, until, pattern at its end).

    `until` is a fraction of the run, 1.0 for the last part; the pattern is left out, or None, for the target
    of the run. A part may also be a mapping of recipe, until and pattern. Raises `ValueError`, with every
    problem of every part.

    >>> two = sequence(("sdgf-stepwise", 0.5, "4:16"), ("mdgf-linear", 1.0))
    >>> stage = two.at(70, 100, "1:16")
    >>> str(stage.pattern), str(stage.outer), round(stage.decay, 2)
    ('1:16', '4:16', 0.47)
    """
    read: list[Part] = []
    problems = []
    for number, part in enumerate(parts, 1):
        try:
            read.append(read_part(part, _as_recipe))
        except (TypeError, ValueError) as error:
            problems.append(f"part {number}: {error}")
    if problems:
        raise ValueError(f"recipe sequence: {'; '.join(problems)}")
    return Sequence(tuple(read))


def from_dict(data: Mapping[str, Any]) -> Recipe:
    """The recipe that `Recipe.to_dict` wrote."""
    options = dict(data)
    name = options.pop("name", None)
    if name == Sequence.name and set(options) == {"parts"}:
        return sequence(*options["parts"])
    if name is None:
        raise ValueError(f'a recipe needs a "name", and this has only {", ".join(map(str, options)) or "nothing"}')
    return recipe(name, **options)


def _as_recipe(given: Any) -> Recipe:
    if isinstance(given, Recipe):
        return given
    return from_dict(given) if isinstance(given, Mapping) else recipe(given)


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f'; did you mean "{close[0]}"?' if close else ""
