"""How sides are timed against each other: in turns, by medians of the rounds' ratios, undisturbed rounds preferred.

A round times every side once, one after the other, so that a burst of other work on the machine touches all of them; a
ratio is the median of the rounds' ratios. A round in which the process lost a core is done again.
"""

from __future__ import annotations

import contextlib
import ctypes
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from nmflow.ops.native_tune import clock

_FEWEST = 3
"""So many rounds are kept in the end even where every one was disturbed."""


@dataclass(frozen=True)
class Rounds:
    """Seconds of one call of every side in every round kept."""

    seconds: Mapping[str, tuple[float, ...]]
    disturbed: int
    """Rounds that were kept although the process lost a core in them."""

    def median(self, side: str) -> float:
        """Seconds of one call."""
        return statistics.median(self.seconds[side])

    def ratio(self, of: str, over: str) -> float:
        """How many times as long `over` takes as `of`: the speed-up of `of`."""
        pairs = zip(self.seconds[of], self.seconds[over], strict=True)
        return statistics.median(other / own for own, other in pairs)


def cores_lost() -> int:
    """How often this process lost a core to another one so far; 0 where the system does not say."""
    try:
        import resource  # POSIX only
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def in_turns(
    sides: Mapping[str, Callable[[], object]],
    rounds: int,
    seconds: float = 0.01,
    tries: int = 8,
    lost: Callable[[], int] = cores_lost,
) -> Rounds:
    """Time `sides` in `rounds` rounds; in each, a side is called for about `seconds`, once at least.

    Every side is called once before its clock starts. Disturbed rounds (`lost` has grown) are done again until
    `tries` times as many were begun as asked for; then the last ones, three at most, are kept as they are.
    """
    repeats = {}
    for name, run in sides.items():
        run()
        repeats[name] = max(1, min(200, int(seconds / max(_once(run, 1), 1e-7))))
    kept: list[dict[str, float]] = []
    disturbed = 0
    for left in range(tries * rounds, 0, -1):
        before, found = lost(), {}
        for name, run in sides.items():
            run()
            found[name] = _once(run, repeats[name])
        spoiled = lost() > before
        if spoiled and left > min(_FEWEST, rounds) - len(kept):
            continue
        kept.append(found)
        disturbed += spoiled
        if len(kept) == rounds:
            break
    return Rounds({name: tuple(found[name] for found in kept) for name in sides}, disturbed)


def keep_freed_memory() -> bool:
    """Have malloc keep what is freed, for the rest of this process; whether it does (glibc).

    Otherwise an output of many megabytes is new pages in every call, and the system's zeroing of them takes longer
    than many a sparse product: a cost of every side, but none of theirs.
    """
    trim_threshold, mmap_max = -1, -4  # of malloc.h
    try:
        libc = ctypes.CDLL(None)
        return bool(libc.mallopt(trim_threshold, 1 << 30) and libc.mallopt(mmap_max, 0))
    except (OSError, AttributeError, TypeError):
        return False


@contextlib.contextmanager
def computing(threads: int) -> Iterator[None]:
    """So many threads, and random numbers that are the same in every run; the threads are given back.

    Memory is kept from here on (`keep_freed_memory`).
    """
    keep_freed_memory()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            yield
    finally:
        torch.set_num_threads(before)


def _once(run: Callable[[], object], repeats: int) -> float:
    """Mean seconds of one of `repeats` calls in a row. Of one thread its own clock, which stands still meanwhile."""
    now = clock()
    start = now()
    for _ in range(repeats):
        run()
    return (now() - start) / repeats
