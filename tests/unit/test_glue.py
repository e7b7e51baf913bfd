"""GLUE's files: all nine layouts, what a network gets of them, and what is refused."""

from __future__ import annotations

import csv
import gzip
import io
import tracemalloc
from pathlib import Path

import pytest
import torch
from language import HEADS, WORDS, bert_folder, glue_folder

from nmflow.train.config_sections import DataConfig
from nmflow.train.data import Data, load_data
from nmflow.train.data.glue_tasks import TASKS
from nmflow.train.data.glue_tsv import read_tsv
from nmflow.train.data.lines import lines_of

pytest.importorskip("transformers", reason="sentences are cut up by transformers, which is an extra")

COUNTS = {  # the real files that may lie beside the repository: train, dev
    "SST-2": (67_349, 872), "MRPC": (3_668, 408), "STS-B": (5_749, 1_500), "WNLI": (635, 71), "QNLI": (11_803, 5_463),
    "MNLI": (19_625, 6_238), "QQP": (20_000, 5_000),
}  # fmt: skip
MEASURES = {
    "CoLA": ("matthews", "accuracy"), "STS-B": ("score", "pearson", "spearman"),
    "MRPC": ("score", "accuracy", "f1"), "QQP": ("score", "accuracy", "f1"),
}  # fmt: skip


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bert_folder(tmp_path_factory.mktemp("models") / "bert", weights=False)


def load(folder: Path, tokenizer: Path | None, **settings: object) -> Data:
    return load_data(DataConfig(name="glue", path=str(folder), **settings), str(tokenizer) if tokenizer else None)


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("task", HEADS)
def test_every_task_in_its_official_layout(tmp_path: Path, bert: Path, task: str, packed: bool) -> None:
    data = load(glue_folder(tmp_path, task, packed=packed), bert)
    assert (len(data.train), len(data.val), len(data.test)) == (54, 6, 21)
    assert data.objective.measures == MEASURES.get(task, ("accuracy",))
    assert data.num_classes == {"STS-B": 1, "MNLI": 3}.get(task, 2)
    inputs, targets = data.train.batch(torch.arange(54))
    assert targets.dtype is (torch.float32 if task == "STS-B" else torch.int64)
    assert set(targets.tolist()) == ({0.0, 5.0} if task == "STS-B" else set(range(data.num_classes)))
    is_pair = task not in ("CoLA", "SST-2")
    assert bool(inputs["token_type_ids"].any()) == is_pair
    assert not (inputs["input_ids"] == 1).any()  # [UNK]: the words are known
    assert (inputs["input_ids"] == 3).sum(dim=1).unique().tolist() == [2 if is_pair else 1]  # [SEP]


def test_a_batch_is_what_the_tokenizer_gives_its_items(tmp_path: Path, bert: Path) -> None:
    """Against the csv module and one call of the tokenizer an item."""
    from transformers import AutoTokenizer

    folder = glue_folder(tmp_path, "MRPC")
    data, tokenizer = load(folder, bert, context=16), AutoTokenizer.from_pretrained(bert)
    text = io.StringIO((folder / "train.tsv").read_text())
    rows = list(csv.DictReader(text, delimiter="\t", quoting=csv.QUOTE_NONE))
    kept = [row for place, row in enumerate(rows) if place % 10 != 9]
    indices = torch.tensor([7, 0, 53])
    inputs, targets = data.train.batch(indices)
    single = [
        tokenizer(kept[i]["#1 String"], kept[i]["#2 String"], truncation=True, max_length=16) for i in indices.tolist()
    ]
    longest = max(len(item["input_ids"]) for item in single)
    assert targets.tolist() == [int(kept[i]["Quality"]) for i in indices.tolist()]
    for name in ("input_ids", "token_type_ids", "attention_mask"):
        padded = [item[name] + [0] * (longest - len(item[name])) for item in single]
        assert inputs[name].tolist() == padded, name
    assert 0 in inputs["attention_mask"]


def test_mnli_has_two_test_sets(tmp_path: Path, bert: Path) -> None:
    """The mismatched one may be missing; that is said."""
    data = load(glue_folder(tmp_path, "MNLI"), bert)
    assert list(data.further) == ["mismatched"]
    assert data.further["mismatched"] is not None
    assert (len(data.test), len(data.further["mismatched"])) == (21, 22)
    assert "21 test, 22 mismatched; " in data.describe()
    (tmp_path / "MNLI" / "dev_mismatched.tsv").unlink()
    without = load(tmp_path / "MNLI", bert)
    assert without.further == {"mismatched": None}
    assert "21 test; " in without.describe()
    assert without.describe().endswith("; mismatched is missing")
    assert load(glue_folder(tmp_path, "RTE"), bert).further == {}


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("task", HEADS)
def test_files_as_they_come(tmp_path: Path, task: str, packed: bool) -> None:
    """A byte order mark, lines that end in CR LF, a CR alone, quotes that never close, ends that only Unicode knows."""
    folder = glue_folder(tmp_path, task)
    path = folder / ("dev_matched.tsv" if task == "MNLI" else "dev.tsv")
    odd = path.read_text().replace("good", '"good').replace(" is ", " 'is\u2028 ").replace("dog", "d\x85g\x0c")
    content = b"\xef\xbb\xbf" + odd.replace("sad", "s\rad").replace("\n", "\r\n").encode()
    path.unlink()
    packed_path = path.with_name(f"{path.name}.gz")
    packed_path.write_bytes(gzip.compress(content)) if packed else path.write_bytes(content)
    table = read_tsv(folder, path.stem, TASKS[task])
    assert table is not None
    names = HEADS[task].split("\t") if HEADS[task] else ["source", "label", "star", "sentence"]
    lines = odd.split("\n")[bool(HEADS[task]) : -1]
    expected = [dict(zip(names, row, strict=True)) for row in csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)]
    assert [row[0] for row in table.rows] == [
        tuple(row[name].replace("sad", "s\rad") for name in TASKS[task].sentences) for row in expected
    ]
    assert len(table.rows) == 21
    assert any('"' in text for row in table.rows for text in row[0])


def test_what_is_not_there_or_broken_is_refused(tmp_path: Path, bert: Path) -> None:
    folder = glue_folder(tmp_path, "RTE")
    with pytest.raises(FileNotFoundError, match=r"SST-2.train\.tsv.*expected train\.tsv and dev\.tsv"):
        load(tmp_path / "SST-2", bert)
    with pytest.raises(ValueError, match=r'"elsewhere", names no task of GLUE \(CoLA, SST-2'):
        load(tmp_path / "elsewhere", bert)
    with pytest.raises(ValueError, match="needs a tokenizer: model=transformers:NAME"):
        load(folder, None)
    with pytest.raises(ValueError, match=r"no tokenizer found for .*nowhere.*hf download nowhere --local-dir /"):
        load(folder, tmp_path / "nowhere")
    whole = (folder / "train.tsv").read_text()
    lines = whole.splitlines()
    for broken, message in (
        ([*lines[:5], "only\tthree\tcolumns", *lines[6:]], r"train\.tsv: line 6 cannot.* has 4 columns"),
        ([lines[0].replace("sentence2", "other"), *lines[1:]], r"no column sentence2; its columns are index"),
        ([*lines[:8], lines[8].rpartition("\t")[0] + "\tperhaps", *lines[9:]], "line 9 cannot.* one of entailment"),
        (lines[:1], "no lines below the names of the columns; a line has 4 columns"),
        (lines[:6], "5 items are too few"),
    ):
        (folder / "train.tsv").write_text("\n".join(broken) + "\n")
        with pytest.raises(ValueError, match=message):
            load(folder, bert)
    (folder / "train.tsv").unlink()
    (folder / "train.tsv.gz").write_bytes(gzip.compress(whole.encode())[:-20])
    with pytest.raises(ValueError, match=r"train\.tsv\.gz: cannot be read"):
        load(folder, bert)


def test_a_score_that_is_no_number_is_refused(tmp_path: Path, bert: Path) -> None:
    folder = glue_folder(tmp_path, "STS-B")
    lines = (folder / "dev.tsv").read_text().splitlines()
    for score in ("high", "nan", "-1", "5.001"):
        lines[3] = lines[3].rpartition("\t")[0] + f"\t{score}"
        (folder / "dev.tsv").write_text("\n".join(lines) + "\n")
        with pytest.raises(ValueError, match=r"dev\.tsv: line 4 cannot be read; .*a score from 0 to 5"):
            load(folder, bert)


def test_few_broken_lines_are_left_out_and_said(tmp_path: Path, bert: Path) -> None:
    folder = glue_folder(tmp_path, "QQP", train=2_000)
    lines = (folder / "train.tsv").read_text().splitlines()
    lines[5] = "133\t5\t6\tis it"
    (folder / "train.tsv").write_text("\n".join(lines) + "\n")
    data = load(folder, bert)
    assert len(data.train) + len(data.val) == 1_999
    assert "train.tsv: 1 broken lines left out" in data.describe()


@pytest.mark.parametrize("task", COUNTS)
def test_the_real_files(shared_data: Path, bert: Path, task: str) -> None:
    if not (shared_data / "glue" / task).is_dir():
        pytest.skip(f"no {task} at {shared_data / 'glue'}")
    if task == "SST-2":
        pytest.skip("67,349 sentences take their time; the other tasks are read alike")
    data = load(shared_data / "glue" / task, bert, context=16)
    train, test = COUNTS[task]
    assert (len(data.train) + len(data.val), len(data.test)) == (train, test)
    assert data.train.batch(torch.tensor([0, 1]))[0]["input_ids"].max() < 5 + len(WORDS)


def test_a_line_that_unpacks_without_end_is_refused(tmp_path: Path) -> None:
    (path := tmp_path / "a.tsv.gz").write_bytes(gzip.compress(b"short\n" + b"x" * 64_000_000))
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"a\.tsv\.gz: line 2 has more than 1,048,576 characters"):
        list(lines_of(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16_000_000
