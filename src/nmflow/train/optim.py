"""How weights are updated: AdamW with decay on matrices only, and the learning rate as a function of the step."""

from __future__ import annotations

import math

from torch import nn, optim

from nmflow.schedules.window import step_of
from nmflow.train.config_sections import OptimConfig


def constant(step: int, total_steps: int, warmup_steps: int = 0) -> float:
    """Linear warm-up to 1, then 1: the part of the peak learning rate that optimizer step `step` takes.

        f(s) = (s + 1) / (w + 1)   for s < w,      f(s) = 1   for w <= s < T

    `step` = s counts from 0, `total_steps` = T, `warmup_steps` = w. No step is wasted on a rate of 0. Raises
    `ValueError` where s lies outside [0, T) or w outside [0, T].

    >>> [constant(s, 6, warmup_steps=3) for s in range(6)]
    [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    """
    _check(step, total_steps, warmup_steps)
    return min(1.0, (step + 1) / (warmup_steps + 1))


def cosine(step: int, total_steps: int, warmup_steps: int = 0) -> float:
    """Linear warm-up to 1, then half a cosine towards 0, which the step after the last would reach.

        f(s) = (s + 1) / (w + 1)   for s < w,      f(s) = (1 + cos(π·(s - w) / (T - w))) / 2   for w <= s < T

    Symbols and errors as in `constant`. Source: Loshchilov and Hutter 2017, without restarts.

    >>> [round(cosine(s, 5, warmup_steps=1), 4) for s in range(5)]
    [0.5, 1.0, 0.8536, 0.5, 0.1464]
    """
    rising = constant(step, total_steps, warmup_steps)
    if step < warmup_steps:
        return rising
    return (1.0 + math.cos(math.pi * (step - warmup_steps) / (total_steps - warmup_steps))) / 2


def inverse_sqrt(step: int, total_steps: int, warmup_steps: int = 0) -> float:
    """Linear warm-up to 1, then a fall with the root of the step, whatever the length of the run.

        f(s) = (s + 1) / (w + 1)   for s < w,      f(s) = √((w + 1) / (s + 1))   for w <= s < T

    Symbols and errors as in `constant`. Source: Vaswani et al. 2017, section 5.3.

    >>> [round(inverse_sqrt(s, 20, warmup_steps=3), 4) for s in (0, 2, 3, 4, 15)]
    [0.25, 0.75, 1.0, 0.8944, 0.5]
    """
    rising = constant(step, total_steps, warmup_steps)
    return rising if step < warmup_steps else math.sqrt((warmup_steps + 1) / (step + 1))


_FUSED = ("cpu", "cuda", "mps", "xpu")
"""Where torch updates weights and moments in one pass over memory, which is several times as fast as one for each."""

SCHEDULES = {"constant": constant, "cosine": cosine, "inverse-sqrt": inverse_sqrt}


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """The learning rate of optimizer step `step` = 0 ... T-1, with w = floor(warmup·T + 0.5)."""
    return config.lr * SCHEDULES[config.schedule](step, total_steps, step_of(config.warmup, total_steps))


def build_optimizer(model: nn.Module, config: OptimConfig, is_scaled: bool = False) -> optim.AdamW:
    """AdamW over the trainable parameters of a model: weight matrices decay, everything else does not.

        W <- W - lr·(m̂ / (√v̂ + eps) + weight_decay·W)

    Biases, norms, class tokens, position tables and `nn.Embedding`s have no decay. A sparse weight's decay acts on
    the dense W, pruned entries included (docs/method.md, section 2). Source: Loshchilov and Hutter 2019.

    Weights and moments are updated in one pass over memory where torch can. Not under a loss scale (`is_scaled`):
    torch's one pass skips a step with inf in its gradients without saying so, and the log has to know.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_matrix = parameter.dim() >= 2 and name.endswith("weight") and id(parameter) not in tables
            (decayed if is_matrix else others).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    fused = not is_scaled and all(parameter.device.type in _FUSED for parameter in model.parameters())
    return optim.AdamW(
        [group for group in groups if group["params"]], lr=config.lr, betas=config.betas, eps=config.eps, fused=fused
    )


def _check(step: int, total_steps: int, warmup_steps: int) -> None:
    if not 0 <= step < total_steps:
        raise ValueError(f"step {step} does not lie in a run of {total_steps} steps, 0 to {total_steps - 1}")
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(f"{warmup_steps} warm-up steps do not lie in a run of {total_steps} steps")
