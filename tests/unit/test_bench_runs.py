"""Benchmarks of tiny sizes, one round each: contenders agree, answers are whole, wrong usage is told.

How fast anything is, is not asked here.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner, Result
from torch import Tensor, nn

from nmflow.bench import contenders, kernels
from nmflow.bench.cells import CONV, CONV_LAST, CSR, DENSE, OURS, PACKED
from nmflow.bench.masks import argsort_and_scatter
from nmflow.bench.networks import build, make_sparse
from nmflow.bench.results import KernelResult
from nmflow.cli import cli
from nmflow.ops import native, native_library, native_measure
from nmflow.pattern import Pattern

missing = native.why_not()
needs_native = pytest.mark.skipif(missing is not None, reason=f"native library: {missing}")

SOURCE = Path(__file__).parents[2] / "src"
HEAVY = ("torch", "numpy", "pydantic", "matplotlib", "rich")
SMALL = ("shapes=24x32", "rounds=1", "threads=1")


def call(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["bench", *arguments])


def answer(*arguments: str) -> dict[str, object]:
    done = call(*arguments, "--json")
    assert done.exit_code == 0, done.output
    found: dict[str, object] = json.loads(done.stdout)
    return found


# --------------------------------------------------------------------------------------------- wrong usage
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("kernels", "patern=1:8"), 'did you mean "patterns"'),
        (("kernels", "threads=none"), "no whole number above 0"),
        (("layer",), "Missing argument"),
        (("layer", "3072", "1:8"), "no ROWSxCOLS"),
        (("layer", "8x8", "8:1"), 'did you mean "1:8"'),
        (("model", "timm:x", "pattern=8"), '"pattern=8"'),
        (("train",), "Missing argument"),
        (("modle",), 'did you mean "model"'),
    ],
)
def test_wrong_usage_is_told_before_anything_heavy_is_imported(arguments: tuple[str, ...], expected: str) -> None:
    code = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {HEAVY!r}: raise SystemExit(f'{{name}} was imported')\n"
        f"sys.meta_path.insert(0, Refuse()); sys.argv = ['nmflow', 'bench', *{arguments!r}]\n"
        "from nmflow.cli import main; main()"
    )
    done = shell([sys.executable, "-c", code])
    assert done.returncode == 2, done.stderr
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout


@pytest.mark.parametrize(
    "arguments", [("kernels",), ("layer", "8x8", "1:4"), ("model", "vit-tiny"), ("train", "vit-tiny")]
)
def test_without_the_library_it_says_how_to_get_it(arguments: tuple[str, ...]) -> None:
    done = shell([sys.executable, "-m", "nmflow", "bench", *arguments], NMFLOW_NATIVE="no-such-file.so")
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: nothing to measure: NMFLOW_NATIVE names no-such-file.so")
    assert "cmake --build build" in done.stderr
    assert "Traceback" not in done.stderr


def shell(command: list[str], **more: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), **more}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


@needs_native
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("model", "resnet"), 'no network "resnet"'),
        (("train", "vit-tiny", "pattern=1:7"), "error: "),
        (("model", "vit-tiny", "targets.nothing=1:8"), "nothing"),
    ],
)
def test_networks_that_do_not_fit_are_refused(arguments: tuple[str, ...], expected: str) -> None:
    done = call(*arguments)
    assert done.exit_code == 2, done.output
    assert expected in done.output
    assert "Traceback" not in done.output


# ---------------------------------------------------------------------------------------------- contenders
@needs_native
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("pattern", ["2:4", "1:16", "3:5"])
def test_all_contenders_are_the_same_layer(pattern: str, tokens: int) -> None:
    torch.manual_seed(0)
    layer = contenders.sparse_linear((24, 32), Pattern.parse(pattern), torch.float32)
    for row in layer.weight.tolist():
        n, m = map(int, pattern.split(":"))
        blocks = [row[start : start + m] for start in range(0, 32, m)]
        assert [sum(value != 0 for value in block) for block in blocks] == [min(n, len(block)) for block in blocks]
    x = torch.randn(tokens, 32)
    wanted = x.double() @ layer.weight.double().T + layer.bias.double()
    others = [contenders.packed_dense(layer, tokens), contenders.csr_linear(layer)]
    others.append(contenders.ours(layer, Pattern.parse(pattern)))
    with torch.inference_mode():
        contenders.tune(others[-1], tokens, seconds=0.0)  # type: ignore[arg-type]  # compressed above
        for other in others:
            if other is not None:
                torch.testing.assert_close(other(x).double(), wanted, rtol=1e-4, atol=1e-4)


@needs_native
def test_a_layer_that_computes_something_else_is_not_timed() -> None:
    layer = contenders.sparse_linear((24, 32), Pattern.parse("1:4"), torch.float32)
    other = contenders.sparse_linear((24, 32), Pattern.parse("1:4"), torch.float32)
    x = torch.randn(3, 32)
    contenders.check(layer, contenders.ours(layer, Pattern.parse("1:4")), x)
    with pytest.raises(ArithmeticError, match="differs from the dense layer"):
        contenders.check(layer, contenders.ours(other, Pattern.parse("1:4")), x)

    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, layer.weight, layer.bias) * torch.nan

    with pytest.raises(ArithmeticError, match="nan"):
        contenders.check(layer, Broken(), x)


def test_argsort_and_scatter_keeps_the_largest() -> None:
    w = torch.tensor([[3.0, -4.0, 1.0, 2.0, 0.5, -0.25, 8.0, 1.0, 9.0]])
    found = argsort_and_scatter(w, Pattern.parse("2:4"))
    assert found.tolist() == [[3.0, -4.0, 0.0, 0.0, 0.0, 0.0, 8.0, 1.0]]


# ------------------------------------------------------------------------------------------------ ceilings
@needs_native
def test_ceilings_count_what_they_do() -> None:
    handle, lanes = native_measure._library().handle, {"portable": 4, "avx2": 8, "avx512": 16}
    best = native_library.loaded().best_isa
    flops, sums = ctypes.c_double(), ctypes.c_double()
    for number, isa in enumerate(native_library.ISAS[: best + 1]):
        assert handle.nmflow_spin(number, 0, 7, 3, None, ctypes.byref(flops)) == 0
        assert flops.value == 2 * 10 * lanes[isa] * 7 * 3
        for count in (0, 1, 5, 127, 128, 4099):
            x = torch.arange(float(count))
            address = ctypes.cast(x.data_ptr(), ctypes.POINTER(ctypes.c_float))
            for parts, parallel in ((1, None), (3, None), (3, native_library.loaded().parallel_for)):
                assert handle.nmflow_read(number, address, count, parts, parallel, ctypes.byref(sums)) == 0
                assert sums.value == count * (count - 1) // 2
    assert handle.nmflow_spin(-1, 0, -1, 1, None, ctypes.byref(flops)) == 1
    assert handle.nmflow_spin(-1, 9, 1, 1, None, ctypes.byref(flops)) == 1
    assert handle.nmflow_spin(9, 0, 1, 1, None, ctypes.byref(flops)) == 2
    assert handle.nmflow_read(-1, None, 0, 0, None, ctypes.byref(sums)) == 1


@needs_native
def test_ceilings_are_speeds() -> None:
    peak = native_measure.fma_gflops(seconds=0.0)
    assert peak is not None
    speeds = [peak, native_measure.read_gbs(1, tries=1), native_measure.copy_gbs(1, tries=1)]
    speeds.append(native_measure.read_gbs(1, tries=1, alone=True))
    assert all(math.isfinite(speed) and speed > 0 for speed in speeds)
    has_bf16 = native_library.loaded().has_bf16
    assert (native_measure.fma_gflops(torch.bfloat16, seconds=0.0) is not None) == has_bf16
    with pytest.raises(ValueError, match=r"not torch\.float16"):
        native_measure.fma_gflops(torch.float16)
    with pytest.raises(ValueError, match='isa "sse"'):
        native_measure.read_gbs(1, isa="sse")


# -------------------------------------------------------------------------------------------- the commands
@needs_native
def test_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "CONV_LAYERS", ((16, 24, 3, 2, 8), (16, 64, 1, 1, 5)))
    found = answer("kernels", *SMALL, "patterns=1:4", "tokens=1,3", f"out={tmp_path}")
    result = KernelResult.from_dict(found)
    assert result == KernelResult.from_dict(json.loads((tmp_path / "results.json").read_text(encoding="utf-8")))
    assert [(cell.part, cell.tokens, cell.dtype, cell.layers) for cell in result.cells] == [
        ("linear", 1, "float32", 1),
        ("linear", 3, "float32", 1),
        ("cold", 1, "float32", 24),
        ("cold", 3, "float32", 24),
        ("bf16", 1, "bfloat16", 1),
        ("bf16", 3, "bfloat16", 1),
    ]
    for cell in result.cells:
        assert {DENSE, OURS} <= set(cell.us) <= {DENSE, OURS, PACKED, CSR}
        assert set(cell.over) == set(cell.us) - {OURS}
        assert (cell.of_bandwidth is None) == (cell.tokens != 1 and cell.part != "cold")
        assert (cell.read_gbs is None) == (cell.part != "cold")
        assert cell.read_gbs is None or 0.5 < cell.read_gbs < 5000, "10^9 bytes a second of any machine there is"
        assert cell.goal is None, "goals stand for two threads and other shapes"
        flops = 2 * cell.tokens * 24 * 8
        peak = result.setup.ceilings.gflops(getattr(torch, cell.dtype))
        assert cell.of_peak == pytest.approx(flops / (cell.us[OURS] * 1e-6) / (peak * 1e9))
    assert [(cell.layer, cell.pattern, cell.product) for cell in result.convolutions] == [
        ((16, 24, 3, 2, 8), "1:4", False),  # too few channels to pay for the windows
        ((16, 64, 1, 1, 5), "1:4", True),
    ]
    for convolution in result.convolutions:
        assert set(convolution.us) == {OURS, CONV, CONV_LAST}
        assert set(convolution.over) == {CONV, CONV_LAST}
    assert [(mask.shape, mask.pattern) for mask in result.masks] == [((24, 32), "1:4")]
    assert result.setup.machine.threads == 1
    text = call("kernels", *SMALL, "patterns=1:4", "tokens=3", "parts=linear").output
    assert "24x32" in text
    assert text.splitlines()[-1] == "no goals stand for these settings"


@needs_native
def test_layer() -> None:
    found = answer("layer", "24x32", "1:4", "tokens=1,16", "rounds=1", "threads=1")
    assert [cell["tokens"] for cell in found["cells"]] == [1, 16]  # type: ignore[attr-defined]  # JSON has no types
    for tiling in found["tilings"]:  # type: ignore[attr-defined]  # JSON has no types
        assert tiling["rule"].split()[0] in ("rv", "tb")
        assert tiling["tried"] >= 1
        assert tiling["rule_us"] > 0 < tiling["tuned_us"]


@needs_native
def test_model_and_train(tmp_path: Path) -> None:
    found = answer("model", "vit-tiny", "pattern=1:8", "rounds=1", "threads=1", f"out={tmp_path}")
    assert (found["weights"], found["kernels"]) == (6, {"native": 6})
    assert 0 < float(str(found["share"])) < 1
    assert float(str(found["limit"])) == pytest.approx(1 / (1 - float(str(found["share"]))))
    assert float(str(found["error"])) < 1e-3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "table.md"]
    found = answer("train", "vit-tiny", "pattern=1:8", "rounds=1", "threads=1", "batch=2")
    assert found["batch"] == 2
    share = float(str(found["masks_ms"])) / float(str(found["sparse_ms"]))
    assert float(str(found["masks_share"])) == pytest.approx(share)


def test_networks_are_made_sparse() -> None:
    subject = build("vit-tiny", batch=2, prompt=1)
    assert subject.logits(subject.model).shape == (2, 10)
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    assert make_sparse(subject.model, {"ff": "1:8"}) == 6
    for name, value in subject.model.state_dict().items():
        if "linear" in name and name.endswith("weight"):
            blocks = value.reshape(-1, 8)
            assert bool(((blocks != 0).sum(1) == 1).all())
            assert torch.equal(blocks.abs().amax(1), before[name].reshape(-1, 8).abs().amax(1))
        else:
            assert torch.equal(value, before[name])


@needs_native
def test_decoding_begins_at_the_prompt_every_time() -> None:
    pytest.importorskip("transformers", reason="needs the optional package transformers")
    from transformers import GPT2Config, GPT2LMHeadModel

    from nmflow.bench.model import _side
    from nmflow.bench.networks import Subject

    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50, n_positions=64)
    model = GPT2LMHeadModel(config).eval()
    subject = Subject("small", model, torch.randint(50, (1, 5)), 50, decodes=True)
    lengths: list[int] = []

    def note(module: nn.Module, given: tuple[object, ...], more: dict[str, object]) -> None:
        lengths.append(more["past_key_values"].get_seq_length())  # type: ignore[attr-defined]  # JSON has no types

    with torch.inference_mode():
        decode = _side(subject, model, new_tokens=3)
        handle = model.register_forward_pre_hook(note, with_kwargs=True)
        decode()
        decode()
        handle.remove()
    assert lengths == [5, 6, 7, 5, 6, 7]
