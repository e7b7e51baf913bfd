"""An input to count a network on, of the sizes that its own configuration names."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn

from nmflow.models.lm import LanguageModel
from nmflow.models.vit import VisionTransformer

TOKENS = 512
"""Of a text where the network's context is longer, or its configuration names none."""

SIDE = 224
"""Pixels of an image where the configuration names no size."""


@dataclass(frozen=True)
class ExampleInput:
    """Inputs without numbers, on the meta device, and what they are in words."""

    inputs: Tensor | dict[str, Tensor]
    text: str


def example_input(
    model: nn.Module, batch: int = 1, image: int | None = None, length: int | None = None
) -> ExampleInput:
    """An example for a network of `nmflow.models.skeleton`: `batch` images of `image` pixels square, or texts of
    `length` tokens; a pair of texts for an encoder-decoder.

    Sizes that are not given are those of the network's configuration. Raises `ValueError` where a size is of no use to
    the network, or it takes neither images nor text.
    """
    shape = _image_of(model)
    if shape is None:
        return _texts(model, batch, image, length)
    if length is not None:
        raise ValueError(f"a length of {length} is of no use: the network takes images")
    if image is not None:
        shape = (shape[0], image, image)
    images = torch.empty(batch, *shape, device="meta")
    inputs = {"pixel_values": images} if hasattr(model, "main_input_name") else images
    own = "" if image is not None else ", the size that it is configured for"
    return ExampleInput(inputs, f"{_number(batch, 'image')} of {' x '.join(map(str, shape))}{own}")


def _image_of(model: nn.Module) -> tuple[int, int, int] | None:
    """[C, H, W] of the images that a network takes; None where it takes none."""
    if isinstance(model, VisionTransformer):
        side = isqrt(model.position.shape[1]) * int(model.stem.stride[0])
        return model.stem.in_channels, side, side
    known: Any = getattr(model, "pretrained_cfg", None)  # timm
    if known is not None:
        channels, height, width = known["input_size"]
        return channels, height, width
    if getattr(model, "main_input_name", None) != "pixel_values":
        return None
    config: Any = model.config
    side = getattr(config, "image_size", SIDE)
    height, width = (side, side) if isinstance(side, int) else side
    return getattr(config, "num_channels", 3), height, width


def _texts(model: nn.Module, batch: int, image: int | None, length: int | None) -> ExampleInput:
    config: Any = getattr(model, "config", None)
    if isinstance(model, LanguageModel):
        context = model.position.shape[1]
    elif getattr(model, "main_input_name", None) == "input_ids":
        context = getattr(config, "max_position_embeddings", 0)
    else:
        raise ValueError("the network takes neither images nor text; nmflow.count_flops takes an example of yours")
    if image is not None:
        raise ValueError(f"an image of {image} is of no use: the network takes text")
    own = "" if length is not None else f"; its context is {context:,}" if context > 0 else "; its context is not told"
    if length is None:
        length = min(context, TOKENS) if context > 0 else TOKENS
    ids = torch.zeros(batch, length, dtype=torch.long, device="meta")
    text = f"{length:,} tokens{own}"
    if config is None:
        return ExampleInput(ids, f"{_number(batch, 'text')} of {text}")
    if not config.is_encoder_decoder:
        return ExampleInput({"input_ids": ids}, f"{_number(batch, 'text')} of {text}")
    both = {"input_ids": ids, "decoder_input_ids": ids}
    return ExampleInput(both, f"{_number(batch, 'pair')} of texts, each of {text}")


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
