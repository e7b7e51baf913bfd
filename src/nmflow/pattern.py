"""What "N:M" and "N:MvV" mean: a pattern as a value, with the string as its public face."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import total_ordering

LARGEST = 2**31 - 1
"""More entries or rows than any axis has: M and V may come from a file, and go where numbers have 64 bits."""

_FORM = re.compile(r"\s*(\d+)\s*:\s*(\d+)\s*(?:v\s*(\d+)\s*)?")


@total_ordering
@dataclass(frozen=True)
class Pattern:
    """Keep at most `n` of every `m` consecutive weights along the reduction axis.

        density = n / m,    sparsity = 1 - n / m,    1 <= n <= m,    1 <= v

    N is always the number *kept*; half of the field counts the zeroed ones. `m` need not be a power of two.
    `v` neighbouring output rows keep the same n columns of a block; v = 1, each row for itself, is the paper's pattern
    and is not written. A dense pattern has v = 1, whatever was asked.
    Patterns are ordered by density (then by m, then by v), so `min` of several is the tightest.

    Raises `ValueError` where `n`, `m` or `v` is out of range. Source: Bambhaniya et al. 2025, section 2.

    >>> p = Pattern.parse("1:16")
    >>> p.n, p.m, p.density, str(p)
    (1, 16, 0.0625, '1:16')
    >>> p = Pattern.parse("1:8v64")
    >>> p.n, p.m, p.v, p.density, str(p)
    (1, 8, 64, 0.125, '1:8v64')
    >>> Pattern.parse("dense") == Pattern.dense(), Pattern.dense().sparsity
    (True, 0.0)
    >>> Pattern(1, 16) < Pattern(2, 16) < Pattern.dense()
    True
    >>> Pattern.parse("16:1")
    Traceback (most recent call last):
    ValueError: pattern "16:1": N is the number kept of every M, so 1 <= N <= M; did you mean "1:16"?
    """

    n: int
    m: int
    v: int = 1

    def __post_init__(self) -> None:
        for value in (self.n, self.m):
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"a pattern takes two whole numbers, not {self.n!r} and {self.m!r}")
        if not isinstance(self.v, int) or isinstance(self.v, bool):
            raise TypeError(f"v, the rows that keep the same columns, is a whole number, not {self.v!r}")
        shared = "" if self.v == 1 else f"v{self.v}"
        if not 1 <= self.n <= self.m:
            swap = f'; did you mean "{self.m}:{self.n}{shared}"?' if self.n > self.m >= 1 else ""
            raise ValueError(
                f'pattern "{self.n}:{self.m}{shared}": N is the number kept of every M, so 1 <= N <= M{swap}'
            )
        if self.m > LARGEST:
            raise ValueError(
                f'pattern "{self.n}:{self.m}{shared}": M is the number of weights in a block, at most {LARGEST}; '
                "no axis is longer"
            )
        if not 1 <= self.v <= LARGEST:
            raise ValueError(
                f'pattern "{self.n}:{self.m}{shared}": V is the number of rows that keep the same columns, 1 to '
                f'{LARGEST}; "{self.n}:{self.m}" lets every row choose its own'
            )
        if self.n == self.m:  # whoever keeps everything shares everything; one form of it, so that equal is equal
            object.__setattr__(self, "v", 1)

    @classmethod
    def parse(cls, text: Pattern | str) -> Pattern:
        """Read "N:M", "N:MvV" or "dense"; a `Pattern` passes through. Raises `ValueError` on anything else."""
        if isinstance(text, Pattern):
            return text
        if not isinstance(text, str):
            raise TypeError(f'a pattern is a string such as "1:16" or "dense", not {text!r}')
        if text.strip().lower() == "dense":
            return cls.dense()
        form = _FORM.fullmatch(text)
        if form is None:
            raise ValueError(
                f'pattern "{text}": expected N:M (N kept of every M), such as "1:16", or "dense"; N:MvV, such as '
                '"1:8v64", lets V neighbouring rows keep the same columns'
            )
        return cls(int(form[1]), int(form[2]), int(form[3] or 1))

    @classmethod
    def dense(cls) -> Pattern:
        """The pattern that keeps everything."""
        return cls(1, 1)

    @property
    def is_dense(self) -> bool:
        """True where everything is kept: N = M."""
        return self.n == self.m

    @property
    def density(self) -> float:
        """The kept part of the weights, n / m, in (0, 1]."""
        return self.n / self.m

    @property
    def sparsity(self) -> float:
        """The part of the weights that is zero, 1 - n / m, in [0, 1)."""
        return 1.0 - self.n / self.m

    def kept(self, axis: int) -> int:
        """Weights kept in one row of `axis` entries; a last block of r < m entries keeps min(n, r).

        >>> Pattern(1, 16).kept(192), Pattern(2, 4).kept(9)
        (12, 5)
        """
        blocks, tail = divmod(axis, self.m)
        return blocks * self.n + min(self.n, tail)

    def __lt__(self, other: object) -> bool:
        if not isinstance(other, Pattern):
            return NotImplemented
        mine, theirs = ((Fraction(each.n, each.m), each.m, each.v) for each in (self, other))
        return mine < theirs

    def __str__(self) -> str:
        if self.m == 1:
            return "dense"
        return f"{self.n}:{self.m}" if self.v == 1 else f"{self.n}:{self.m}v{self.v}"
