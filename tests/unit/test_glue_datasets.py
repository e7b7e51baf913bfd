"""GLUE as `datasets` keeps it gives what the official files give; what is hidden or strange is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from language import HUB, bert_folder, glue_dataset, glue_folder

from nmflow.train.config_sections import DataConfig
from nmflow.train.data import Data, load_data
from nmflow.train.data.sentences import SentenceSplit

datasets = pytest.importorskip("datasets", reason="an extra: pip install 'nmflow[datasets]'")
pytest.importorskip("transformers", reason="sentences are cut up by transformers, which is an extra")
datasets.disable_progress_bars()

SOURCE = Path(__file__).parents[2] / "src"


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bert_folder(tmp_path_factory.mktemp("models") / "bert", weights=False)


def load(path: Path | str, tokenizer: Path) -> Data:
    return load_data(DataConfig(name="glue", path=str(path)), str(tokenizer))


def splits_of(data: Data) -> dict[str, SentenceSplit]:
    found = {"train": data.train, "val": data.val, "test": data.test, **data.further}
    return {name: split for name, split in found.items() if isinstance(split, SentenceSplit)}


def assert_alike(one: Data, other: Data) -> None:
    """The same tokens and the same labels, split by split."""
    a, b = splits_of(one), splits_of(other)
    assert a.keys() == b.keys()
    for name, split in a.items():
        assert torch.equal(split.starts, b[name].starts), name
        assert torch.equal(split.targets, b[name].targets), name
        assert split.targets.dtype is b[name].targets.dtype
        for column, tokens in split.columns.items():
            assert torch.equal(tokens, b[name].columns[column]), (name, column)


@pytest.mark.parametrize("task", HUB)
def test_both_readers_give_the_same(tmp_path: Path, bert: Path, task: str) -> None:
    """And the three items of the hidden test split are nowhere."""
    folder = glue_folder(tmp_path, task)
    saved = tmp_path / "saved" / f"glue-{task.lower()}"
    glue_dataset(folder, task).save_to_disk(saved)
    data = load(saved, bert)
    assert_alike(load(folder, bert), data)
    assert len(data.test) == 21
    assert list(data.further) == (["mismatched"] if task == "MNLI" else [])


@pytest.mark.parametrize("task", ["MRPC", "STS-B"])
def test_both_readers_give_the_same_of_the_real_files(tmp_path: Path, shared_data: Path, bert: Path, task: str) -> None:
    folder = shared_data / "glue" / task
    if not folder.is_dir():
        pytest.skip(f"no {task} at {folder.parent}")
    glue_dataset(folder, task).save_to_disk(tmp_path / task)
    assert_alike(load(folder, bert), load(tmp_path / task, bert))


def test_without_the_mismatched_split(tmp_path: Path, bert: Path) -> None:
    whole = glue_dataset(glue_folder(tmp_path / "tsv", "MNLI"), "MNLI")
    del whole["validation_mismatched"]
    whole.save_to_disk(tmp_path / "MNLI")
    data = load(tmp_path / "MNLI", bert)
    assert data.further == {"mismatched": None}
    assert "test is validation_matched; mismatched is missing" in data.describe()


def test_what_is_strange_is_refused(tmp_path: Path, bert: Path) -> None:
    whole = glue_dataset(glue_folder(tmp_path / "tsv", "MRPC"), "MRPC")
    swapped = datasets.ClassLabel(names=["equivalent", "not_equivalent"])
    for name, changed, message in (
        ("a", {"validation": whole["test"]}, r"a.MRPC, validation, row 0: label -1 .*from 0 to 1 \(-1 stands for"),
        ("b", {"train": whole["train"].cast_column("label", swapped)}, "classes are equivalent, not_equivalent, not n"),
        ("c", {"train": whole["train"].remove_columns("sentence2")}, "train: no column sentence2; its columns are"),
        ("d", {"train": whole["train"].select(range(9))}, "MRPC, train: 9 items are too few"),
        ("e", {"train": with_value(whole["train"], "sentence1", None)}, "row 4: label"),
    ):
        datasets.DatasetDict({**whole, **changed}).save_to_disk(tmp_path / name / "MRPC")
        with pytest.raises(ValueError, match=message):
            load(tmp_path / name / "MRPC", bert)
    scores = glue_dataset(glue_folder(tmp_path / "tsv", "STS-B"), "STS-B")
    for name, score in (("f", -1.0), ("g", float("nan")), ("h", None)):
        datasets.DatasetDict({**scores, "train": with_value(scores["train"], "label", score)}).save_to_disk(
            tmp_path / name / "STS-B"
        )
        with pytest.raises(ValueError, match=rf"row 4: label {score} .*from 0 to 5"):
            load(tmp_path / name / "STS-B", bert)
    del whole["validation"]
    whole.save_to_disk(tmp_path / "i" / "MRPC")
    with pytest.raises(FileNotFoundError, match=r"dev\.tsv: not found; expected .* or there a DatasetDict of"):
        load(tmp_path / "i" / "MRPC", bert)
    (tmp_path / "a" / "MRPC" / "train" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be read"):
        load(tmp_path / "a" / "MRPC", bert)


def with_value(dataset: Any, column: str, value: object) -> Any:
    """The same with another value in row 4."""
    rows = dataset.to_dict()
    rows[column][4] = value
    return datasets.Dataset.from_dict(rows, features=dataset.features)


def test_a_name_of_the_hub_is_found_in_the_cache(tmp_path: Path, bert: Path) -> None:
    """The cache is written by the builder that load_dataset uses for the parquet files of the hub."""
    from datasets.packaged_modules.parquet.parquet import Parquet

    folder = glue_folder(tmp_path, "MRPC")
    whole, cache = glue_dataset(folder, "MRPC"), tmp_path / "cache"
    files = {}
    for name, split in whole.items():
        files[name] = str(tmp_path / f"{name}.parquet")
        split.to_parquet(files[name])
    place = cache / "nyu-mll___glue" / "mrpc" / "0.0.0" / ("0" * 40)
    builder = Parquet(cache_dir=str(cache), dataset_name="glue", config_name="mrpc", data_files=files)
    builder.download_and_prepare(output_dir=str(place))
    code = (
        "from nmflow.train.config_sections import DataConfig; from nmflow.train.data import load_data; import sys\n"
        "for path in sys.argv[2:]:\n"
        "    try:\n"
        "        data = load_data(DataConfig(name='glue', path=path), sys.argv[1])\n"
        "        print(len(data.train), data.test.columns['input_ids'].tolist(), data.train.targets.tolist())\n"
        "    except FileNotFoundError as error:\n"
        "        print(error)\n"
    )
    arguments = [str(bert), "nyu-mll/glue/mrpc", "nyu-mll/glue/rte"]
    surroundings = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(cache), "PYTHONPATH": str(SOURCE)}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env={**os.environ, **surroundings}, cwd=tmp_path,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found, absent = done.stdout.splitlines()
    plain = load(folder, bert)
    splits = splits_of(plain)
    assert found == f"54 {splits['test'].columns['input_ids'].tolist()} {splits['train'].targets.tolist()}"
    assert absent.startswith("nyu-mll/glue/rte: there is no such folder, and no data set nyu-mll/glue with rte was")
    fetch = "import datasets; datasets.load_dataset('nyu-mll/glue', 'rte').save_to_disk('glue_data/rte')"
    assert absent.endswith(f'fetch it: python -c "{fetch}"')


def test_without_the_package(tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    glue_dataset(glue_folder(tmp_path / "tsv", "RTE"), "RTE").save_to_disk(tmp_path / "RTE")
    monkeypatch.setitem(sys.modules, "datasets", None)
    for path in (tmp_path / "RTE", "nyu-mll/glue/rte"):
        with pytest.raises(ValueError, match=r"needs datasets: pip install 'nmflow\[datasets\]'"):
            load(path, bert)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"tsv.RTF.RTE.train\.tsv"):
        load("tsv/RTF/RTE", bert)  # a folder that is mistyped is no name of the hub
