"""How a network is called on an example input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

Example = Tensor | Sequence[Any] | Mapping[str, Any]
"""A network's input: a tensor, its positional or its keyword arguments."""


def run(model: nn.Module, example: Example) -> Any:
    """What `model` gives for an example."""
    if isinstance(example, Tensor):
        return model(example)
    return model(**example) if isinstance(example, Mapping) else model(*example)
