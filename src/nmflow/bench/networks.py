"""Which networks are timed, with what input: timm:NAME, transformers:gpt2, and our own; weights always fresh."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nmflow.sparsifier import Sparsifier

_IMAGE = 224


@dataclass(frozen=True)
class Subject:
    """A network and one input of it: images [B, C, H, W], or tokens [B, T] where it decodes or takes text."""

    name: str
    model: nn.Module
    inputs: Tensor
    classes: int
    decodes: bool
    """It writes text token by token with a cache (transformers)."""

    def logits(self, model: nn.Module, inputs: Tensor | None = None) -> Tensor:
        """What a copy of the network gives for the input."""
        out = model(self.inputs if inputs is None else inputs)
        logits: Tensor = out if isinstance(out, Tensor) else out.logits
        return logits


def build(name: str, batch: int, prompt: int) -> Subject:
    """A network by its name, fixed by torch's random state, in eval mode.

    Raises `ValueError` where there is none of that name, or the package that has it is missing.
    """
    if name.startswith("timm:"):
        return _timm(name, batch)
    if name == "transformers:gpt2":
        return _gpt2(name, batch, prompt)
    if name == "vit-tiny":
        return _vit_tiny(name, batch)
    raise ValueError(f'no network "{name}" to time; there are timm:NAME, transformers:gpt2 and vit-tiny')


def make_sparse(model: nn.Module, targets: Mapping[str, str]) -> int:
    """Keep the N largest magnitudes of every M in the targeted weights, in place; how many weights that were.

    The slots are recorded as after a run, for `compress`. Raises `ValueError` as `resolve` does.
    """
    sparsifier = Sparsifier(model, targets, "ste", total_steps=1, remainder="partial")
    sparsifier.step()
    return len(sparsifier.finalize().slots)


def _timm(name: str, batch: int) -> Subject:
    try:
        import timm
    except ImportError as error:
        raise ValueError(f"{name} needs timm: pip install 'nmflow[timm]'") from error
    short = name.removeprefix("timm:")
    if not timm.is_model(short):
        from nmflow.train.config_errors import nearest

        raise ValueError(f'timm has no "{short}"{nearest(short, timm.list_models())}')
    model: Any = timm.create_model(short, pretrained=False)
    channels, height, width = model.pretrained_cfg.get("input_size", (3, _IMAGE, _IMAGE))
    return Subject(name, model.eval(), torch.randn(batch, channels, height, width), model.num_classes, False)


def _gpt2(name: str, batch: int, prompt: int) -> Subject:
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError as error:
        raise ValueError(f"{name} needs transformers: pip install 'nmflow[transformers]'") from error
    config = GPT2Config()
    tokens = torch.randint(config.vocab_size, (batch, prompt))
    return Subject(name, GPT2LMHeadModel(config).eval(), tokens, config.vocab_size, True)


def _vit_tiny(name: str, batch: int) -> Subject:
    from nmflow.models.encoder import Shape
    from nmflow.models.vit import VisionTransformer

    model = VisionTransformer((3, 32, 32), 4, 10, Shape())
    return Subject(name, model.eval(), torch.randn(batch, 3, 32, 32), 10, False)
