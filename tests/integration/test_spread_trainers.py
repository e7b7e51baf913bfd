"""Hugging Face's trainers and Lightning give the weights of one process under DDP, and where FSDP2 spreads them."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
from processes import on

SCRIPT = Path(__file__).parent / "spread_trainers.py"
LIGHTNING = find_spec("lightning") is not None or find_spec("pytorch_lightning") is not None


def agree(folder: Path, *checks: str) -> None:
    status, out, err = on(2, SCRIPT, str(folder), *checks)
    assert status == 0, err
    assert [line for line in out.splitlines() if line.endswith(" agrees")] == [f"{check} agrees" for check in checks]


@pytest.mark.skipif(find_spec("transformers") is None, reason="needs the extra transformers")
def test_trainers_of_hugging_face(tmp_path: Path) -> None:
    if int(version("transformers").partition(".")[0]) < 5:
        pytest.skip("transformers 4 does not resume from checkpoints in parts to the same bits, dense or sparse")
    agree(tmp_path, "copies", "trainer", "language-model", "resumed-trainer", "parts")


@pytest.mark.skipif(not LIGHTNING, reason="Lightning is not installed: pip install 'nmflow[lightning]'")
def test_lightning(tmp_path: Path) -> None:
    agree(tmp_path, "lightning", "resumed-lightning")
