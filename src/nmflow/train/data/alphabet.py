"""Characters as tokens: those of a text by their code points, and one token for all others."""

from __future__ import annotations

import numpy as np

UNKNOWN = 0
"""Token of a character that the alphabet does not have."""
ALPHABET_FILE = "alphabet.txt"
"""Where a run keeps its alphabet: the characters, in order, as UTF-8."""


class Alphabet:
    """Token 1 + i is the i-th of the characters of `text`, by code point.

    >>> alphabet = Alphabet("banana")
    >>> alphabet.characters, alphabet.encode("nab?").tolist(), alphabet.decode([3, 1, 2, 0])
    ('abn', [3, 1, 2, 0], 'nab\N{REPLACEMENT CHARACTER}')
    """

    def __init__(self, text: str) -> None:
        self._codes = np.unique(_codes_of(text))

    @property
    def characters(self) -> str:
        """All of them, in order."""
        return "".join(map(chr, self._codes.tolist()))

    def __len__(self) -> int:
        """Tokens that there are."""
        return len(self._codes) + 1

    def encode(self, text: str) -> np.ndarray:
        """The tokens [n] of a text, int32."""
        codes = _codes_of(text)
        place = np.searchsorted(self._codes, codes).clip(max=len(self._codes) - 1)
        return np.where(self._codes[place] == codes, place + 1, UNKNOWN).astype(np.int32)

    def strange(self, text: str) -> str:
        """The characters of a text that it does not have, in order, each once.

        >>> Alphabet("banana").strange("nab?!?")
        '!?'
        """
        codes = np.unique(_codes_of(text))
        return "".join(map(chr, codes[~np.isin(codes, self._codes)].tolist()))

    def decode(self, tokens: list[int]) -> str:
        """The text of tokens; what is unknown shows as such."""
        known = "\N{REPLACEMENT CHARACTER}" + self.characters
        return "".join(known[token] for token in tokens)


def _codes_of(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
