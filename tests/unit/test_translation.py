"""Parallel text: two layouts, what a network gets of a pair, a vocabulary that follows from the text, and refusals."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import pytest
import torch
from language import parallel_folder

from nmflow.train.config_sections import DataConfig
from nmflow.train.data import Data, batch_indices, load_data
from nmflow.train.data.translation import PairSplit, References
from nmflow.train.objectives import NOT_COUNTED

sentencepiece = pytest.importorskip("sentencepiece", reason="vocabularies are made by sentencepiece, which is an extra")


def load(folder: Path, **settings: object) -> Data:
    return load_data(DataConfig(name="translation", path=str(folder), **{"vocabulary": 60, **settings}))


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("layout", ["pairs", "sides"])
def test_a_batch_holds_the_pairs(tmp_path: Path, layout: str, packed: bool) -> None:
    """Against the vocabulary's own decoder."""
    texts = parallel_folder(tmp_path, layout, packed)
    data = load(tmp_path, languages=None if layout == "pairs" else "en-xx")
    assert {part: len(getattr(data, part)) for part in texts} == {part: len(text) for part, text in texts.items()}
    processor = sentencepiece.SentencePieceProcessor(model_proto=data.files["vocabulary.model"])
    assert processor.get_piece_size() == data.num_classes == 60
    for part, text in texts.items():
        inputs, targets = getattr(data, part).batch(torch.tensor([3, 0, 5]))
        for row, item in enumerate((3, 0, 5)):
            source = inputs["input_ids"][row][inputs["attention_mask"][row].bool()].tolist()
            target = [token for token in targets[row].tolist() if token != NOT_COUNTED]
            assert (source[-1], target[-1]) == (2, 2)
            assert (processor.decode(source[:-1]), processor.decode(target[:-1])) == text[item]
            assert inputs["decoder_input_ids"][row].tolist()[: len(target)] == [0, *target[:-1]]
        assert not inputs["input_ids"][~inputs["attention_mask"].bool()].any()
        assert (targets == NOT_COUNTED).any()


def test_many_sentences_are_cut_up_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parallel_folder(tmp_path, "pairs", packed=False)
    whole = load(tmp_path).train.batch(torch.arange(80))
    monkeypatch.setattr("nmflow.train.data.translation.AT_A_TIME", 7)
    pieces = load(tmp_path).train.batch(torch.arange(80))
    assert torch.equal(whole[1], pieces[1])
    assert torch.equal(whole[0]["input_ids"], pieces[0]["input_ids"])


def test_without_sentencepiece_the_way_to_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parallel_folder(tmp_path, "pairs", packed=False)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ValueError, match=r"needs sentencepiece: pip install 'nmflow\[translation\]'"):
        load(tmp_path)


def test_references_are_the_lines_of_the_file(tmp_path: Path) -> None:
    """As they stand there: what the vocabulary or the context would change is kept."""
    texts = parallel_folder(tmp_path, "sides", packed=False)
    strange = "  two  spaces, ﬁ and Ünknown  "
    (tmp_path / "test.xx").write_text("\n".join([strange, *(target for _, target in texts["test"][1:])]) + "\n")
    data = load(tmp_path, languages="en-xx", context=4)
    assert isinstance(data.test, PairSplit)
    assert data.test.references == References((strange, *(target for _, target in texts["test"][1:])), "xx")
    assert data.test.sources(3) == [ids[ids > 0].tolist() for ids in data.test.batch(torch.arange(3))[0]["input_ids"]]
    for part in (data.train, data.val):
        assert isinstance(part, PairSplit)
        assert part.references is None


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize(
    "names",
    [
        {"test": "newstest2014"},
        {"valid": "newstest2013", "test": "newstest2014"},
        {"train": "train.clean", "valid": "dev", "test": "newstest2016"},
    ],
)
def test_the_layout_of_wmt(tmp_path: Path, names: dict[str, str], packed: bool) -> None:
    """A file a side; of two newstests the later one is test and the other valid."""
    texts = parallel_folder(tmp_path, "sides", packed, names)
    data = load(tmp_path, languages="en-xx")
    assert {part: len(getattr(data, part)) for part in texts} == {part: len(text) for part, text in texts.items()}
    assert isinstance(data.test, PairSplit)
    assert data.test.references == References(tuple(target for _, target in texts["test"]), "xx")
    if "train" in names:
        parallel_folder(tmp_path, "sides", packed, {"test": "newstest2013"})
        with pytest.raises(FileNotFoundError, match=r"of train in en-xx it holds train\.clean\.en"):
            load(tmp_path, languages="en-xx")


def test_the_other_way_round(tmp_path: Path) -> None:
    parallel_folder(tmp_path, "pairs", packed=False)
    there, back = load(tmp_path), load(tmp_path, languages="xx-en")
    one, other = there.train.batch(torch.arange(4))[0], back.train.batch(torch.arange(4))[1]
    ends = [row[row != NOT_COUNTED].tolist() for row in other]
    sides = zip(one["input_ids"], one["attention_mask"], strict=True)
    assert [ids[mask.bool()].tolist() for ids, mask in sides] == ends


def test_the_vocabulary_follows_from_the_train_part_alone(tmp_path: Path) -> None:
    for name in ("a", "b"):
        parallel_folder(tmp_path / name, "pairs", packed=False)
    (tmp_path / "b" / "test.en-xx.tsv").write_text("zebra\tarbez\n")
    one, other = (load(tmp_path / name) for name in ("a", "b"))
    assert one.files == other.files
    assert load(tmp_path / "a", vocabulary=50).files != one.files


def test_long_sentences_are_cut(tmp_path: Path) -> None:
    parallel_folder(tmp_path, "pairs", packed=False)
    inputs, targets = load(tmp_path, context=5).train.batch(torch.arange(20))
    assert inputs["input_ids"].shape[1] == targets.shape[1] == 5
    assert (inputs["input_ids"].sort(dim=1).values[:, 0] >= 0).all()
    assert all(2 in row for row in targets.tolist())


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    parallel_folder(tmp_path, "sides", packed=False)
    with pytest.raises(ValueError, match=r"from which language to which; give data\.languages=en-de"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"of train in en-de it holds train\.en, train\.xx"):
        load(tmp_path, languages="en-de")
    with pytest.raises(ValueError, match=r"data\.vocabulary: no vocabulary of 5000 tokens"):
        load(tmp_path, languages="en-xx", vocabulary=5000)
    (tmp_path / "train.xx").write_text("ba\n")
    with pytest.raises(ValueError, match=r"train\.en: 80 lines, train\.xx has 1"):
        load(tmp_path, languages="en-xx")
    nowhere = tmp_path / "nowhere"
    with pytest.raises(FileNotFoundError, match=rf"one file of tab-separated pairs.*: curl .*--output-dir {nowhere} "):
        load(nowhere)
    other = tmp_path / "other"
    parallel_folder(other, "pairs", packed=True)
    (other / "valid.en-xx.tsv.gz").write_bytes(gzip.compress(b"a cat\ttac a\nno tab\n"))
    with pytest.raises(ValueError, match=r"valid\.en-xx\.tsv\.gz, line 2: one tab-separated pair"):
        load(other)


REAL = [  # train, valid, test; how the first sentence of test begins
    ("multi30k", "en-de", (29_000, 1_014, 1_000), "A man in an orange hat starring at something."),
    ("multi30k", "de-en", (29_000, 1_014, 1_000), "Ein Mann mit einem"),
    pytest.param("tatoeba_en_de", None, (160_159, 3_000, 3_000), "Please let me know", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "languages", "counts", "first"), REAL)
def test_the_real_pairs(
    shared_data: Path, name: str, languages: str | None, counts: tuple[int, ...], first: str
) -> None:
    if not (shared_data / name).is_dir():
        pytest.skip(f"no {name} at {shared_data}")
    data = load(shared_data / name, languages=languages, vocabulary=8_000)
    assert (len(data.train), len(data.val), len(data.test)) == counts
    processor = sentencepiece.SentencePieceProcessor(model_proto=data.files["vocabulary.model"])
    ids = data.test.batch(torch.tensor([0]))[0]["input_ids"][0].tolist()
    assert processor.decode(ids[:-1]).startswith(first)
    padded = []  # tokens of both sides in batches of 64, as they come and of like lengths
    for lengths in (None, data.train.lengths):
        batches = [data.train.batch(batch_indices(counts[0], 64, 0, step, lengths)) for step in range(100)]
        padded.append(sum(inputs["input_ids"].numel() + targets.numel() for inputs, targets in batches))
    assert padded[1] < 0.65 * padded[0]
