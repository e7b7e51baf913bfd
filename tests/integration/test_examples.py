"""What the README and the examples show runs as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import nmflow
from nmflow.ops import native

ROOT = Path(__file__).parents[2]


def test_own_loop() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "own_loop.py", "60"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "verified: 2 of 2 layers are N:M" in done.stdout


def test_readme_snippet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python of the README, word for word but for the number of steps, on a small transformer."""
    code, fast = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert "total_steps=10_000" in code
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    names = {
        "model": model,
        "loader": [torch.randn(2, 3, 32) for _ in range(20)],
        "optimizer": torch.optim.AdamW(model.parameters()),
        "loss": lambda model, batch: model(batch).square().mean(),
    }
    exec(code.replace("10_000", "20"), names)
    loaded = nmflow.load_compressed(tmp_path / "model.nm.safetensors", into=nn.TransformerEncoderLayer(
        32, 4, 64, dropout=0.0, batch_first=True
    ))
    batch = torch.randn(2, 3, 32)
    torch.testing.assert_close(loaded.eval()(batch), model.eval()(batch))
    assert type(model.linear1) is nn.Linear
    names["example"] = batch
    if native.why_not() is None:
        exec(fast, names)
        assert (tmp_path / "plan.json").exists()
    else:
        with pytest.raises(RuntimeError, match="nothing to tune"):
            exec(fast, names)
    torch.testing.assert_close(names["fast"].eval()(batch), model(batch))
