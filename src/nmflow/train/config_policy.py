"""timm's augmentation strings, such as rand-m9-mstd0.5: which words they have, so that a wrong one is told at once.

timm passes over words that it does not know and takes one of two that contradict each other; here both are refused.
"""

from __future__ import annotations

import re

_NUMBER = r"\d+(?:\.\d+)?"
_WORDS: dict[str, dict[str, str]] = {
    "rand": {
        "m": r"\d+", "n": "[1-9]", "p": r"0(?:\.\d+)?|1", "mstd": _NUMBER, "mmax": r"[1-9]\d*", "inc": "[01]",
        "t": "weights|3a|3aw",
    },
    "augmix": {"m": r"\d+", "w": "[1-9]", "d": "[1-9]", "a": _NUMBER, "b": "[01]", "mstd": _NUMBER},
    **{name: {"mstd": _NUMBER} for name in ("original", "originalr", "v0", "v0r", "3a")},
}  # fmt: skip
"""Policy -> word -> the form of its value."""


def check_policy(text: str) -> str:
    """The string of a policy as it came. Raises `ValueError` where timm has no such policy or a word is at fault.

    >>> check_policy("rand-m9-mstd0.5")
    'rand-m9-mstd0.5'
    >>> check_policy("rand-m9-x2")
    Traceback (most recent call last):
    ValueError: rand-m9-x2: "x2" is no word of rand; it has m, n, p, mstd, mmax, inc, t, each with its value
    """
    name, *parts = text.split("-")
    if name not in _WORDS:
        raise ValueError(f'expected true, false or a policy of timm ({", ".join(_WORDS)}), found "{text}"')
    forms, seen = _WORDS[name], set()
    for part in parts:
        word = next((word for word, form in forms.items() if re.fullmatch(f"{word}(?:{form})", part)), None)
        if word is None:
            raise ValueError(f'{text}: "{part}" is no word of {name}; it has {", ".join(forms)}, each with its value')
        if word in seen:
            raise ValueError(f"{text}: {word} stands twice")
        seen.add(word)
    return text
