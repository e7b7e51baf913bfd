"""The dense product of few tokens agrees with float64, whoever asks for it, and stands back where it must.

Uninitialized memory is filled with NaN in every test here, so an entry that is not written is seen.
"""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nmflow
from nmflow.ops import native, native_stream
from nmflow.runtime import NMLinear, StreamedLinear

missing = native.why_not()
pytestmark = pytest.mark.skipif(missing is not None, reason=f"native library: {missing}")

HERE = () if missing else native.ISAS[: native.ISAS.index(str(native.describe()["isa"])) + 1]
ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda y: y,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    assert math.isnan(torch.empty(1).item())
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[1, 2], autouse=True)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def gap(y: Tensor, expected: Tensor, scale: Tensor | None = None) -> float:
    """Largest error over the largest entry expected, or over that of `scale`; infinite where anything is not finite."""
    error = float((y.double() - expected).abs().max() / (expected if scale is None else scale).abs().max())
    return error if math.isfinite(error) else math.inf


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-3)], ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 9])
def test_agrees_with_float64(isa: str, dtype: torch.dtype, tolerance: float, tokens: int) -> None:
    torch.manual_seed(tokens)
    for rows, axis in ((1, 1), (2, 15), (3, 16), (4, 17), (5, 31), (37, 131), (256, 260)):  # the last one is shared out
        weight, bias = torch.randn(rows, axis).to(dtype), torch.randn(rows).to(dtype)
        x = torch.randn(tokens, axis).to(dtype)
        product = x.double() @ weight.double().T
        assert gap(native_stream.stream(x, weight, isa=isa), product) <= tolerance
        for activation, function in ACTIVATIONS.items():
            y = native_stream.stream(x, weight, bias, activation, isa)  # type: ignore[arg-type]  # names from a dict
            assert y.dtype == dtype
            before = product + bias.double()
            assert gap(y, function(before), scale=before) <= tolerance, (rows, axis, activation)


def test_strided_weights_inputs_and_biases() -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(20, 64)[::2, :33], torch.randn(20)[::2], torch.randn(3, 2, 66)[..., ::2]
    expected = F.linear(x.double(), weight.double(), bias.double())
    assert gap(native_stream.stream(x, weight, bias), expected) <= 1e-5
    assert native_stream.streams(x[:2], weight, bias)
    assert not native_stream.streams(x[:1], weight.t().contiguous().t(), bias)


def streamed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of every call of the product from now on."""
    calls: list[int] = []
    real = native_stream.stream

    def note(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        calls.append(x.shape[:-1].numel())
        return real(x, weight, bias)

    monkeypatch.setattr(native_stream, "stream", note)
    return calls


def test_layers_stream_few_tokens_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(33, 47)
    layer = nmflow.for_inference(copy.deepcopy(plain))
    assert type(layer) is StreamedLinear
    calls = streamed(monkeypatch)
    with torch.no_grad():
        for shape in ((33,), (1, 33), (2, 2, 33), (5, 33), (0, 33)):
            x = torch.randn(shape)
            torch.testing.assert_close(layer(x), plain(x))
        assert calls == [1, 1, 4]
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(torch.randn(1, 33)).dtype == torch.bfloat16
        assert calls == [1, 1, 4]
        with pytest.raises(RuntimeError):
            layer(torch.randn(1, 32))
    x = torch.randn(1, 33)
    layer(x).sum().backward()
    plain(x).sum().backward()
    assert calls == [1, 1, 4]
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad)
    layer.requires_grad_(False)
    assert layer(x.requires_grad_()).requires_grad
    with torch.no_grad():
        half = copy.deepcopy(layer).bfloat16()
        half(x.bfloat16())
        assert calls == [1, 1, 4]
        torch.testing.assert_close(pickle.loads(pickle.dumps(layer))(x), plain(x))  # its own bytes
        assert calls == [1, 1, 4, 1]


def test_it_follows_weights_that_change() -> None:
    layer = nmflow.for_inference(nn.Linear(16, 8))
    x = torch.randn(1, 16)
    with torch.no_grad():
        layer(x)
        layer.weight.mul_(2)
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("tokens", [1, 20])
def test_a_traced_network_computes(tokens: int) -> None:
    """torch.jit.trace writes down what torch does; a product behind its back would be lost."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)).eval().requires_grad_(False)
    model[0].weight.mul_(nmflow.nm_mask(model[0].weight, "1:8"))
    ready = nmflow.for_inference(nmflow.compress(model, {"0.weight": "1:8"}))
    ready(torch.randn(tokens, 64))
    traced, x = torch.jit.trace(ready, torch.randn(tokens, 64)), torch.randn(tokens, 64)
    torch.testing.assert_close(traced(x), model(x))


@pytest.mark.parametrize("how", ["compile", "export"])
def test_graphs_take_torchs_product(how: str) -> None:
    torch.manual_seed(0)
    layer = nmflow.for_inference(nn.Linear(16, 8)).eval()
    x = torch.randn(1, 16)
    with torch.no_grad():
        expected = F.linear(x, layer.weight, layer.bias)
        if how == "compile":
            y = torch.compile(layer, fullgraph=True, backend="eager")(x)
        else:
            y = torch.export.export(layer, (x,)).module()(x)
    torch.testing.assert_close(y, expected)


def test_a_network_goes_through_it_and_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).eval()
    model[4].weight = nn.Parameter(model[4].weight.detach().clone())
    for place in (0, 2):
        with torch.no_grad():
            weight = model[place].weight
            weight.mul_(nmflow.nm_mask(weight, "1:8"))
    x = torch.randn(2, 32)
    with torch.no_grad():
        expected = model(x)
        ready = nmflow.for_inference(nmflow.compress(model, {"0.weight": "1:8", "2.weight": "1:8"}))
        assert [type(layer) for layer in ready] == [NMLinear, nn.Identity, NMLinear, nn.Tanh, StreamedLinear]
        torch.testing.assert_close(ready(x), expected)
        back = nmflow.decompress(ready)
        assert repr(back) == repr(model)
        assert torch.equal(back(x), expected)
        dense = nmflow.for_inference(copy.deepcopy(model))
        torch.testing.assert_close(dense(x), expected)
        again = nmflow.compress(dense, {"0.weight": "1:8"})  # a streamed layer can be compressed, too
        assert [type(layer) for layer in again] == [NMLinear, nn.GELU, nn.Linear, nn.Tanh, nn.Linear]
        torch.testing.assert_close(again(x), expected)
        nmflow.save_compressed(ready, tmp_path / "small.safetensors")
        loaded = nmflow.load_compressed(tmp_path / "small.safetensors", dense)
        assert [type(layer) for layer in loaded] == [NMLinear, nn.GELU, NMLinear, nn.Tanh, nn.Linear]
        torch.testing.assert_close(loaded(x), expected)
