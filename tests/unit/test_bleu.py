"""BLEU of a test split: against figures that follow from its definition, and what is refused before training."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from language import parallel_folder
from torch import Tensor, nn

from nmflow.train.bleu import Translations, check_bleu, translate_test
from nmflow.train.config_sections import BleuConfig, DataConfig
from nmflow.train.data import Data, load_data
from nmflow.train.data.vocabulary import Vocabulary

pytest.importorskip("sentencepiece", reason="vocabularies are made by sentencepiece, which is an extra")
sacrebleu = pytest.importorskip("sacrebleu", reason="BLEU is sacrebleu's, which is an extra")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    parallel_folder(folder, "pairs", packed=False)
    return folder


@pytest.fixture(scope="module")
def data(folder: Path) -> Data:
    return load_data(DataConfig(name="translation", path=str(folder), vocabulary=60, context=60))


class Parrot(nn.Module):
    """Knows the answers by heart: says of every source tokens that it was taught."""

    def __init__(self, answers: dict[tuple[int, ...], list[int]]) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.zeros(1))
        self.answers = answers

    def generate(self, input_ids: Tensor, attention_mask: Tensor, **asked: object) -> Tensor:
        sources = [tuple(ids[mask.bool()].tolist()) for ids, mask in zip(input_ids, attention_mask, strict=True)]
        rows = [self.answers[source] for source in sources]
        longest = max(map(len, rows))
        return torch.tensor([[0, *row, 2, *[0] * (longest - len(row))] for row in rows])


def parrot(data: Data, answers: list[str]) -> Parrot:
    vocabulary = Vocabulary(data.files["vocabulary.model"])
    sources = data.test.sources(len(answers))
    encoded = vocabulary.encode(answers, 60)
    return Parrot({tuple(source): answer[:-1] for source, answer in zip(sources, encoded, strict=True)})


def test_right_translations_are_worth_100_and_short_ones_less(folder: Path, data: Data) -> None:
    """Of a hypothesis that begins as its reference every n-gram is right: BLEU = 100·exp(1 - r / h), r and h words."""
    references = [line.split("\t")[1] for line in (folder / "test.en-xx.tsv").read_text().splitlines()]
    said = translate_test(parrot(data, references), data, BleuConfig())
    assert said.lines == tuple(references)
    assert said.figures() == {"bleu": pytest.approx(100)}
    assert said.how == {"signature": said.how["signature"], "sentences": 14, "beam": 1, "length": 60}
    assert said.how["signature"].split("|")[:4] == ["nrefs:1", "case:mixed", "eff:no", "tok:13a"]
    shorter = [" ".join(line.split()[:-1]) for line in references]
    said = translate_test(parrot(data, shorter), data, BleuConfig(sentences=9, length=50, beam=3))
    words = [sum(len(line.split()) for line in lines[:9]) for lines in (references, shorter)]
    assert said.bleu == pytest.approx(100 * math.exp(1 - words[0] / words[1]))
    assert (said.how["sentences"], said.how["length"], said.how["beam"]) == (9, 50, 3)
    assert len(said.lines) == 9


def test_nothing_is_translated_where_nothing_is_asked_for(data: Data) -> None:
    for silent in (translate_test(nn.Linear(1, 1), data, BleuConfig(sentences=0)),
                   translate_test(nn.Linear(1, 1), load_data(DataConfig()), BleuConfig())):  # fmt: skip
        assert (silent.lines, silent.figures(), silent.described()) == ((), {}, {})
        assert silent.agreement(silent, Path("x")) == {}


def test_lines_that_cannot_be_measured_are_refused(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    check_bleu(BleuConfig(sentences=14, length=60), data)
    with pytest.raises(ValueError, match=r"bleu\.length: 61 is more than data\.context, 60"):
        check_bleu(BleuConfig(length=61), data)
    with pytest.raises(ValueError, match=r"bleu\.sentences: test has 14"):
        check_bleu(BleuConfig(sentences=15), data)
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(ValueError, match=r"BLEU needs sacrebleu: pip install 'nmflow\[translation\]'.*sentences=0"):
        check_bleu(BleuConfig(), data)
    check_bleu(BleuConfig(sentences=0), data)
    check_bleu(BleuConfig(), load_data(DataConfig()))


def test_a_language_is_cut_up_as_it_is_written(tmp_path: Path) -> None:
    """Without spaces a sentence is no single word: sacrebleu's tokenizer of Chinese."""
    for part in ("train", "valid", "test"):
        (tmp_path / f"{part}.en-zh.tsv").write_text("a cat runs\t一只猫在跑步呢\nthe dog is old\t那只狗已经老了\n" * 4)
    data = load_data(DataConfig(name="translation", path=str(tmp_path), vocabulary=31))
    answers = ["一只猫在跑步", "那只狗已经老"] * 4
    said = translate_test(parrot(data, answers), data, BleuConfig(sentences=8))
    assert said.bleu == pytest.approx(100 * math.exp(1 - 14 / 12))
    assert "|tok:zh|" in said.how["signature"]


def test_one_models_translations_agree() -> None:
    lines = tuple(map(str, range(1000)))
    one = Translations(lines, 20.0, {})
    near = Translations(("x", *lines[1:]), 20.4, {})
    assert one.agreement(near, Path("x")) == {"translations_alike": 999}
    with pytest.raises(RuntimeError, match=r"runs/x: BLEU 19\.40 on the test split, .* 20\.00; this is a defect"):
        one.agreement(Translations(lines, 19.4, {}), Path("runs/x"))
    few = Translations(lines[:10], 20.0, {})
    assert few.agreement(Translations(("x", *lines[1:10]), 12.0, {}), Path("x")) == {"translations_alike": 9}
    with pytest.raises(RuntimeError, match="defect"):
        few.agreement(Translations(lines[:10], 9.0, {}), Path("x"))
