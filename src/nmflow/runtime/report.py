"""What compressing has won: bytes before and after, and who computes with each weight."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from nmflow.runtime.modules import NMConv2d, NMLinear, PackedWeight, packed_weights

STORAGE_ONLY = "storage only"


@dataclass(frozen=True)
class LayerReport:
    """One compressed weight. `kernel` names what computes with it; "storage only" where it is unpacked to be used."""

    name: str
    pattern: str
    bytes_before: int
    bytes_after: int
    kernel: str
    others: Mapping[str, str] = field(default_factory=dict)
    """Kernels of this machine that leave it to others, at some numbers of tokens at least, and why."""
    bytes_of_forms: int = 0
    """Memory beside `bytes_after`: the forms of it that kernels made so far, and read."""


@dataclass(frozen=True)
class CompressionReport:
    """The compressed weights, and the bytes of the whole: of a model's tensors, or of the files."""

    layers: tuple[LayerReport, ...]
    bytes_before: int
    bytes_after: int

    @property
    def bytes_of_forms(self) -> int:
        """Memory beside `bytes_after`: the forms of the weights that kernels made so far, and read."""
        return sum(layer.bytes_of_forms for layer in self.layers)

    def lines(self) -> list[str]:
        """For people: one line a weight, then the total."""
        width = max((len(layer.name) for layer in self.layers), default=0)
        lines = [
            f"{layer.name:{width}}  {layer.pattern:>7}  {layer.bytes_before:>11,} -> {layer.bytes_after:>11,} bytes"
            f"  {layer.kernel}"
            for layer in self.layers
        ]
        forms = self.bytes_of_forms
        ratio = self.bytes_before / self.bytes_after if self.bytes_after else 1.0
        count = f"{len(self.layers)} weight{'' if len(self.layers) == 1 else 's'}"
        reasons = Counter(reason for layer in self.layers for reason in layer.others.items())
        return [
            *lines,
            f"compressed {count}: {self.bytes_before:,} -> {self.bytes_after:,} bytes, {ratio:.2f} times smaller",
            *([f"in memory, with the forms that kernels read: {self.bytes_after + forms:,} bytes"] if forms else []),
            *(f"not always {name}: {reason} ({many} of them)" for (name, reason), many in reasons.items()),
        ]

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**asdict(self), "bytes_of_forms": self.bytes_of_forms}


def compression_report(model: nn.Module) -> CompressionReport:
    """What is compressed in a model, taken from its layers as they are now; no layers for an ordinary model.

    Bytes are those of all parameters and buffers, tied ones once. What kernels hold besides grows as they are called:
    ask again after inputs of every size the model will see.
    """
    weights: dict[int, PackedWeight] = {}
    kernels: dict[int, list[str]] = {}  # tied modules may read one weight in different ways
    # MultiheadAttention multiplies with the weight of its out_proj by itself.
    never_called = {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    for module in model.modules():
        for local, packed in packed_weights(module).items():
            weights[id(packed)] = packed
            kernel = STORAGE_ONLY if id(module) in never_called else _kernel(module, local, packed)
            kernels.setdefault(id(packed), []).append(kernel)
    layers = tuple(_layer(weights[key], list(dict.fromkeys(kernels[key]))) for key in weights)
    after = _nbytes(model)
    stored = sum(_nbytes(packed) for packed in weights.values())
    return CompressionReport(layers, after - stored + sum(layer.bytes_before for layer in layers), after)


def _kernel(module: nn.Module, local: str, packed: PackedWeight) -> str:
    if local == "weight" and isinstance(module, NMLinear):
        return packed.kernel()
    if local == "weight" and isinstance(module, NMConv2d):
        return packed.kernel() if module.is_product() else "dense"
    return STORAGE_ONLY


def _nbytes(module: nn.Module) -> int:
    return sum({id(tensor): tensor.nbytes for tensor in (*module.parameters(), *module.buffers())}.values())


def _layer(packed: PackedWeight, kernels: list[str]) -> LayerReport:
    others = {} if kernels == [STORAGE_ONLY] else packed.others()
    what = packed.stored.name, packed.patterns(), packed.dense_nbytes, packed.nbytes
    return LayerReport(*what, " and ".join(kernels), others, packed.forms_nbytes)
