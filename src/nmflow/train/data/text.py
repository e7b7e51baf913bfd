"""text: any text, read as characters or as the tokens of a tokenizer, for causal language models."""

from __future__ import annotations

import gzip
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nmflow.train.config_sections import DataConfig
from nmflow.train.data.alphabet import ALPHABET_FILE, Alphabet
from nmflow.train.data.lines import PARTS
from nmflow.train.data.sentences import load_tokenizer
from nmflow.train.data.splits import Data, missing
from nmflow.train.objectives import PredictTokens

DEFAULT_CONTEXT = 128
MAX_BYTES = 1 << 29
"""The largest text that is read, unpacked."""
SHAKESPEARE = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/"
    "tinyshakespeare/input.txt"
)
"""A million characters to begin with."""


def load_text(config: DataConfig, tokenizer: str | None = None) -> Data:
    """Windows of T = `context` tokens; the target of a token is the next one.

    Of one file the first 80 % are train, the next 10 % val, the last 10 % test; a folder has a file for each, told by
    its name. Without a tokenizer the tokens are the characters of train, and one for all others; a run keeps them in
    its folder. A training window may begin anywhere; those of val and test lie end to end.
    Raises `FileNotFoundError`, and `ValueError` where a file is no UTF-8 text or too short.
    """
    path, context = Path(config.path or ""), config.context or DEFAULT_CONTEXT
    texts, source = _texts(path, whole_words=tokenizer is not None)
    files: dict[str, bytes] = {}
    if tokenizer is None:
        alphabet = Alphabet(texts["train"])
        tokens = {name: torch.from_numpy(alphabet.encode(text)) for name, text in texts.items()}
        vocabulary, unit = len(alphabet), "characters"
        files[ALPHABET_FILE] = alphabet.characters.encode()
    else:
        cutter = load_tokenizer(tokenizer, "data=text")
        tokens = {name: torch.tensor(_cut(cutter, text), dtype=torch.int32) for name, text in texts.items()}
        vocabulary, unit = len(cutter), "tokens"
    for name, each in tokens.items():
        if len(each) <= context:
            raise ValueError(
                f"{path}: {len(each):,} {unit} of {name}; each part must be longer than the context of {context} "
                "(data.context=... makes it shorter)"
            )
    return Data(
        name="text",
        kind="text",
        objective=PredictTokens(),
        train=TextSplit(tokens["train"], context, stride=1),
        val=TextSplit(tokens["val"], context, stride=context),
        test=TextSplit(tokens["test"], context, stride=context),
        num_classes=vocabulary,
        sample_shape=(context,),
        unit=unit,
        notes=(source,),
        files=files,
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
        """Inputs [B, T] and targets [B, T], the same window one token on. Nothing is augmented."""
        windows = self.tokens[indices.view(-1, 1) * self.stride + torch.arange(self.context + 1)].long()
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def _cut(tokenizer: Any, text: str) -> list[int]:
    """Token numbers of a whole text, nothing added. Line by line: a tokenizer takes long over one of many megabytes."""
    lines = text.splitlines(keepends=True)
    pieces = tokenizer(lines, add_special_tokens=False, return_attention_mask=False)["input_ids"] if lines else []
    return [number for piece in pieces for number in piece]


def _texts(path: Path, whole_words: bool) -> tuple[dict[str, str], str]:
    """The text of every part, and a note on where it is from."""
    if path.is_dir():
        files = {}
        for name, word in PARTS.items():
            found = [file for file in sorted(path.iterdir()) if file.is_file() and re.search(word, file.name)]
            if len(found) != 1:
                held = "none" if not found else " and ".join(file.name for file in found)
                words = word.replace("|", ", ")
                raise missing(path, f"one file with {words} in its name, plain or .gz (it holds {held})")
            files[name] = found[0]
        return {name: _read(file) for name, file in files.items()}, ", ".join(file.name for file in files.values())
    whole = _read(path)
    cuts = [len(whole) * 8 // 10, len(whole) * 9 // 10]
    if whole_words:
        spaces = (re.compile(r"\s|$").search(whole, cut) for cut in cuts)
        cuts = [space.start() for space in spaces if space is not None]
    first, second = cuts
    parts = {"train": whole[:first], "val": whole[first:second], "test": whole[second:]}
    return parts, f"{path.name}, {len(whole):,} characters, 80/10/10 in order"


def _read(path: Path) -> str:
    """The text of a UTF-8 file, plain or .gz."""
    if not path.is_file():
        fetch = f"curl -L --create-dirs -o {shlex.quote(str(path).removesuffix('.gz'))} {SHAKESPEARE}"
        raise missing(
            path,
            "a UTF-8 text file, plain or .gz, or a folder of a train, a valid and a test file; to begin with "
            f"Shakespeare's plays: {fetch}",
        )
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, EOFError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    if len(content) > MAX_BYTES:
        raise ValueError(f"{path}: more than {MAX_BYTES:,} bytes of text; give a smaller part of it")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: no UTF-8 text at byte {error.start:,}") from error
