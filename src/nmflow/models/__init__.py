"""Which networks there are, by the name that a configuration gives them."""

from __future__ import annotations

from torch import nn

from nmflow.models.lm import build_lm
from nmflow.models.timm_models import build_timm
from nmflow.models.transformers_models import PREFIX, build_transformers
from nmflow.models.vit import build_vit
from nmflow.train.config_sections import ModelConfig
from nmflow.train.data.splits import Data

__all__ = ["BUILDERS", "build_model"]

BUILDERS = {"vit-tiny": build_vit, "lm-tiny": build_lm}


def build_model(config: ModelConfig, data: Data) -> nn.Module:
    """The network of a configuration for a data set, from inputs to logits; fixed by torch's random state.

    Logits are [B, classes] for images and sentences, [B, T, vocabulary] for text. Raises `ValueError` where model and
    data do not fit, a size does not divide, or a package or the weights are asked for and missing.
    """
    if config.name.startswith("timm:"):
        return build_timm(config, data)
    if config.drop_path:
        raise ValueError(f"model.drop_path: {config.name} has none, only models of timm do; leave it out")
    if config.name.startswith(PREFIX):
        return build_transformers(config, data)
    if config.pretrained:
        raise ValueError(f"model.pretrained: {config.name} has no weights to begin with; leave it out")
    return BUILDERS[config.name](config, data)
