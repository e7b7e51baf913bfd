"""A compressed network made ready to answer: what is left beside its sparse products is made cheaper, too."""

from __future__ import annotations

from typing import TypeVar, cast

from torch import Tensor, nn

from nmflow.ops import native_stream
from nmflow.runtime.fuse import fuse_activations

ModelT = TypeVar("ModelT", bound=nn.Module)


class StreamedLinear(nn.Linear):
    """`nn.Linear`, but for up to four tokens the weight is read as fast as memory gives it (native/stream.h).

    The parameters are those of the layer it was; more tokens, gradients and compiled graphs take torch's product.
    """

    def forward(self, input: Tensor) -> Tensor:
        if native_stream.streams(input, self.weight, self.bias):
            return native_stream.stream(input, self.weight, self.bias)
        return super().forward(input)


def for_inference(model: ModelT) -> ModelT:
    """Make a compressed model (or any other) faster in eager inference on the CPU; in place, and returned.

    Activation functions go into the compressed layers before them (`fuse_activations`), and the linear layers that
    stayed dense read their weight at memory's speed where there are few tokens: a language model's head is most of
    what one token costs once the rest is sparse. Outputs change by rounding only. `nmflow.decompress` undoes both.
    A module that calls parts of its `nn.Sequential` by their index is not for this: see `fuse_activations`.
    """
    fuse_activations(model)
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = StreamedLinear
    return model


def unstream(module: nn.Module) -> None:
    """Give a streamed layer its class back."""
    if type(module) is StreamedLinear:
        cast(nn.Module, module).__class__ = nn.Linear
