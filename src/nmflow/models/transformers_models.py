"""transformers:NAME: a network of transformers with the head that the data ask for, from its weights or fresh."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nmflow.train.config_sections import ModelConfig
from nmflow.train.data.hub import fetch_command
from nmflow.train.data.splits import Data
from nmflow.train.data.vocabulary import END, PAD

PREFIX = "transformers:"

_HEADS = {"sentences": "AutoModelForSequenceClassification", "text": "AutoModelForCausalLM",
          "translation": "AutoModelForSeq2SeqLM"}  # fmt: skip
"""The class of transformers that puts the right head on a network, by the kind of data."""

_SIZES = {"width": "hidden_size", "depth": "num_hidden_layers", "heads": "num_attention_heads"}
"""Our sizes by the names that transformers' configurations share."""

_DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout_rate", "resid_pdrop", "embd_pdrop",
             "attn_pdrop", "dropout", "attention_dropout", "hidden_dropout", "emb_pdrop", "embed_dropout",
             "resid_dropout")  # fmt: skip
"""Dropout of hidden states, embeddings and attention by the names of transformers' configurations.
That of MPT's attention is left at 0: transformers takes whole numbers alone for it."""

_ENDS = {"pad_token_id": PAD, "decoder_start_token_id": PAD, "eos_token_id": END}
"""How a translation begins and ends."""


def build_transformers(config: ModelConfig, data: Data) -> nn.Module:
    """A network by the name of its folder, or of its model on the hub, with `data.num_classes` outputs.

    With its weights unless `model.pretrained=false`, which takes the architecture alone (of a folder, a model on the
    hub, or a kind that transformers knows, such as gpt2 or llama); a head that the weights lack
    begins fresh, fixed by torch's random state. Only safetensors are read, nothing is unpickled.

    Raises `ValueError` where transformers or the network are missing (with the line that fetches them), the data are
    images, or a size is given for weights that have theirs.
    """
    name = config.name.removeprefix(PREFIX)
    try:
        import transformers
    except ImportError as error:
        raise ValueError(f"model: {config.name} needs transformers: pip install 'nmflow[transformers]'") from error
    if data.kind not in _HEADS:
        raise ValueError(f"model: {config.name} takes text, not {data.name}; use model=vit-tiny or timm:NAME")
    auto = getattr(transformers, _HEADS[data.kind])
    settings = _settings(transformers, name, config, data)
    try:
        if config.pretrained is False:
            fresh: nn.Module = auto.from_config(settings)
            if data.kind == "translation":  # what a folder says of generation is about the tokens that it had
                fresh.generation_config = transformers.GenerationConfig(**_ENDS)
            return fresh
        with _quiet(transformers):
            model, info = auto.from_pretrained(
                name, config=settings, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
    except OSError as error:
        raise ValueError(unreachable(name, error)) from error
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"model: transformers refuses {name} as {_HEADS[data.kind]}: {error}") from error
    body = f"{model.base_model_prefix}."
    lacking = sorted(key for key in info["missing_keys"] if key.startswith(body) and ".pooler." not in key)
    if data.kind == "text" and data.num_classes > settings.vocab_size:
        raise ValueError(
            f"model: {name} knows {settings.vocab_size:,} tokens, the text has {data.num_classes:,}; leave "
            "data.tokenizer out, or begin fresh: model.pretrained=false"
        )
    if lacking:
        raise ValueError(
            f"model: the weights of {name} lack {len(lacking)} tensors of the network, {lacking[0]} first; are they "
            f"those of a {type(model).__name__}?"
        )
    loaded: nn.Module = model
    return loaded


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without its bars and its report on a head that is fresh, which is expected here; what matters is checked."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _settings(transformers: Any, name: str, config: ModelConfig, data: Data) -> Any:
    """The configuration of transformers: the network's own, or a kind's standard one, with our sizes and classes."""
    given = {theirs: value for ours, theirs in _SIZES.items() if (value := getattr(config, ours)) is not None}
    refused = [ours for ours in ("patch", "mlp_ratio") if getattr(config, ours) is not None]
    if data.kind == "translation":
        if config.pretrained is not False:
            raise ValueError(
                f"model: the vocabulary of this translation is its own, the weights of {name} have another; begin "
                "fresh: model.pretrained=false"
            )
        refused, given = ["patch"] if config.patch is not None else [], _pair_sizes(config, data)
    if config.pretrained is not False:
        refused += [ours for ours, theirs in _SIZES.items() if theirs in given]
    if refused:
        why = "it has sizes of its own" if config.pretrained is not False else "transformers has no such setting"
        raise ValueError(f"{', '.join(f'model.{ours}' for ours in refused)}: of no use to {config.name}, {why}")
    if data.kind == "sentences":
        given["num_labels"] = data.num_classes
        given["problem_type"] = "regression" if data.num_classes == 1 else "single_label_classification"
    elif data.kind == "text" and config.pretrained is False:
        given |= {"vocab_size": data.num_classes, "bos_token_id": None, "eos_token_id": None}
    try:
        if config.pretrained is False and name in transformers.CONFIG_MAPPING:
            settings = transformers.AutoConfig.for_model(name, **given)
        else:
            settings = transformers.AutoConfig.from_pretrained(name, **given)
    except OSError as error:
        raise ValueError(unreachable(name, error)) from error
    except ValueError as error:
        raise ValueError(f"model: transformers cannot read the configuration of {name}: {error}") from error
    if config.dropout is not None:
        known = [key for key in _DROPOUTS if hasattr(settings, key)]
        if not known:
            raise ValueError(f"model.dropout: of no use to {config.name}, transformers has no such setting")
        for key in known:
            setattr(settings, key, config.dropout)
    return settings


def _pair_sizes(config: ModelConfig, data: Data) -> dict[str, Any]:
    """Our sizes as encoder-decoders name them (Marian's and BART's, and T5's), for both sides alike."""
    found: dict[str, Any] = {"vocab_size": data.num_classes, **_ENDS, "forced_eos_token_id": None}
    if config.width is not None:
        found["d_model"] = config.width
        for key in ("encoder_ffn_dim", "decoder_ffn_dim", "d_ff"):
            found[key] = round(config.width * (config.mlp_ratio or 4.0))
        if config.heads is not None:
            found["d_kv"] = config.width // config.heads
    elif config.mlp_ratio is not None:
        raise ValueError("model.mlp_ratio: give model.width as well")
    if config.depth is not None:
        found |= dict.fromkeys(("encoder_layers", "decoder_layers", "num_layers", "num_decoder_layers"), config.depth)
    if config.heads is not None:
        heads = ("encoder_attention_heads", "decoder_attention_heads", "num_heads")
        found |= dict.fromkeys(heads, config.heads)
    return {**found, "max_position_embeddings": data.sample_shape[0], "decoder_vocab_size": data.num_classes}


def unreachable(name: str, error: Exception) -> str:
    """What to tell where transformers finds no network of this name, and the line that fetches it."""
    if Path(name).exists():
        return f"model: {name} is no folder of transformers: {str(error).splitlines()[0]}"
    return f"model: there is no folder {name}, and the hub gave no such model; fetch it: {fetch_command(name)}"
