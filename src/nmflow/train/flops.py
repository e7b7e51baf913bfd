"""What a run costs in FLOPs, counted on the first items of its training split."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from nmflow.flops import count_flops
from nmflow.train.loop import Training


def flops_of(run: Training, model: nn.Module) -> dict[str, Any]:
    """As result.json has it, counted on the finalized network: of a forward on a batch, and of all steps, as if every
    batch had the shape of this one.

    A network that cannot be counted is no reason to lose a run: then it says why not.
    """
    inputs, _ = run.data.train.batch(torch.arange(min(run.config.batch, len(run.data.train))))
    example = dict(inputs) if isinstance(inputs, Mapping) else inputs
    sparsifier = run.state.sparsifier
    try:
        report = count_flops(model, example, None, sparsifier.recipe, run.config.steps, run.config.remainder)
    except Exception as error:  # whatever it is that a network does not let itself be copied for
        return {"why_not": str(error)}
    first = next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs
    facts = report.to_dict()
    return {"inputs": list(first.shape), "forward": facts["total"], "training": facts["training"]}
