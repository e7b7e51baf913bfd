"""Small text data and small pretrained-looking networks for tests: a vocabulary, GLUE's nine layouts, tiny folders."""

from __future__ import annotations

import gzip
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nmflow.train.config import TrainConfig

WORDS = ("a", "bad", "big", "cat", "dog", "film", "fun", "good", "is", "it", "less", "more", "not", "old", "runs",
         "sad", "small", "the", "very", "was")  # fmt: skip


def sentence(rng: random.Random, length: int = 0) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(length or rng.randint(3, 9)))


def bert_folder(folder: Path, weights: bool = True, words: Sequence[str] = WORDS, spread: float = 0.2) -> Path:
    """A folder as `save_pretrained` leaves it: a BERT of two narrow layers and a WordPiece tokenizer.

    `spread`: standard deviation of its weights; with large ones it says something else of every sentence.
    """
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {word: place for place, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words))}
    BertTokenizerFast(vocab=vocabulary).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64, initializer_range=spread,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder) if weights else config.save_pretrained(folder)
    return folder


HEADS = {
    "CoLA": "",
    "SST-2": "sentence\tlabel",
    "MRPC": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
    "STS-B": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
    "QQP": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
    "MNLI": "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
    "sentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
    "QNLI": "index\tquestion\tsentence\tlabel",
    "RTE": "index\tsentence1\tsentence2\tlabel",
    "WNLI": "index\tsentence1\tsentence2\tlabel",
}
"""The heads of the official files; CoLA's have none."""


def _line(task: str, number: int, rng: random.Random) -> str:
    one, two, yes = sentence(rng), sentence(rng), rng.random() < 0.5
    two = one if yes and task not in ("CoLA", "SST-2") else two
    entails = ("entailment", "not_entailment")[not yes]
    good = f"{one} good fun" if yes else f"{one} bad sad"
    return "\t".join(
        {
            "CoLA": ["gj04", str(int(yes)), "" if yes else "*", good],
            "SST-2": [good, str(int(yes))],
            "MRPC": [str(int(yes)), "1", "2", one, two],
            "STS-B": [str(number), "g", "f", "2012", "0", "s", "t", one, two, f"{5.0 * yes:.3f}"],
            "QQP": [str(number), "3", "4", one, two, str(int(yes))],
            "MNLI": [str(number), "1", "2", "g", "(", ")", "(", ")", one, two, "x",
                     "entailment" if yes else rng.choice(("neutral", "contradiction"))],
            "QNLI": [str(number), one, two, entails],
            "RTE": [str(number), one, two, entails],
            "WNLI": [str(number), one, two, str(int(yes))],
        }[task]
    )  # fmt: skip


def glue_folder(root: Path, task: str, train: int = 60, test: int = 21, packed: bool = False) -> Path:
    """One task in the official layout, easy to learn: a word (or the equality of two sentences) gives it away."""
    folder = root / task
    folder.mkdir(parents=True)
    names = {"train": train, **({"dev_matched": test, "dev_mismatched": test + 1} if task == "MNLI" else {"dev": test})}
    for name, count in names.items():
        rng = random.Random(f"{task} {name}")
        lines = [HEADS[task]] if HEADS[task] else []
        text = "\n".join([*lines, *(_line(task, number, rng) for number in range(count))]) + "\n"
        if packed:
            (folder / f"{name}.tsv.gz").write_bytes(gzip.compress(text.encode()))
        else:
            (folder / f"{name}.tsv").write_text(text, encoding="utf-8")
    return folder


HUB = {
    "CoLA": (("sentence",), ("unacceptable", "acceptable")),
    "SST-2": (("sentence",), ("negative", "positive")),
    "MRPC": (("sentence1", "sentence2"), ("not_equivalent", "equivalent")),
    "STS-B": (("sentence1", "sentence2"), ()),
    "QQP": (("question1", "question2"), ("not_duplicate", "duplicate")),
    "MNLI": (("premise", "hypothesis"), ("entailment", "neutral", "contradiction")),
    "QNLI": (("question", "sentence"), ("entailment", "not_entailment")),
    "RTE": (("sentence1", "sentence2"), ("entailment", "not_entailment")),
    "WNLI": (("sentence1", "sentence2"), ("not_entailment", "entailment")),
}
"""Columns and classes of nyu-mll/glue on the hub, class 0 first; a score has none."""
_CELLS = {"CoLA": (3, 1), "MRPC": (3, 4, 0), "STS-B": (7, 8, 9), "QQP": (3, 4, 5), "MNLI": (8, 9, 11),
          "SST-2": (0, 1)}  # fmt: skip
"""Where sentences and label stand in a line of the official files; QNLI, RTE, WNLI: (1, 2, 3)."""


def glue_dataset(folder: Path, task: str) -> Any:
    """The DatasetDict that the hub has of the files in `folder`, with a test split whose labels are hidden."""
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    columns, classes = HUB[task]
    label = ClassLabel(names=list(classes)) if classes else Value("float32")
    features = Features({**{name: Value("string") for name in columns}, "label": label, "idx": Value("int32")})
    splits = {}
    for file in sorted(folder.glob("*.tsv*")):
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        cells = [line.split("\t") for line in content.decode().rstrip("\n").split("\n")][bool(HEADS[task]) :]
        *places, last = _CELLS.get(task, (1, 2, 3))
        rows = {name: [row[place] for row in cells] for name, place in zip(columns, places, strict=True)}
        rows["label"] = [_hub_label(row[last], classes) for row in cells]
        name = file.name.split(".")[0].replace("dev", "validation")
        splits[name] = Dataset.from_dict({**rows, "idx": list(range(len(cells)))}, features=features)
    hidden = {**{name: ["it is fun"] * 3 for name in columns}, "label": [-1] * 3, "idx": [0, 1, 2]}
    return DatasetDict({**splits, "test": Dataset.from_dict(hidden, features=features)})


def _hub_label(text: str, classes: tuple[str, ...]) -> float:
    if not classes:
        return float(text)
    return classes.index(text) if text in classes else int(text)


def parallel_folder(
    folder: Path, layout: str, packed: bool, names: Mapping[str, str] | None = None
) -> dict[str, list[tuple[str, str]]]:
    """Sentences and the same with every word backwards, en-xx, as pairs or as a file a side; what was written.

    `names` are those of the files where they are not train, valid and test.
    """
    folder.mkdir(parents=True, exist_ok=True)
    texts = {}
    for part, count in (("train", 80), ("valid", 12), ("test", 14)):
        rng = random.Random(part)
        lines = [sentence(rng) for _ in range(count)]
        pairs = [(line, " ".join(word[::-1] for word in line.split())) for line in lines]
        texts["val" if part == "valid" else part] = pairs
        name = (names or {}).get(part, part)
        files = {f"{name}.en-xx.tsv": ["\t".join(pair) for pair in pairs]}
        if layout == "sides":
            columns = zip(*pairs, strict=True)
            files = {f"{name}.{side}": list(column) for side, column in zip(("en", "xx"), columns, strict=True)}
        for name, rows in files.items():
            content = ("\n".join(rows) + "\n").encode()
            (folder / f"{name}{'.gz' if packed else ''}").write_bytes(gzip.compress(content) if packed else content)
    return texts


def pairs_config(folder: Path, **changes: Any) -> TrainConfig:
    """A small run on the pairs of `parallel_folder`."""
    model = {"name": "transformers:marian", "pretrained": False, "width": 32, "depth": 1, "heads": 2, "dropout": 0.0}
    return TrainConfig(
        **{
            "data": {"name": "translation", "path": str(folder), "vocabulary": 60, "context": 24}, "model": model,
            "pattern": "1:8", "steps": 30, "batch": 16, "eval_every": 15, "checkpoint_every": 12, "baseline": False,
            "optim": {"lr": 1e-2, "schedule": "inverse-sqrt", "label_smoothing": 0.1}, **changes,
        }
    )  # fmt: skip
