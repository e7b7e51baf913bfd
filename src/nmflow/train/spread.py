"""How FSDP2 spreads a network over the processes of a run: block by block, and what is computed in half precision."""

from __future__ import annotations

from typing import cast

import torch
from accelerate import Accelerator
from torch import nn


def spread(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Spread weights, gradients and optimizer state over all processes, in place; returns what a step calls.

    Each of `repeated_blocks` is gathered for itself while it computes, what is left with the model as a whole. With
    bf16, weights are gathered in bf16 and gradients are summed in float32; W, its gradient and AdamW's moments stay
    float32. Build the optimizer afterwards: its parameters are new ones. One process alone has nothing to spread.
    """
    if accelerator.num_processes > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        policy = half if accelerator.mixed_precision == "bf16" else MixedPrecisionPolicy()
        for block in repeated_blocks(model):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
    # Not for a wrapper: Accelerate's `evaluation_mode` is its way to autocast alone.
    return cast(nn.Module, accelerator.prepare_model(model, device_placement=False, evaluation_mode=True))


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks that a network repeats: the members of its innermost lists whose members are all of one class.

    Such a list is an `nn.ModuleList` or `nn.Sequential` of modules that have parts of their own: the layers of a
    transformer, the blocks of each stage of a Swin transformer, the bottlenecks of a ResNet.
    """
    return [block for child in model.children() for block in _blocks(child)]


def _blocks(module: nn.Module) -> list[nn.Module]:
    inner = [block for child in module.children() for block in _blocks(child)]
    if inner or not isinstance(module, nn.ModuleList | nn.Sequential):
        return inner
    members = list(module.children())
    alike = len({type(member) for member in members}) == 1 and all(any(m.children()) for m in members)
    return members if alike and any(True for _ in members[0].parameters()) else []
