"""Attention under CPU autocast: as exact as float32 has it, whatever autocast's own rule is."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nmflow.train.attention import SHORT, attention_in_float32

SHAPE = (2, 4, 19, 16)


def exact(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """softmax(Q Kᵀ / √d) V, written out in float64."""
    scores = query.double() @ key.double().transpose(-1, -2) / query.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
    return scores.softmax(-1) @ value.double()


def inputs() -> list[Tensor]:
    """Q, K and V as a layer in bfloat16 gives them, far enough from zero for a peaked softmax."""
    draw = torch.Generator().manual_seed(0)
    return [(3 * torch.randn(SHAPE, generator=draw)).bfloat16().requires_grad_() for _ in range(3)]


MASKS = {
    "none": None,
    "boolean": torch.arange(19).expand(19, 19) < 12,
    "additive": torch.linspace(-3, 3, 19 * 19).view(19, 19).bfloat16(),
}


def under_autocast(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal)


@pytest.mark.parametrize(
    ("mask", "causal"), [("none", False), ("none", True), ("boolean", False), ("additive", False)]
)
def test_it_rounds_only_what_comes_out(mask: str, causal: bool) -> None:
    ours, plain = inputs(), inputs()
    with attention_in_float32():
        found = under_autocast(*ours, MASKS[mask], causal)
    expected = exact(*plain, MASKS[mask], causal)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-5)
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).bfloat16()
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    for one, other in zip(ours, plain, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(one.grad, other.grad, rtol=2**-7, atol=1e-4)


def test_autocasts_own_rule_rounds_more_and_is_back_afterwards() -> None:
    """And it says nothing of rules that are replaced, nor leaves a filter of warnings behind."""
    tensors = inputs()
    before = under_autocast(*tensors, None, False)
    filters = list(warnings.filters)
    with warnings.catch_warnings(record=True) as said, attention_in_float32():
        inside = under_autocast(*tensors, None, False)
    assert not said
    assert warnings.filters == filters
    assert torch.equal(under_autocast(*tensors, None, False), before)
    nearest = exact(*tensors).bfloat16()
    assert (inside == nearest).float().mean() > 0.99
    assert (before == nearest).float().mean() < 0.95


def test_long_sequences_are_left_to_autocasts_rule() -> None:
    query = torch.randn(1, 2, SHORT + 1, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = under_autocast(query, query, query, None, True)
    with attention_in_float32():
        assert torch.equal(under_autocast(query, query, query, None, True), expected)
        shorter = query[:, :, 1:]
        found = under_autocast(shorter, shorter, shorter, None, True)
    assert not torch.equal(found, under_autocast(shorter, shorter, shorter, None, True))


def test_outside_autocast_nothing_changes() -> None:
    tensors = inputs()
    expected = F.scaled_dot_product_attention(*tensors)
    with attention_in_float32():
        assert torch.equal(F.scaled_dot_product_attention(*tensors), expected)
        double = F.scaled_dot_product_attention(*(tensor.double() for tensor in tensors))
    assert double.dtype == torch.float64


def test_what_autocast_leaves_alone_and_an_empty_batch() -> None:
    doubles = [tensor.detach().double() for tensor in inputs()]
    none = torch.randn(0, 2, 5, 8, requires_grad=True)
    with attention_in_float32():
        torch.testing.assert_close(under_autocast(*doubles, None, False), exact(*doubles))
        found = under_autocast(none, none, none, None, False)
    assert (found.shape, found.dtype) == (none.shape, torch.bfloat16)
    found.sum().backward()
    assert none.grad is not None


def test_a_compiled_layer_takes_it() -> None:
    torch.manual_seed(0)
    layer, x = nn.TransformerEncoderLayer(32, 2, 48, 0.0, batch_first=True), torch.randn(3, 9, 32)

    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x)

    with attention_in_float32():
        compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), forward(x))
