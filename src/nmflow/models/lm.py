"""lm-tiny: a small causal language model on torch's own layers, of the same sizes as vit-tiny."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nmflow.models.encoder import Shape, encoder, initialize
from nmflow.train.config_sections import ModelConfig
from nmflow.train.data.splits import Data


class LanguageModel(nn.Module):
    """Tokens [B, T] to logits [B, T, vocabulary]; the logits at a position depend on it and those before."""

    hidden: Tensor

    def __init__(self, vocabulary: int, context: int, shape: Shape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, shape.width)
        self.position = nn.Parameter(torch.empty(1, context, shape.width))
        self.dropout = nn.Dropout(shape.dropout)
        self.encoder = encoder(shape)
        self.head = nn.Linear(shape.width, vocabulary)
        future = torch.ones(context, context, dtype=torch.bool).triu(diagonal=1)
        self.register_buffer("hidden", future, persistent=False)
        initialize(self, shape.depth)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        features_BTC = self.dropout(self.embedding(tokens) + self.position[:, :length])
        features_BTC = self.encoder(features_BTC, mask=self.hidden[:length, :length], is_causal=True)
        logits: Tensor = self.head(features_BTC)
        return logits


def build_lm(config: ModelConfig, data: Data) -> LanguageModel:
    """The model for the vocabulary and context of `data`. Raises `ValueError` where the data are no text."""
    if data.kind != "text":
        raise ValueError(
            f"model: {config.name} takes text, not {data.name}; "
            "use vit-tiny for images, transformers:NAME for sentences"
        )
    if config.patch is not None:
        raise ValueError(f"model.patch is of no use to {config.name}; leave it out")
    return LanguageModel(data.num_classes, data.sample_shape[0], Shape.of(config))
