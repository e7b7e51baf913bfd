"""text: any text file, read as characters, for a small causal language model."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nmflow.train.config import DataConfig
from nmflow.train.data.splits import Data, missing
from nmflow.train.objectives import PredictTokens

DEFAULT_CONTEXT = 128
MAX_BYTES = 1 << 29
"""The largest text that is read, unpacked."""
UNKNOWN = 0
"""Token of a character that the train part does not have."""


def load_text(config: DataConfig) -> Data:
    """Windows of T = `context` characters; the target of a character is the next one.

    The first 80 % of the text are train, the next 10 % val, the last 10 % test. Token 0 is any character that
    train lacks, the others are train's characters by code point. A training window may begin anywhere; those
    of val and test lie end to end. Raises `FileNotFoundError`, and `ValueError` where the file is no UTF-8
    text or too short.
    """
    path, context = Path(config.path or ""), config.context or DEFAULT_CONTEXT
    codes = _read(path)
    ends = [len(codes) * 8 // 10, len(codes) * 9 // 10]
    parts = np.split(codes, ends)
    if min(map(len, parts)) <= context:
        raise ValueError(
            f"{path}: {len(codes):,} characters; a tenth must be longer than the context of {context} "
            "(data.context=... makes it shorter)"
        )
    alphabet = np.unique(parts[0])
    train, val, test = (torch.from_numpy(_encode(part, alphabet)) for part in parts)
    return Data(
        name="text",
        kind="characters",
        objective=PredictTokens(),
        train=TextSplit(train, context, stride=1),
        val=TextSplit(val, context, stride=context),
        test=TextSplit(test, context, stride=context),
        num_classes=len(alphabet) + 1,
        sample_shape=(context,),
        notes=(f"{path.name}, {len(codes):,} characters, 80/10/10 in order",),
    )


@dataclass(frozen=True)
class TextSplit:
    """Tokens [n]; item i is the window that begins at i · stride."""

    tokens: Tensor
    context: int
    stride: int

    def __len__(self) -> int:
        return (len(self.tokens) - 1 - self.context) // self.stride + 1

    def batch(self, indices: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Inputs [B, T] and targets [B, T], the same window one character on. Nothing is augmented."""
        windows = self.tokens[indices.view(-1, 1) * self.stride + torch.arange(self.context + 1)].long()
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def _encode(codes: np.ndarray, alphabet: np.ndarray) -> np.ndarray:
    """Code points to tokens: 1 + the place in the alphabet, or UNKNOWN."""
    place = np.searchsorted(alphabet, codes).clip(max=len(alphabet) - 1)
    return np.where(alphabet[place] == codes, place + 1, UNKNOWN).astype(np.int32)


def _read(path: Path) -> np.ndarray:
    """Code points [n] of a UTF-8 file, plain or .gz."""
    if not path.is_file():
        raise missing(path, "a UTF-8 text file, plain or .gz")
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, EOFError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    if len(content) > MAX_BYTES:
        raise ValueError(f"{path}: more than {MAX_BYTES:,} bytes of text; give a smaller part of it")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: no UTF-8 text at byte {error.start:,}") from error
    return np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
