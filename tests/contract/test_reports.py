"""Behaviour: what the report says of a step is what counting finds."""

from __future__ import annotations

import torch
from torch import Tensor

from contract.hosts import Host, every_host
from contract.oracle import Part, blocks, mask_of
from contract.runs import DECAY, STEPS, effective_weights, one_step, optimizer_of, parameters, sparsify


def label(name: str, part: Part) -> str:
    return name if part.rows is None else f"{name}[{part.rows[0]}:{part.rows[1]}]"


def entries(values: Tensor, part: Part) -> Tensor:
    """The entries of a part, as one line."""
    return values.flatten()[
        [place for block in blocks(values.shape, part) for column in block for place in column]
    ]


def check_report(host: Host) -> None:
    """Labels, patterns, D, densities of W~ and flips of Φ, at every step."""
    model = host.build()
    sparsifier = sparsify(host, model)
    optimizer = optimizer_of(model)
    weights_of = parameters(model)
    masks = {name: torch.ones_like(weights_of[name], dtype=torch.bool) for name in host.weights}
    for step in range(STEPS + 1):
        report = sparsifier.report()
        assert (report.step, report.total_steps) == (step, STEPS)
        said = {slot.label: slot for slot in report.slots}
        assert set(said) == {label(name, part) for name, parts in host.weights.items() for part in parts}
        flips = nonzero = weights = 0
        for name, dense, seen in effective_weights(host, model):
            mask = mask_of(dense, host.weights[name] if step > 0 else ())
            for part in host.weights[name]:
                slot = said[label(name, part)]
                line = entries(seen, part)
                changed = int((entries(mask, part) != entries(masks[name], part)).sum())
                assert slot.pattern == ("dense" if step == 0 else part.text)
                assert slot.target == part.text
                assert slot.phase == ("dense" if step == 0 else "decay" if step < 5 else "fine-tune")
                assert (slot.decay, slot.weights) == (DECAY[step], line.numel())
                assert slot.density == int((line != 0).sum()) / line.numel()
                assert slot.flips == changed, f"{slot.label} at step {step}"
                flips, weights = flips + changed, weights + line.numel()
                nonzero += int((line != 0).sum())
            masks[name] = mask
        assert report.flips == flips
        assert abs(report.density - nonzero / weights) < 1e-12
        if step < STEPS:
            one_step(host, model, sparsifier, optimizer)


@every_host
def test_report(host: Host) -> None:
    check_report(host)
