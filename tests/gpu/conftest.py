"""Triton's kernels run where there is a GPU, and elsewhere in Triton's interpreter, on small tensors."""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _triton() -> None:
    pytest.importorskip("triton", reason="Triton is not installed; torch for CUDA brings it")
    if not torch.cuda.is_available():
        assert os.environ["TRITON_INTERPRET"] == "1"
