"""How the step W -> (mask, W~) is timed: against argsort and scatter, against plain torch, against copying W."""

from __future__ import annotations

import torch
from torch import Tensor

from nmflow.bench import goals
from nmflow.bench.cells import OURS, MaskCell
from nmflow.bench.timing import in_turns
from nmflow.ops.native_project import project_native
from nmflow.ops.projection import project
from nmflow.pattern import Pattern

MASK_SHAPES = ((768, 3072), (4096, 4096))
MASK_PATTERNS = ("2:4", "1:8", "1:32", "1:128", "4:16", "16:128")
ARGSORT, TORCH, COPY = "argsort and scatter", "plain torch", "copy"


def measure_masks(shape: tuple[int, int], pattern: str, dtype: str, rounds: int) -> MaskCell:
    """Time the step on one weight. Copying is timed in rounds of its own: the slow sides would empty its caches.

    The copy reads W and writes as much; the step writes the mask besides, and reads it for the count of flips.
    """
    form = Pattern.parse(pattern)
    w = torch.randn(shape).to(getattr(torch, dtype))
    mask, effective, copy = torch.zeros(w.shape, dtype=torch.bool), torch.empty_like(w), torch.empty_like(w)

    def step() -> object:
        return project_native(w, form, 0.0, "partial", mask, effective)

    fast = in_turns({OURS: step, COPY: lambda: copy.copy_(w)}, rounds)
    slow = in_turns(
        {
            OURS: step,
            ARGSORT: lambda: argsort_and_scatter(w, form),
            TORCH: lambda: project(w, form, 0.0, "partial", mask, effective),
        },
        min(rounds, 7),
        tries=3,
    )
    seconds = {OURS: fast.median(OURS), COPY: fast.median(COPY), **{n: slow.median(n) for n in (ARGSORT, TORCH)}}
    over_argsort, of_copy = goals.of_masks(pattern, shape, dtype, torch.get_num_threads())
    return MaskCell(
        shape=shape,
        pattern=pattern,
        dtype=dtype,
        ns={name: each / w.numel() * 1e9 for name, each in seconds.items()},
        over_argsort=slow.ratio(OURS, ARGSORT),
        over_torch=slow.ratio(OURS, TORCH),
        of_copy=fast.ratio(OURS, COPY),
        goal_over_argsort=over_argsort,
        goal_of_copy=of_copy,
        disturbed=fast.disturbed + slow.disturbed,
    )


def argsort_and_scatter(w_RK: Tensor, pattern: Pattern) -> Tensor:
    """W~ in the way of SR-STE's code: sort every block, scatter zeros into a mask of ones, multiply.

    Its sort is not stable, so it may keep others of equal magnitudes. Axes that M does not divide are cut short.
    """
    rows, axis = w_RK.shape
    whole = w_RK[:, : axis // pattern.m * pattern.m]
    blocks = whole.abs().reshape(-1, pattern.m)
    dropped = torch.argsort(blocks, dim=1)[:, : pattern.m - pattern.n]
    mask = torch.ones(blocks.shape, dtype=w_RK.dtype).scatter_(1, dropped, 0.0).reshape(rows, -1)
    return whole * mask
