"""Roles on the networks people have: how many weights each takes, against sizes worked out by hand. No memory is taken:
the networks are built on torch's meta device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import nn

from nmflow.roles import roles_of
from nmflow.targets import resolve

Weights = dict[str, int]


def taken(model: nn.Module) -> Weights:
    """Weights of every role; of a fused projection each role has a third."""
    found: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        roles = roles_of(name)
        for role in roles:
            found[role] += parameter.numel() // len(roles)
    return dict(found)


def attention(count: int, width: int, inner: int = 0, key: int = 0) -> Weights:
    """`count` attentions: queries of `inner`, keys and values of `key` features."""
    inner = inner or width
    key = key or inner
    return {"q": count * width * inner, "k": count * width * key, "v": count * width * key, "o": count * width * inner}


def encoder(depth: int, width: int, hidden: int, matrices: int = 2) -> Weights:
    return {"ff": depth * matrices * width * hidden, **attention(depth, width)}


BERT = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 80}
LLAMA = {**BERT, "num_key_value_heads": 2, "head_dim": 12}
GROUPED = {"ff": 3 * 3 * 48 * 80, **attention(3, 48, key=24)}
SEQ2SEQ = {"d_model": 48, "encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 80, "decoder_ffn_dim": 112,
           "encoder_attention_heads": 4, "decoder_attention_heads": 4}  # fmt: skip
SEQ2SEQ_WEIGHTS = {"ff": 2 * 2 * 48 * 80 + 3 * 2 * 48 * 112, **attention(2 + 3 + 3, 48)}
T5 = {"d_model": 48, "d_kv": 8, "num_heads": 4, "d_ff": 80, "num_layers": 2, "num_decoder_layers": 3}

TRANSFORMERS: dict[str, tuple[str, dict[str, object], Weights]] = {
    "bert": ("bert", BERT, encoder(3, 48, 80)),
    "roberta": ("roberta", BERT, encoder(3, 48, 80)),
    "electra": ("electra", {**BERT, "embedding_size": 16}, encoder(3, 48, 80)),
    "albert": ("albert", {**BERT, "num_hidden_groups": 1}, encoder(1, 48, 80)),
    "distilbert": ("distilbert", {"dim": 48, "n_layers": 3, "n_heads": 4, "hidden_dim": 80}, encoder(3, 48, 80)),
    "modernbert, fused and gated": ("modernbert", BERT, {"ff": 3 * 3 * 48 * 80, **attention(3, 48)}),
    "gpt2, fused": ("gpt2", {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_inner": 80}, encoder(3, 48, 80)),
    "gptj": ("gptj", {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_inner": 80, "rotary_dim": 8}, encoder(3, 48, 80)),
    "llama, gated, grouped keys": ("llama", LLAMA, GROUPED),
    "mistral": ("mistral", LLAMA, GROUPED),
    "qwen3": ("qwen3", LLAMA, GROUPED),
    "gemma": ("gemma", LLAMA, GROUPED),
    "opt": ("opt", {"hidden_size": 48, "word_embed_proj_dim": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
                    "ffn_dim": 80}, encoder(3, 48, 80)),
    # Their query_key_value interleaves heads: its thirds are no roles, everything else has one.
    "gpt_neox": ("gpt_neox", BERT, {"ff": 3 * 2 * 48 * 80, "o": 3 * 48 * 48}),
    "bloom": ("bloom", {"hidden_size": 48, "n_layer": 3, "n_head": 4}, {"ff": 3 * 2 * 48 * 192, "o": 3 * 48 * 48}),
    "marian": ("marian", SEQ2SEQ, SEQ2SEQ_WEIGHTS),
    "bart": ("bart", SEQ2SEQ, SEQ2SEQ_WEIGHTS),
    "t5": ("t5", T5, {"ff": 5 * 2 * 48 * 80, **attention(2 + 3 + 3, 48, inner=32)}),
    "t5, gated": ("t5", {**T5, "feed_forward_proj": "gated-gelu"},
                  {"ff": 5 * 3 * 48 * 80, **attention(2 + 3 + 3, 48, inner=32)}),
    "vit": ("vit", BERT, encoder(3, 48, 80)),
}  # fmt: skip


@pytest.mark.parametrize("case", TRANSFORMERS)
def test_networks_of_transformers(case: str) -> None:
    transformers = pytest.importorskip("transformers", reason="an extra")
    kind, sizes, wanted = TRANSFORMERS[case]
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind, **sizes))
    assert taken(model) == wanted


@pytest.mark.parametrize("case", ["bert", "roberta", "electra", "bart", "t5", "gpt2, fused"])
def test_the_head_of_a_classifier_has_no_role(case: str) -> None:
    """What a classifier has beside the network that it stands on stays dense, an out_proj of its own included."""
    transformers = pytest.importorskip("transformers", reason="an extra")
    kind, sizes, wanted = TRANSFORMERS[case]
    with torch.device("meta"):
        settings = transformers.AutoConfig.for_model(kind, **sizes)
        model = transformers.AutoModelForSequenceClassification.from_config(settings)
    assert taken(model) == wanted


def test_a_head_that_is_an_mlp_has_no_role() -> None:
    timm = pytest.importorskip("timm", reason="an extra")
    with torch.device("meta"):
        model = timm.create_model("caformer_s18")
    found = {slot.name for slot in resolve(model, {"ff": "1:8"}).slots}
    assert "stages.2.blocks.0.mlp.fc1.weight" in found
    assert not {name for name in found if name.startswith("head.")}


def swin(embed: int, depths: tuple[int, ...]) -> Weights:
    """Widths double from stage to stage, the hidden layer has four times the width."""
    widths = [embed * 2**stage for stage in range(len(depths))]
    total = sum(depth * width * width for depth, width in zip(depths, widths, strict=True))
    return {"ff": 8 * total, "q": total, "k": total, "v": total, "o": total}


TIMM: dict[str, Callable[[], Weights]] = {
    "vit_base_patch16_224": lambda: encoder(12, 768, 3072),
    "vit_large_patch16_224": lambda: encoder(24, 1024, 4096),
    "vit_tiny_patch16_224": lambda: encoder(12, 192, 768),
    "swinv2_base_window8_256": lambda: swin(128, (2, 2, 18, 2)),
    "resnet50": dict,  # its convolutions have their role by what they are, not by name
}


@pytest.mark.parametrize("name", TIMM)
def test_networks_of_timm(name: str) -> None:
    timm = pytest.importorskip("timm", reason="an extra")
    with torch.device("meta"):
        model = timm.create_model(name)
    assert taken(model) == TIMM[name]()
