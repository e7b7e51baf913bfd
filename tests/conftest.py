"""What all tests share: where real data may lie, and a folder of parallel text."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: the suite has a process a core already

from pathlib import Path

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton: without a GPU its kernels are interpreted

settings.register_profile("no timing", deadline=None)  # how long an example takes is no property of the code
settings.load_profile("no timing")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets: NMFLOW_DATA, or shared/data beside the repository."""
    folder = Path(os.environ.get("NMFLOW_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set NMFLOW_DATA to a folder that holds cifar10/ and lm_text/")
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of parallel text."""
    from language import parallel_folder  # beside this file, and it imports nmflow

    for extra in ("sentencepiece", "sacrebleu"):
        pytest.importorskip(extra, reason="vocabularies and BLEU come from packages that are an extra")
    folder = tmp_path_factory.mktemp("pairs")
    parallel_folder(folder, "pairs", packed=False)
    return folder
