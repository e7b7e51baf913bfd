"""vit-tiny: the paper's small vision transformer (3 layers, 3 heads, width 192, MLP 4x) of torch's layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nmflow.models.encoder import Shape, encoder, initialize
from nmflow.train.config_sections import ModelConfig
from nmflow.train.data.splits import Data


class VisionTransformer(nn.Module):
    """Images [B, C, H, W] to logits [B, classes]: patches, learned positions, encoder, token mean, head."""

    def __init__(self, image: tuple[int, int, int], patch: int, num_classes: int, shape: Shape) -> None:
        super().__init__()
        channels, height, width = image
        self.stem = nn.Conv2d(channels, shape.width, kernel_size=patch, stride=patch)
        self.position = nn.Parameter(torch.empty(1, (height // patch) * (width // patch), shape.width))
        self.dropout = nn.Dropout(shape.dropout)
        self.encoder = encoder(shape)
        self.head = nn.Linear(shape.width, num_classes)
        initialize(self, shape.depth)

    def forward(self, images: Tensor) -> Tensor:
        tokens_BTC = self.stem(images).flatten(2).transpose(1, 2)
        features_BTC = self.encoder(self.dropout(tokens_BTC + self.position))
        logits: Tensor = self.head(features_BTC.mean(dim=1))
        return logits


def build_vit(config: ModelConfig, data: Data) -> VisionTransformer:
    """The model for images of `data`; a patch is 2 pixels for images below 16, 4 below 64, else 16.

    Raises `ValueError` where the data are no images or the patch does not divide them.
    """
    if data.kind != "images":
        raise ValueError(
            f"model: {config.name} takes images, not {data.name}; "
            "use lm-tiny for text, transformers:NAME for sentences"
        )
    channels, height, width = data.sample_shape
    patch = config.patch or (2 if height < 16 else 4 if height < 64 else 16)
    if height % patch or width % patch:
        raise ValueError(
            f"model.patch: {patch} does not divide an image of {height}x{width}; give a model.patch that does"
        )
    return VisionTransformer((channels, height, width), patch, data.num_classes, Shape.of(config))
