"""The models that the contract is checked on: tiny, real, with fresh weights and no download.

Every host says by hand which rows of which weights its targets make sparse; nothing of it comes from nmflow.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from contract.oracle import Part, Parts, prune_by_hand

CONV = {"axis": "conv"}


@dataclass(frozen=True)
class Host:
    """One line of the table of models."""

    name: str
    make: Callable[[], nn.Module]
    draw: Callable[[torch.Generator], Tensor]
    """Draws one batch of `BATCH` examples."""
    targets: Mapping[str, str]
    weights: Parts
    """What `targets` make sparse, written by hand."""
    needs: str | None = None
    """Optional package."""
    forward: Callable[[nn.Module, Tensor], Tensor] = lambda model, batch: model(batch)
    remainder: str = "error"
    training: bool = True
    """Whether it runs in training mode."""
    has_batch_statistics: bool = False
    """BatchNorm: a micro-batch in training mode is not a part of the batch."""

    def build(self, seed: int = 0) -> nn.Module:
        """A model in whose output every weight is seen: of size 1/√fan, and no gain left at zero."""
        if self.needs is not None:
            pytest.importorskip(self.needs, reason=f"host {self.name} needs the optional package {self.needs}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.make()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() > 1:
                        parameter.normal_(std=parameter[0].numel() ** -0.5)
                    else:
                        parameter.add_(torch.randn(parameter.shape), alpha=0.3)
        return model.train(self.training)

    def inputs(self, seed: int = 0) -> Tensor:
        return self.draw(torch.Generator().manual_seed(seed))

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """A mean over examples whose gradient differs from output to output."""
        output = self.forward(model, batch)
        probe = torch.cos(torch.arange(output[0].numel(), dtype=output.dtype)).reshape(output.shape[1:])
        return (output * probe).mean() + 0.5 * output.square().mean()

    def pruned_copy(self, model: nn.Module, decay: float) -> nn.Module:
        """An ordinary model with the dense weights of `model`, pruned by hand."""
        copy = self.build().to(next(model.parameters()).dtype)
        copy.load_state_dict(model.state_dict())
        return prune_by_hand(copy, self.weights, decay).train(model.training)


BATCH = 4


def _features(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.randn(BATCH, *shape, generator=generator)


def _tokens(generator: torch.Generator) -> Tensor:
    return torch.randint(1, 32, (BATCH, 6), generator=generator)


def _qkv(width: int, q: Part | None, k: Part | None, v: Part | None) -> tuple[Part, ...]:
    """Parts of a fused projection of three equal slices."""
    slices = ((q, (0, width)), (k, (width, 2 * width)), (v, (2 * width, 3 * width)))
    return tuple(replace(part, rows=rows) for part, rows in slices if part is not None)


# ------------------------------------------------------------------------------------------ plain torch
def _attention() -> nn.Module:
    return nn.MultiheadAttention(16, 2, batch_first=True)


def _self_attention(model: nn.Module, batch: Tensor) -> Tensor:
    output: Tensor = model(batch, batch, batch, need_weights=False)[0]
    return output


def _convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=2), nn.ReLU(), nn.Conv2d(12, 4, 1)
    )


def _encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)


_ENCODER_WEIGHTS = {
    "self_attn.in_proj_weight": (Part(2, 4),),
    "self_attn.out_proj.weight": (Part(1, 4),),
    "linear1.weight": (Part(1, 8),),
    "linear2.weight": (Part(1, 8),),
}
_ENCODER_TARGETS = {"ff": "1:8", "qkv": "2:4", "o": "1:4"}


# ------------------------------------------------------------------------------------------------- timm
def _vit() -> nn.Module:
    transformer = importlib.import_module("timm.models.vision_transformer").VisionTransformer
    return transformer(img_size=8, patch_size=4, num_classes=5, embed_dim=16, depth=2, num_heads=2)


def _swin() -> nn.Module:
    swin = importlib.import_module("timm.models.swin_transformer_v2").SwinTransformerV2
    return swin(
        img_size=16, patch_size=2, num_classes=5, embed_dim=16, depths=(1, 1), num_heads=(1, 2), window_size=4,
        drop_path_rate=0.0,
    )


_RESNET_DEPTHS = (2, 2, 1, 1)
"""Of ResNet-50's (3, 4, 6, 3): blocks with and without a projection beside them, six instead of sixteen."""


def _resnet() -> nn.Module:
    timm = importlib.import_module("timm")
    return timm.create_model("resnet50", num_classes=5, layers=_RESNET_DEPTHS, channels=(8, 8, 16, 16))


_RESNET_CONVS = [
    *(f"layer{stage}.{i}.conv{k}.weight" for stage, depth in enumerate(_RESNET_DEPTHS, 1)
      for i in range(depth) for k in (1, 2, 3)),
    *(f"layer{stage}.0.downsample.0.weight" for stage in (1, 2, 3, 4)),
]


# ----------------------------------------------------------------------------------------- transformers
def _transformers(model: str, config: str, **options: object) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        package = importlib.import_module("transformers")
        built: nn.Module = getattr(package, model)(getattr(package, config)(**options))
        return built

    return make


def _conv1d() -> nn.Module:
    conv1d = importlib.import_module("transformers.pytorch_utils").Conv1D
    return nn.Sequential(conv1d(24, 16), nn.GELU(), conv1d(8, 24))


def _logits(model: nn.Module, batch: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=batch).logits
    return logits


def _translate(model: nn.Module, batch: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=batch, decoder_input_ids=batch.flip(1)).logits
    return logits


_T5_ATTENTION = [
    "encoder.block.0.layer.0.SelfAttention",
    "decoder.block.0.layer.0.SelfAttention",
    "decoder.block.0.layer.1.EncDecAttention",
]
_T5_FF = ["encoder.block.0.layer.1.DenseReluDense", "decoder.block.0.layer.2.DenseReluDense"]

HOSTS = [
    Host(
        "linear", lambda: nn.Linear(16, 6), _features(16),
        targets={"weight": "1:4"}, weights={"weight": (Part(1, 4),)},
    ),
    Host(
        "conv2d", _convolutions, _features(3, 6, 6),
        targets={"conv": "2:4v6", "4": "2:4"},
        weights={"2.weight": (Part(2, 4, **CONV, v=6),), "4.weight": (Part(2, 4, **CONV),)},
    ),
    Host(
        "conv1d", _conv1d, _features(5, 16), needs="transformers",
        targets={"0.weight": "1:8", "2": "2:12v4"},
        weights={"0.weight": (Part(1, 8, axis="first"),), "2.weight": (Part(2, 12, axis="first", v=4),)},
    ),
    Host(
        "mha", _attention, _features(5, 16), forward=_self_attention,
        targets={"q": "1:4v3", "k": "2:8", "o": "1:8v16"}, remainder="partial",  # five groups of three rows and one row
        weights={
            "in_proj_weight": _qkv(16, Part(1, 4, v=3), Part(2, 8), None),
            "out_proj.weight": (Part(1, 8, v=16),),
        },
    ),
    Host(
        "encoder_layer_train", _encoder_layer, _features(5, 16),
        targets=_ENCODER_TARGETS, weights=_ENCODER_WEIGHTS,
    ),
    Host(
        "encoder_layer_eval", _encoder_layer, _features(5, 16), training=False,
        targets=_ENCODER_TARGETS, weights=_ENCODER_WEIGHTS,
    ),
    Host(
        "timm_vit", _vit, _features(3, 8, 8), needs="timm",
        targets={"ff": "1:8", "qk": "1:4"},
        weights={
            name: parts
            for i in (0, 1)
            for name, parts in {
                f"blocks.{i}.attn.qkv.weight": _qkv(16, Part(1, 4), Part(1, 4), None),
                f"blocks.{i}.mlp.fc1.weight": (Part(1, 8),),
                f"blocks.{i}.mlp.fc2.weight": (Part(1, 8),),
            }.items()
        },
    ),
    Host(
        "timm_swinv2", _swin, _features(3, 16, 16), needs="timm",
        targets={"ff": "1:16", "qkv": "1:4", "k": "2:8"},
        weights={
            name: parts
            for i, width in ((0, 16), (1, 32))
            for name, parts in {
                f"layers.{i}.blocks.0.attn.qkv.weight": _qkv(width, Part(1, 4), Part(2, 8), Part(1, 4)),
                f"layers.{i}.blocks.0.mlp.fc1.weight": (Part(1, 16),),
                f"layers.{i}.blocks.0.mlp.fc2.weight": (Part(1, 16),),
            }.items()
        },
    ),
    Host(
        "timm_resnet", _resnet, _features(3, 16, 16), needs="timm", has_batch_statistics=True,
        targets={"conv": "2:16"}, remainder="partial",            # 8 channels: one short block a row
        weights={name: (Part(2, 16, **CONV),) for name in _RESNET_CONVS},
    ),
    Host(
        "t5",
        _transformers(
            "T5ForConditionalGeneration", "T5Config", vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1,
            num_decoder_layers=1, num_heads=2, dropout_rate=0.0, use_cache=False, decoder_start_token_id=0,
        ),
        _tokens, forward=_translate, needs="transformers",
        targets={"ff": "1:8", "qkv": "1:4", "o": "2:4"},
        weights={
            **{f"{path}.{name}.weight": (Part(1, 4),) for path in _T5_ATTENTION for name in "qkv"},
            **{f"{path}.o.weight": (Part(2, 4),) for path in _T5_ATTENTION},
            **{f"{path}.{name}.weight": (Part(1, 8),) for path in _T5_FF for name in ("wi", "wo")},
        },
    ),
    Host(
        "bert",
        _transformers(
            "BertForSequenceClassification", "BertConfig", vocab_size=32, hidden_size=16, num_hidden_layers=1,
            num_attention_heads=2, intermediate_size=32, max_position_embeddings=8, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        _tokens, forward=_logits, needs="transformers",
        targets={"ff": "1:16", "qk": "2:8", "o": "1:4"},
        weights={
            f"bert.encoder.layer.0.{name}.weight": (part,)
            for name, part in {
                "attention.self.query": Part(2, 8), "attention.self.key": Part(2, 8),
                "attention.output.dense": Part(1, 4),
                "intermediate.dense": Part(1, 16), "output.dense": Part(1, 16),
            }.items()
        },
    ),
    Host(
        "gpt2",
        _transformers(
            "GPT2LMHeadModel", "GPT2Config", vocab_size=32, n_positions=8, n_embd=16, n_layer=1, n_head=2,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, bos_token_id=0, eos_token_id=0,
        ),
        _tokens, forward=_logits, needs="transformers",
        targets={"ff": "1:8", "qk": "1:4", "transformer.wte.weight": "2:8"},   # the last one is lm_head's too
        weights={
            "transformer.wte.weight": (Part(2, 8),),
            "transformer.h.0.attn.c_attn.weight": _qkv(
                16, Part(1, 4, axis="first"), Part(1, 4, axis="first"), None
            ),
            "transformer.h.0.mlp.c_fc.weight": (Part(1, 8, axis="first"),),
            "transformer.h.0.mlp.c_proj.weight": (Part(1, 8, axis="first"),),
        },
    ),
    Host(
        "llama",
        _transformers(
            "LlamaForCausalLM", "LlamaConfig", vocab_size=32, hidden_size=16, intermediate_size=32,
            num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=8,
            use_cache=False,
        ),
        _tokens, forward=_logits, needs="transformers",
        targets={"ff": "1:16", "qkv": "1:4", "o": "2:8"},
        weights={
            **{f"model.layers.0.mlp.{name}_proj.weight": (Part(1, 16),) for name in ("gate", "up", "down")},
            **{f"model.layers.0.self_attn.{name}_proj.weight": (Part(1, 4),) for name in "qkv"},
            "model.layers.0.self_attn.o_proj.weight": (Part(2, 8),),
        },
    ),
]
HOST = {host.name: host for host in HOSTS}
every_host = pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.name)
