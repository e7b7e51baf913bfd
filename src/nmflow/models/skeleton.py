"""A network's architecture alone, on torch's meta device: names and shapes at no cost of memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nmflow.models.encoder import Shape
from nmflow.models.lm import LanguageModel
from nmflow.models.transformers_models import PREFIX, unreachable
from nmflow.models.vit import VisionTransformer
from nmflow.train.config_errors import nearest


def skeleton(name: str, **options: Any) -> nn.Module:
    """The network of a name as `model=` takes it: timm:NAME, transformers:NAME (a folder, a model on the hub, or a kind
    such as gpt2), vit-tiny, lm-tiny. `options` go to timm's builder; the others have none.

    Raises `ValueError` where there is none of that name, or the package that has it is missing.
    """
    with torch.device("meta"):
        if name == "vit-tiny":
            return VisionTransformer((3, 32, 32), 4, 10, Shape())
        if name == "lm-tiny":
            return LanguageModel(256, 128, Shape())
        if name.startswith("timm:"):
            return _timm(name.removeprefix("timm:"), options)
        if name.startswith(PREFIX):
            return _transformers(name.removeprefix(PREFIX))
    raise ValueError(f'no network "{name}"; there are timm:NAME, transformers:NAME, vit-tiny and lm-tiny')


def _timm(name: str, options: dict[str, Any]) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise ValueError(f"timm:{name} needs timm: pip install 'nmflow[timm]'") from error
    if not timm.is_model(name):
        raise ValueError(f'timm has no "{name}"{nearest(name, timm.list_models())}')
    model: nn.Module = timm.create_model(name, pretrained=False, **options)
    return model


def _transformers(name: str) -> nn.Module:
    """With the head that the configuration names, where it names one."""
    try:
        import transformers
    except ImportError as error:
        raise ValueError(f"{PREFIX}{name} needs transformers: pip install 'nmflow[transformers]'") from error
    try:
        known = name in transformers.CONFIG_MAPPING
        settings = transformers.AutoConfig.for_model(name) if known else transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(unreachable(name, error)) from error
    named = getattr(transformers, (settings.architectures or [""])[0], None)
    model: nn.Module = named(settings) if named is not None else transformers.AutoModel.from_config(settings)
    return model
