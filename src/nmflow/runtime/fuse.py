"""Activation functions that follow a compressed layer at once, moved into it: which pairs are known, in and out again.

A pair is known where the code between the two modules is known: neighbours in `nn.Sequential`, and the feed-forward
blocks of torch, timm and transformers by their class. Adjacent attributes alone prove nothing. Nor is a pair known
whose linear layer is used twice, for its other user may want no activation, or where someone sees or replaces what
passes between the two: a hook, a `forward` set on the instance, a subclass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import nn

from nmflow.ops.dense import Activation
from nmflow.runtime.modules import NMLinear

_FUSED = "_nm_fused"
_PAIRS: dict[tuple[str, str], tuple[str, str]] = {  # (package, class): (linear, what follows it)
    ("torch", "TransformerEncoderLayer"): ("linear1", "activation"),
    ("torch", "TransformerDecoderLayer"): ("linear1", "activation"),
    ("timm", "Mlp"): ("fc1", "act"),
    ("transformers", "GPT2MLP"): ("c_fc", "act"),
    ("transformers", "BertIntermediate"): ("dense", "intermediate_act_fn"),
    ("transformers", "RobertaIntermediate"): ("dense", "intermediate_act_fn"),
    ("transformers", "ViTIntermediate"): ("dense", "intermediate_act_fn"),
    ("transformers", "T5DenseActDense"): ("wi", "act"),
}
_HELPERS = ("_ff_block",)
"""Methods beside forward that those classes call between the two."""
_BY_CLASS: dict[tuple[str, str], Activation] = {  # (package, class); torch's GELU says which one it is
    ("torch", "ReLU"): "relu", ("torch", "SiLU"): "silu",
    ("timm", "GELU"): "gelu", ("timm", "GELUTanh"): "gelu_tanh",
    ("transformers", "GELUActivation"): "gelu", ("transformers", "SiLUActivation"): "silu",
    ("transformers", "NewGELUActivation"): "gelu_tanh", ("transformers", "PytorchGELUTanh"): "gelu_tanh",
    ("transformers", "GELUTanh"): "gelu_tanh",
}  # fmt: skip
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def fuse_activations(model: nn.Module) -> list[str]:
    """Let compressed layers apply the activation function behind them while y is in registers; in place.

    Returns the names of the layers that do so now. What they took over becomes the identity; `nmflow.decompress`
    puts it back. Outputs change by rounding only: 1e-6 in float32, and in bfloat16 one rounding fewer.

    Layers that are used in several places, have hooks or are not torch's own keep their activation behind them. What
    cannot be seen is a module that calls parts of its `nn.Sequential` by their index: `self.layers[0](x)` gives the
    activated y afterwards. Do not fuse such a model.
    """
    fused = []
    reached = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    for name, module in model.named_modules():
        for local, linear, follower in list(_pairs(module)):
            activation = _activation_of(getattr(module, follower))
            # The activation may be reached more than once: it is replaced here alone.
            if activation is None or linear.activation is not None or reached[id(linear)] > 1:
                continue
            if type(linear) is not NMLinear or not _is_untouched(linear):
                continue
            linear.activation = activation
            module.__dict__.setdefault(_FUSED, {})[follower] = getattr(module, follower)
            setattr(module, follower, nn.Identity())
            fused.append(f"{name}.{local}" if name else local)
    return fused


def unfuse(module: nn.Module) -> None:
    """Put back what `fuse_activations` took from one module; nothing where it took nothing."""
    for name, follower in module.__dict__.pop(_FUSED, {}).items():
        if isinstance(follower, nn.Module):
            module._modules[name] = follower  # in its old place: the order of modules is the order of calls
        else:
            del module._modules[name]
            setattr(module, name, follower)
    if isinstance(module, NMLinear):
        module.__dict__.pop("activation", None)


def _pairs(module: nn.Module) -> Iterator[tuple[str, NMLinear, str]]:
    """(name of the linear layer, the layer, name of what follows it) for what is known to follow."""
    if any(name in module.__dict__ for name in ("forward", *_HELPERS)):
        return
    if type(module) is nn.Sequential:
        names = list(module._modules)
        for name, follower in pairwise(names):
            linear = module._modules[name]
            if isinstance(linear, NMLinear):
                yield name, linear, follower
        return
    for cls in type(module).__mro__:
        pair = _PAIRS.get((_package(cls), cls.__name__))
        if pair is not None and all(
            getattr(type(module), name, None) is getattr(cls, name, None) for name in ("forward", *_HELPERS)
        ):
            linear = getattr(module, pair[0])
            if isinstance(linear, NMLinear):
                yield pair[0], linear, pair[1]
            return


def _activation_of(follower: Any) -> Activation | None:
    if follower is F.relu:
        return "relu"
    if follower is F.gelu:
        return "gelu"
    if follower is F.silu:
        return "silu"
    if not isinstance(follower, nn.Module) or not _is_untouched(follower):
        return None
    if type(follower) is nn.GELU:
        return "gelu_tanh" if follower.approximate == "tanh" else "gelu"
    return _BY_CLASS.get((_package(type(follower)), type(follower).__name__))


def _is_untouched(module: nn.Module) -> bool:
    """Whether calling a module does what its class says and nothing more."""
    return "forward" not in module.__dict__ and not any(getattr(module, hooks) for hooks in _HOOKS)


def _package(cls: type) -> str:
    return cls.__module__.partition(".")[0]
