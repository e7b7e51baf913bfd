"""How tables look as plain lines: columns, names that several layers share, numbers in four digits."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence


def columns(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """Rows as lines, their cells below each other; those of the columns `right` end there.

    >>> columns([("ff", "12"), ("qkv", "4")], right={1})
    ['ff   12', 'qkv   4']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if place in right else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def starred(name: str) -> str:
    """The name of a module or weight with `*` for its numbers: what alike layers have in common.

    >>> starred("blocks.11.mlp.fc1.weight"), starred("0.fc1"), starred("layers.3")
    ('blocks.*.mlp.fc1.weight', '*.fc1', 'layers.*')
    """
    return re.sub(r"(?:(?<=\.)|^)\d+(?=\.|$)", "*", name)


def short(flops: int) -> str:
    """A number of FLOPs for people, in four digits.

    >>> short(22196256768), short(999), short(0), short(923_445_043_200_000)
    ('22.20 G', '999', '0', '923.4 T')
    """
    if flops < 1000:
        return f"{flops}"
    exponent = int(f"{flops:.3e}".partition("e")[2])  # after rounding, so that 999,960 is 1.000 M
    power = min(exponent // 3, 6)
    return f"{flops / 1000**power:.{max(3 - exponent + 3 * power, 0)}f} {' KMGTPE'[power]}"
