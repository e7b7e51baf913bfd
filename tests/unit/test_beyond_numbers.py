"""Compressed layers where a tensor is more than its memory: transforms, recorded graphs, views, classes of one's own.

The oracle is the dense layer with the same weight.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import nmflow
from nmflow.masks import rows_mask
from nmflow.ops import native_library
from nmflow.pattern import Pattern

AXIS = 64


def sparse(layer: nn.Linear, pattern: str) -> nn.Linear:
    """The layer with the largest of its weights, fixed."""
    layer.requires_grad_(False)
    layer.weight.mul_(rows_mask(layer.weight.abs(), Pattern.parse(pattern), "partial"))
    return layer


def networks(called: bool) -> tuple[nn.Sequential, nn.Sequential]:
    """The same network dense and compressed; the latter has packed its weights, or not yet."""
    torch.manual_seed(3)
    dense = nn.Sequential(sparse(nn.Linear(AXIS, 96), "1:8"), nn.GELU(), sparse(nn.Linear(96, 32), "1:8"))
    compressed = nmflow.compress(copy.deepcopy(dense), {"0.weight": "1:8", "2.weight": "1:8"})
    if called:
        compressed(torch.randn(4, AXIS))
    return dense, compressed


def tangent(net: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(net(forward_ad.make_dual(x, t))).tangent


TRANSFORMS: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {
    "forward mode": tangent,
    "linearize": lambda net, x, t: torch.func.linearize(net, x)[1](t),
    "jvp": lambda net, x, t: torch.func.jvp(net, (x,), (t,))[1],
    "jacfwd": lambda net, x, t: torch.func.jacfwd(net)(x[0]),
    "jacobian": lambda net, x, t: torch.autograd.functional.jacobian(
        net, x[0], vectorize=True, strategy="forward-mode"
    ),
    "vmap": lambda net, x, t: torch.func.vmap(net)(torch.stack([x, t])),
    "grad": lambda net, x, t: torch.func.grad(lambda each: net(each).square().sum())(x),
    "make_fx": lambda net, x, t: make_fx(net)(x)(t),
    "negative view": lambda net, x, t: net(torch._neg_view(x)),
    "sparse": lambda net, x, t: net(x.to_sparse()),
    "sparse rows": lambda net, x, t: net(x.to_sparse_csr()),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("called", [False, True], ids=["new", "called"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_see_the_whole_product(transform: Callable[..., Tensor], called: bool) -> None:
    dense, compressed = networks(called)
    x, t = torch.randn(4, AXIS), torch.randn(4, AXIS)
    with torch.no_grad() if transform is TRANSFORMS["make_fx"] else torch.enable_grad():
        torch.testing.assert_close(transform(compressed, x, t), transform(dense, x, t), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(compressed(x), dense(x), rtol=1e-4, atol=1e-5)  # and nothing is left of it


class Named(Tensor):
    """A class of one's own with nothing of its own."""


def test_tensors_of_a_class_of_ones_own_keep_it() -> None:
    dense, compressed = networks(called=True)
    x = torch.randn(4, AXIS).as_subclass(Named)
    assert type(compressed(x)) is type(dense(x)) is Named
    torch.testing.assert_close(compressed(x), dense(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", [None, "relu", "gelu", "gelu_tanh", "silu"])
def test_the_operator_has_gradients(activation: str | None) -> None:
    """Of x and the bias, against finite differences, and of twice the product."""
    torch.manual_seed(0)
    layer = nmflow.compress(sparse(nn.Linear(16, 6).double(), "1:4"), {"weight": "1:4"})
    rows = layer.weight_nm.rows[0]

    def product(x: Tensor, bias: Tensor) -> Tensor:
        return torch.ops.nmflow.linear(x, rows.values, rows.offsets, bias, 6, 16, 1, 4, activation)

    x, bias = torch.randn(3, 16, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    assert torch.autograd.gradcheck(product, (x.requires_grad_(), bias.requires_grad_()))


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace")
def test_a_graph_recorded_without_gradients_has_them() -> None:
    dense, compressed = networks(called=True)
    with torch.no_grad():
        graph = torch.jit.trace(compressed, torch.randn(4, AXIS))
    x = torch.randn(4, AXIS)
    grads = []
    for net in (dense, graph):
        given = x.clone().requires_grad_()
        net(given).square().sum().backward()
        grads.append(given.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_export_for_any_number_of_tokens(strict: bool, grad: bool) -> None:
    dense, compressed = networks(called=True)
    with torch.set_grad_enabled(grad):
        found = torch.export.export(
            compressed, (torch.randn(4, AXIS),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=strict
        )
    for tokens in (1, 3, 40):
        x = torch.randn(tokens, AXIS)
        torch.testing.assert_close(found.module()(x), dense(x), rtol=1e-4, atol=1e-5)


def test_weights_made_in_inference_mode_may_be_loaded_over() -> None:
    torch.manual_seed(1)
    x = torch.randn(2, AXIS)
    with torch.inference_mode():
        first, second = (nmflow.compress(sparse(nn.Linear(AXIS, 32), "1:8"), {"weight": "1:8"}) for _ in range(2))
        first(x), second(x)
        first.load_state_dict(second.state_dict())
        assert torch.equal(first(x), second(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["native", "dense"])
def test_offsets_of_other_tensors_are_other_offsets(dtype: torch.dtype) -> None:
    layer = nmflow.compress(sparse(nn.Linear(AXIS, 32).to(dtype), "1:8"), {"weight": "1:8"})
    rows, x = layer.weight_nm.rows[0], torch.randn(4, AXIS, dtype=dtype)
    for offsets in (rows.offsets, 7 - rows.offsets, rows.offsets.clone()):
        dense = torch.zeros(32, AXIS // 8, 8, dtype=dtype)
        dense.scatter_(2, offsets.long()[..., None], rows.values[..., None])
        y = torch.ops.nmflow.linear(x, rows.values, offsets, None, 32, AXIS, 1, 8, None)
        torch.testing.assert_close(y, x @ dense.flatten(1).T, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(native_library.why_not() is not None, reason="it asks the native library's own check")
def test_only_memory_is_handed_over_by_address() -> None:
    x = torch.randn(2, 2)
    assert native_library.plain(x, None, nn.Parameter(x), x.T)
    stored = nmflow.compress(sparse(nn.Linear(8, 8), "1:8"), {"weight": "1:8"}).weight
    for other in (torch._neg_view(x), x.to_sparse(), stored, x.as_subclass(Named)):
        assert not native_library.plain(x, other)
