"""What makes compressed layers fast must not change what they compute: bound calls, windows, fusing, plans."""

from __future__ import annotations

import copy
import gc
import json
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nmflow
from nmflow.layout import from_rows, to_rows
from nmflow.ops import bound, native, registry
from nmflow.ops.native_plan import DENSE, NativePlan
from nmflow.runtime import NMConv2d, NMLinear, compress, compression_report, decompress, fuse_activations, tune
from nmflow.runtime.modules import PackedRows
from nmflow.runtime.windows import windows
from nmflow.targets import Slot, record

needs_native = pytest.mark.skipif(native.why_not() is not None, reason=f"needs the native library: {native.why_not()}")


@pytest.fixture(autouse=True)
def _own_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "plan", NativePlan())


def pruned_(module: nn.Module, pattern: str) -> nn.Module:
    """Every weight matrix at `pattern`, by loops that know nothing of masks: the first n of a block survive."""
    n, m = map(int, pattern.split(":"))
    for name, weight in module.named_parameters():
        if weight.dim() > 1:
            layout = "conv" if weight.dim() == 4 else "rows"
            rows = to_rows(weight.detach(), layout).clone()
            for start in range(0, rows.shape[1], m):
                rows[:, start : start + m][:, n:] = 0
            # another place in every row
            rows = torch.stack([row.reshape(-1, m).roll(i % m, -1).flatten() for i, row in enumerate(rows)])
            module.get_parameter(name).data = from_rows(rows, tuple(weight.shape), layout).contiguous()
    return module


def small(pattern: str = "1:4", size: tuple[int, int] = (32, 24), dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return pruned_(nn.Linear(*size), pattern).to(dtype)


def compressed_in_three(dense: Any, pattern: str) -> Any:
    """Three slices of one pattern, as in a fused query, key and value."""
    rows, third = tuple(dense.weight.shape), dense.out_features // 3
    slices = [(start, start + third) for start in range(0, 3 * third, third)]
    record(dense, [Slot("weight", "rows", rows, nmflow.Pattern.parse(pattern), each) for each in slices])
    return compress(dense)


# ------------------------------------------------------------------------------------- bound calls
@needs_native
def test_the_registry_is_asked_once_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    select = registry.select

    def watched(task: str, **facts: object) -> registry.Kernel:
        asked.append(facts["tokens"])
        return select(task, **facts)

    monkeypatch.setattr("nmflow.ops.dispatch.select", watched)
    dense = small()
    layer = compress(dense)
    with torch.no_grad():
        for x in (torch.randn(1, 32), torch.randn(1, 32), torch.randn(2, 3, 32), torch.randn(1, 32)):
            torch.testing.assert_close(layer(x), dense(x))
    assert asked == [1, 6]


@pytest.mark.parametrize(
    "disturb",
    [
        lambda x: x.t().contiguous().t(),
        lambda x: x[:, :0].new_zeros(4, 0, 32),
        lambda x: x.requires_grad_(),
        lambda x: x.double(),
        lambda x: x[0],
        lambda x: x.expand(3, 4, 32),
        lambda x: nn.Parameter(x),
    ],
    ids=["strided", "empty", "needs grad", "another dtype", "a vector", "expanded", "a parameter"],
)
def test_inputs_that_are_not_bound_are_right_all_the_same(disturb: Callable[[Tensor], Tensor]) -> None:
    dense = small()
    layer = compress(dense)
    x = torch.randn(4, 32)
    with torch.no_grad():
        layer(x)
    x = disturb(x)
    wanted: Tensor | str
    try:
        wanted = dense(x)
    except RuntimeError:
        with pytest.raises(RuntimeError):
            layer(x)
        return
    torch.testing.assert_close(layer(x), wanted)
    if x.requires_grad:
        layer(x).sum().backward()
        torch.testing.assert_close(x.grad, torch.autograd.grad(dense(x).sum(), x)[0])


def changes() -> Iterator[Any]:
    def in_place(layer: NMLinear) -> None:
        layer.weight_nm.rows[0].values.mul_(2)

    def replaced(layer: NMLinear) -> None:
        rows = layer.weight_nm.rows[0]
        rows.values = rows.values * 2

    def loaded(layer: NMLinear) -> None:
        state = layer.state_dict()
        layer.load_state_dict({**state, "weight_nm.0.values": state["weight_nm.0.values"] * 2})

    def moved(layer: NMLinear) -> None:
        rows = layer.weight_nm.rows[0]
        rows.offsets.sub_(rows.offsets.to(torch.uint8)).add_(1)
        rows.values.mul_(2)

    def exchanged(layer: NMLinear) -> None:
        layer.weight_nm = compress(small("2:8")).weight_nm

    def beside_one_that_counts_no_writes(layer: NMLinear) -> None:
        rows = layer.weight_nm.rows[0]
        with torch.inference_mode():
            rows.offsets = rows.offsets.clone()
        with torch.no_grad():
            layer(torch.randn(2, 32))
        rows.values.mul_(2)

    for change in (in_place, replaced, loaded, moved, exchanged, beside_one_that_counts_no_writes):
        yield pytest.param(change, id=change.__name__)


@pytest.mark.parametrize("change", list(changes()))
@pytest.mark.parametrize("plain", [False, True], ids=["native", "dense"])
def test_a_changed_weight_is_noticed(
    change: Callable[[NMLinear], None], plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if plain:
        monkeypatch.setattr(registry, "_KERNELS", [k for k in registry._KERNELS if k.name == "dense"])
    layer = compress(small())
    assert isinstance(layer, NMLinear)
    x = torch.randn(2, 32)
    with torch.no_grad():
        before = layer(x)
        change(layer)
        now = layer(x)
        torch.testing.assert_close(now, F.linear(x, layer.weight_nm.unpack(), layer.bias))
    assert not torch.allclose(now, before)


def test_a_bias_of_another_kind_is_not_read_past_its_end() -> None:
    layer = compress(small())
    x = torch.randn(2, 32)
    with torch.no_grad():
        layer(x)
        layer.bias = nn.Parameter(torch.zeros(3))
        with pytest.raises((RuntimeError, ValueError)):
            layer(x)


def test_layers_of_one_shape_do_not_mix_up_what_they_were_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows from the shape of x is common to them; shapes are forgotten when there are many."""
    monkeypatch.setattr(bound, "_MOST_REMEMBERED", 3)
    torch.manual_seed(1)
    dense = [pruned_(nn.Linear(32, 24, bias=bias), pattern) for bias, pattern in ((True, "1:4"), (False, "2:8"))]
    layers = [cast(NMLinear, compress(layer)) for layer in dense]
    layers[1].activation = "relu"
    threads = torch.get_num_threads()
    try:
        with torch.no_grad():
            for i, shape in enumerate([(1,), (1,), (2, 3), (6,), (5,), (1,), (4, 2), (7,), (9,), (6,), (1,)] * 3):
                torch.set_num_threads(1 + i // 11 % 2)
                x = torch.randn(*shape, 32)
                for layer, wanted in zip(layers, (dense[0](x), dense[1](x).relu()), strict=True):
                    torch.testing.assert_close(layer(x), wanted)
    finally:
        torch.set_num_threads(threads)
    asked = bound._ASKED[24, 32]
    assert len(asked) <= 4
    for layer in layers:
        own = layer.weight_nm.bound
        assert isinstance(own, bound.BoundOnCpu)
        assert len(own._calls) <= 4


def test_copies_of_a_used_layer_are_their_own() -> None:
    layer = compress(small())
    x = torch.randn(2, 32)
    with torch.no_grad():
        wanted = layer(x)
        copied, pickled = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
        layer.weight_nm.rows[0].values.zero_()
        torch.testing.assert_close(copied(x), wanted)
        torch.testing.assert_close(pickled(x), wanted)
    assert set(vars(decompress(pickled))) == set(vars(decompress(compress(small()))))


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_plan_decides_and_a_change_of_it_is_noticed(dtype: torch.dtype) -> None:
    dense = small(dtype=dtype)
    layer = compress(dense)
    rows = layer.weight_nm.rows[0]
    x = torch.randn(3, 32).to(dtype)
    tolerance: dict[str, float] = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    with torch.no_grad():
        assert rows.kernel_for(3) == "native"
        torch.testing.assert_close(layer(x), dense(x), **tolerance)
        key = native.prepare(rows.values, rows.offsets, 24, 32, 1, 4).forms.key(3, torch.get_num_threads())
        native.plan.choose(key, DENSE)
        assert rows.kernel_for(3) == "dense"
        assert rows.kernel_for(300) == "native"
        assert compression_report(layer).layers[0].kernel == "native"  # 3 tokens are not among the sizes it asks for
        assert torch.equal(layer(x), dense(x))
        assert not compression_report(layer).layers[0].others
        native.plan.choose(key._replace(bucket=4), DENSE)
        report = compression_report(layer)
    assert report.layers[0].kernel == "native or dense"
    reason = "the dense product was faster when it was measured"
    assert report.layers[0].others == {"native": reason}
    assert report.lines()[-1] == f"not always native: {reason} (1 of them)"


def bytes_alive() -> int:
    """Of all storages that some tensor of Python holds."""
    gc.collect()
    plain = [each for each in gc.get_objects() if type(each) in (Tensor, nn.Parameter) and each.device.type == "cpu"]
    storages = [tensor.untyped_storage() for tensor in plain]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize(
    ("make", "dtype"),
    [
        pytest.param(lambda: compress(pruned_(nn.Linear(512, 384), "2:4")), torch.float32, id="two forms"),
        pytest.param(lambda: compress(pruned_(nn.Linear(512, 384), "1:16")), torch.float32, id="one form"),
        pytest.param(lambda: compress(pruned_(nn.Linear(512, 384), "2:4").bfloat16()), torch.bfloat16, id="bfloat16"),
        pytest.param(lambda: compress(pruned_(nn.Linear(512, 384), "1:4").double()), torch.float64, id="unpacked"),
        pytest.param(
            lambda: compressed_in_three(pruned_(nn.Linear(512, 384), "1:8"), "1:8"), torch.float32, id="three as one"
        ),
    ],
)
def test_the_report_knows_the_memory_of_what_kernels_made(make: Callable[[], Any], dtype: torch.dtype) -> None:
    """Against the storages that Python's garbage collector finds alive."""
    layer = make()
    assert compression_report(layer).bytes_of_forms == 0
    before = bytes_alive()
    for tokens in (1, 1, 64):
        with torch.no_grad():
            layer(torch.randn(tokens, 512, dtype=dtype))
        more, report = bytes_alive() - before, compression_report(layer)
        assert report.bytes_of_forms <= more <= report.bytes_of_forms + 1024  # forms are aligned
        assert report.bytes_of_forms == sum(each.bytes_of_forms for each in report.layers) > 0
    in_memory = report.bytes_after + report.bytes_of_forms
    assert f"in memory, with the forms that kernels read: {in_memory:,} bytes" in report.lines()
    assert report.to_dict()["bytes_of_forms"] == report.bytes_of_forms


def test_dense_is_expected_where_it_is_faster() -> None:
    from nmflow.ops.native_plan import Key, expect_dense

    def expected(n: int, m: int, tokens: int, isa: str = "avx512", dtype: str = "float32") -> bool:
        return expect_dense(Key(768, 768, n, m, dtype, (tokens - 1).bit_length(), 2), isa)

    assert expected(1, 128, 1, isa="portable")
    assert expected(7, 8, 196)
    assert not expected(7, 8, 1)
    assert not expected(2, 4, 1576)
    assert not expected(2, 4, 196, dtype="bfloat16")
    assert expected(3, 4, 196, dtype="bfloat16")


# ------------------------------------------------------------------------------------- fused projections
def test_slices_of_one_pattern_are_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = small(size=(16, 24))
    layer = compressed_in_three(dense, "1:4")
    assert len(layer.weight_nm.rows) == 3
    seen: list[tuple[int, int]] = []
    linear = PackedRows.linear

    def watched(self: PackedRows, *args: Any) -> Tensor:
        seen.append(self.shape)
        return linear(self, *args)

    monkeypatch.setattr(PackedRows, "linear", watched)
    x = torch.randn(5, 16)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), dense(x))
        torch.testing.assert_close(copy.deepcopy(layer)(x), dense(x))
        assert seen == [(24, 16), (24, 16)]
        layer.weight_nm.rows[1].values.mul_(3)
        dense.weight[8:16].mul_(3)
        torch.testing.assert_close(layer(x), dense(x))
    assert list(layer.state_dict()) == list(compress(dense).state_dict())
    assert list(decompress(layer).state_dict()) == ["weight", "bias"]


# ------------------------------------------------------------------------------------- convolutions
@pytest.mark.parametrize("channels_last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": 1},
        {"kernel_size": 1, "stride": 2, "bias": False},
        {"kernel_size": 1, "padding": 1},
        {"kernel_size": 1, "padding": "same"},
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": (3, 2), "stride": (1, 2), "padding": (2, 0), "dilation": (1, 2)},
        {"kernel_size": 4, "padding": "same"},
        {"kernel_size": 3, "padding": "valid", "dilation": 2},
        {"kernel_size": 3, "groups": 2, "padding": 1},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    ],
    ids=str,
)
def test_convolutions_equal_the_pruned_one(arguments: dict[str, Any], channels_last: bool) -> None:
    torch.manual_seed(1)
    dense = pruned_(nn.Conv2d(16, 48, **arguments), "1:16" if "groups" not in arguments else "1:8")
    layer = compress(dense)
    assert isinstance(layer, NMConv2d)
    x = torch.randn(2, 16, 9, 8)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    with torch.no_grad():
        y = layer(x)
        torch.testing.assert_close(y, dense(x))
        torch.testing.assert_close(layer(x[:1]), dense(x[:1]))
        torch.testing.assert_close(layer(x[0]), dense(x[0]))
        assert y.shape == dense(x).shape
    x.requires_grad_()
    torch.testing.assert_close(
        torch.autograd.grad(layer(x).square().sum(), x)[0], torch.autograd.grad(dense(x).square().sum(), x)[0]
    )


@needs_native
def test_the_report_says_which_convolutions_multiply() -> None:
    model = nn.Sequential(
        *(nn.Conv2d(64, 64, 1), nn.Conv2d(64, 64, 3), nn.Conv2d(64, 64, 3, groups=2), nn.Conv2d(64, 16, 3))
    )
    report = compression_report(compress(pruned_(model, "1:8")))
    native_here = registry.select("linear", tokens=9, shape=(64, 64), n=1, m=8, dtype=torch.float32, device="cpu").name
    assert [layer.kernel for layer in report.layers] == [native_here, native_here, "dense", "dense"]


def test_windows_equal_unfold() -> None:
    x = torch.randn(2, 5, 7, 6)
    found = windows(x, (3, 2), (2, 1), (1, 0, 2, 3), (1, 2))
    wanted = F.unfold(F.pad(x, (1, 0, 2, 3)), (3, 2), (1, 2), 0, (2, 1))  # [B, C·kh·kw, L]
    wanted = wanted.reshape(2, 5, 6, -1).permute(0, 3, 2, 1).reshape(2, *found.shape[1:3], 30)
    assert torch.equal(found, wanted)


# ------------------------------------------------------------------------------------- fused activations
@pytest.mark.parametrize(("kernel", "size"), [((3, 3), (2, 9)), ((1, 4), (9, 3)), ((1, 1), (0, 3)), ((5, 5), (2, 2))])
def test_a_kernel_larger_than_its_input_is_refused_as_by_torch(kernel: tuple[int, int], size: tuple[int, int]) -> None:
    layer = nn.Conv2d(8, 64, kernel)
    with torch.no_grad():
        layer.weight.copy_(pruned_(nn.Conv2d(8, 64, kernel), "1:8").weight)
    compressed = compress(layer, {"weight": "1:8"}).eval()
    x = torch.randn(1, 8, *size)
    for each in (layer, compressed):
        with torch.no_grad(), pytest.raises(RuntimeError, match="ernel size can't be greater than actual input size"):
            each(x)


class Follow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act = nn.Linear(16, 16), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.fc1(x) + 1)


def feed_forwards() -> dict[str, Callable[[], tuple[nn.Module, list[str]]]]:
    def sequential(act: nn.Module) -> Callable[[], tuple[nn.Module, list[str]]]:
        return lambda: (nn.Sequential(nn.Linear(16, 32), act, nn.Linear(32, 16)), ["0"])

    def encoder(activation: Any) -> Callable[[], tuple[nn.Module, list[str]]]:
        layer = nn.TransformerEncoderLayer(16, 2, 32, activation=activation, batch_first=True)
        return lambda: (layer, ["linear1"])

    def bert() -> tuple[nn.Module, list[str]]:
        transformers = pytest.importorskip("transformers", reason="needs the optional package transformers")
        config = transformers.BertConfig(hidden_size=16, intermediate_size=32, num_attention_heads=2)
        from transformers.models.bert.modeling_bert import BertIntermediate

        return BertIntermediate(config), ["dense"]

    def gpt2() -> tuple[nn.Module, list[str]]:
        transformers = pytest.importorskip("transformers", reason="needs the optional package transformers")
        from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

        return GPT2MLP(32, transformers.GPT2Config(n_embd=16, n_head=2)), ["c_fc"]

    def timm_mlp() -> tuple[nn.Module, list[str]]:
        pytest.importorskip("timm", reason="needs the optional package timm")
        from timm.layers import Mlp

        return Mlp(16, 32), ["fc1"]

    return {
        "gelu": sequential(nn.GELU()),
        "gelu tanh": sequential(nn.GELU(approximate="tanh")),
        "relu": sequential(nn.ReLU()),
        "silu": sequential(nn.SiLU()),
        "not one of ours": lambda: (nn.Sequential(nn.Linear(16, 16), nn.Tanh()), []),
        "not known to follow": lambda: (Follow(), []),
        "encoder, relu": encoder("relu"),
        "encoder, gelu": encoder(F.gelu),
        "encoder, module": encoder(nn.GELU()),
        "bert": bert,
        "gpt2": gpt2,
        "timm": timm_mlp,
    }


@pytest.mark.parametrize("make", feed_forwards().values(), ids=feed_forwards().keys())
def test_fused_activations_change_nothing_but_the_calls(make: Callable[[], tuple[nn.Module, list[str]]]) -> None:
    torch.manual_seed(0)
    model, wanted = make()
    model = pruned_(model.eval(), "1:4")
    compressed = compress(model)
    shown = repr(decompress(compressed))
    assert fuse_activations(compressed) == wanted
    assert fuse_activations(compressed) == []
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        torch.testing.assert_close(compressed(x), model(x))
        torch.testing.assert_close(copy.deepcopy(compressed)(x), model(x))
        restored = decompress(compressed)
        torch.testing.assert_close(restored(x), model(x))
    assert repr(restored) == shown
    x.requires_grad_()
    torch.testing.assert_close(
        torch.autograd.grad(compressed(x).square().sum(), x)[0], torch.autograd.grad(model(x).square().sum(), x)[0]
    )


class HalfOfIt(nn.TransformerEncoderLayer):
    """Torch's forward, with a feed-forward block of its own."""

    def _ff_block(self, x: Tensor) -> Tensor:
        return self.linear2(self.activation(0.5 * self.linear1(x)))


class Doubled(nn.GELU):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class ReLU(nn.Module):
    """Of the name, not of the sense."""

    def forward(self, x: Tensor) -> Tensor:
        return x.relu() + 1


class Tripled(nn.Linear):
    def __call__(self, x: Tensor) -> Tensor:
        return 3 * super().__call__(x)


def touched(touch: Callable[[nn.Linear, nn.Module], object]) -> nn.Module:
    """A pair that would be fused, but for what `touch` does to it."""
    linear, act = nn.Linear(16, 16), nn.GELU()
    touch(linear, act)
    return nn.Sequential(linear, act)


def twice_the_linear(*after: nn.Module) -> nn.Module:
    linear = nn.Linear(16, 16)
    return nn.Sequential(linear, nn.GELU(), linear, *after)


def encoders_of_one_linear() -> nn.Module:
    one, two = (nn.TransformerEncoderLayer(16, 2, 32, activation=act, batch_first=True) for act in (F.relu, F.gelu))
    two.linear1 = one.linear1
    return nn.Sequential(one, two)


def set_forward(module: nn.Module) -> None:
    own = type(module).forward
    module.forward = lambda x: 2 * own(module, x)  # type: ignore[method-assign]  # what people do


def one_activation_for_two() -> nn.Module:
    act = nn.GELU()
    return nn.Sequential(nn.Linear(16, 16), act, nn.Linear(16, 16), nn.Dropout(), act)


UNKNOWN: dict[str, Callable[[], nn.Module]] = {
    "used again": twice_the_linear,
    "used again, followed again": lambda: twice_the_linear(nn.ReLU()),
    "used by two encoders": encoders_of_one_linear,
    "another block": lambda: HalfOfIt(16, 2, 32, activation=nn.SiLU(), batch_first=True),  # past the fused path
    "hook on the linear": lambda: touched(lambda linear, _: linear.register_forward_hook(lambda m, i, y: -y)),
    "hook before the linear": lambda: touched(lambda linear, _: linear.register_forward_pre_hook(lambda m, i: -i[0])),
    "hook on the activation": lambda: touched(lambda _, act: act.register_forward_hook(lambda m, i, y: 2 * y)),
    "hook before the activation": lambda: touched(lambda _, act: act.register_forward_pre_hook(lambda m, i: -i[0])),
    "forward of this activation": lambda: touched(lambda _, act: set_forward(act)),
    "a GELU of one's own": lambda: nn.Sequential(nn.Linear(16, 16), Doubled()),
    "a ReLU of one's own": lambda: nn.Sequential(nn.Linear(16, 16), ReLU()),
    "a linear of one's own": lambda: nn.Sequential(Tripled(16, 16), nn.GELU()),
}


@pytest.mark.parametrize("make", UNKNOWN.values(), ids=UNKNOWN.keys())
def test_what_is_used_or_seen_elsewhere_is_not_fused(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = pruned_(make().eval(), "1:4")
    compressed = nmflow.for_inference(compress(model))
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        torch.testing.assert_close(compressed(x), model(x))
    assert fuse_activations(compressed) == []
    assert [m for m in compressed.modules() if isinstance(m, NMLinear) and m.activation is not None] == []


def test_a_forward_set_on_the_compressed_layer_is_not_fused() -> None:
    model = pruned_(nn.Sequential(nn.Linear(16, 16), nn.GELU()), "1:4")
    compressed = compress(model)
    set_forward(compressed[0])
    assert fuse_activations(compressed) == []


def test_an_activation_of_several_layers_is_replaced_where_it_is_fused() -> None:
    torch.manual_seed(0)
    model = pruned_(one_activation_for_two().eval(), "1:4")
    compressed = compress(model)
    assert fuse_activations(compressed) == ["0"]
    assert [type(module) for module in (compressed[1], compressed[4])] == [nn.Identity, nn.GELU]
    x = torch.randn(3, 16)
    with torch.no_grad():
        torch.testing.assert_close(compressed(x), model(x))
    restored = decompress(compressed)
    assert restored[1] is restored[4]


# ------------------------------------------------------------------------------------- tuning a model
@needs_native
def test_a_model_is_tuned_at_the_sizes_it_sees_and_the_plan_is_kept(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = pruned_(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32), nn.Linear(32, 64)), "1:8").eval()
    compressed = compress(model)
    x = torch.randn(3, 4, 32)
    file = tmp_path / "plan.json"
    tuned = tune(compressed, x, seconds=0.01, plan=file)
    assert [(t.key.out_features, t.key.in_features, t.key.bucket) for t in tuned] == [(64, 32, 4), (32, 64, 4)]
    assert all(t.gain is not None and t.gain > 0 and t.line() for t in tuned)
    with torch.no_grad():
        torch.testing.assert_close(compressed(x), model(x))
    again = tune(compressed, x, seconds=0.01, plan=file)
    assert [(t.key, t.choice, t.gain) for t in again] == [(t.key, t.choice, None) for t in tuned]
    tune(compressed, lambda: compressed(torch.randn(1, 32)), seconds=0.01, plan=file)
    assert len(json.loads(file.read_text())["choices"]) == 4


def test_what_cannot_be_tuned_is_refused(tmp_path: Path) -> None:
    if native.why_not() is not None:
        with pytest.raises(RuntimeError, match="native library"):
            tune(compress(small()), torch.randn(1, 32))
        return
    with pytest.raises(ValueError, match="no compressed layer"):
        tune(small(), torch.randn(1, 32))
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(ValueError, match="no plan"):
        nmflow.tune(compress(small()), torch.randn(1, 32), plan=tmp_path / "plan.json")


@needs_native
def test_where_the_plan_cannot_go_is_said_before_measuring(tmp_path: Path) -> None:
    def measured() -> None:
        raise AssertionError("the example ran")

    with pytest.raises(FileNotFoundError, match=r"the folder .* does not exist"):
        tune(compress(small()), measured, plan=tmp_path / "missing" / "plan.json")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        tune(compress(small()), measured, plan=tmp_path)


@needs_native
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_takes_no_plan_is_said_before_measuring(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="cannot be written to"):
        tune(compress(small()), lambda: pytest.fail("the example ran"), plan=tmp_path / "plan.json")


def test_rows_are_kept_dense_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no sparse kernel runs, the weight is not unpacked for every call."""
    monkeypatch.setattr(registry, "_KERNELS", [k for k in registry._KERNELS if k.name == "dense"])
    layer = compress(small())
    rows = layer.weight_nm.rows[0]
    assert isinstance(rows, PackedRows)
    with torch.no_grad():
        layer(torch.randn(2, 32))
        assert rows.dense() is rows.dense()
