"""What a process keeps: counted by hand, and against the tensors of a real step."""

from __future__ import annotations

import torch
from torch import nn

import nmflow
from nmflow.memory import saved_bytes, training_memory


def network() -> nn.Sequential:
    """9 x 16 + 9 weights, then 4 x 9 + 4: 193 parameters, of which 144 are to be sparse."""
    return nn.Sequential(nn.Linear(16, 9), nn.ReLU(), nn.Linear(9, 4))


def sparse(model: nn.Module) -> nmflow.Sparsifier:
    return nmflow.Sparsifier(model, {"0.weight": "1:8"}, total_steps=10)


def test_one_process_keeps_what_a_step_leaves() -> None:
    model = network()
    sparsifier = sparse(model)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 16)).sum().backward()
    optimizer.step()
    sparsifier.step()
    found = training_memory(model, sparsifier.slots)
    assert found.weights == sum(p.numel() * 4 for p in model.parameters()) == 193 * 4
    assert found.gradients == sum(p.grad.numel() * 4 for p in model.parameters() if p.grad is not None)
    moments = [tensor for state in optimizer.state.values() for tensor in state.values() if tensor.dim()]
    assert found.optimizer == sum(tensor.numel() * 4 for tensor in moments)
    [weight] = sparsifier._effective.values()
    assert (found.effective, found.masks) == (weight.effective.nbytes, weight.mask.nbytes) == (576, 144)
    assert found.total == 193 * 16 + 720
    assert found.overhead == 720 / (193 * 16)


def test_copies_on_two_processes_have_buckets() -> None:
    with torch.device("meta"):
        model = network()
    assert training_memory(model, (), 2).gradients == 2 * 193 * 4


def test_a_spread_network_holds_whole_rows_and_gathers_two_blocks() -> None:
    """On two processes the first holds 5 of 9 rows and 2 of 4; biases likewise."""
    model = network()
    slots = sparse(model).slots
    found = training_memory(model, slots, 2, [model[0], model[2]])
    held = 5 * 16 + 5 + 2 * 9 + 2
    assert (found.weights, found.gradients, found.optimizer) == (4 * held, 4 * held, 8 * held)
    assert (found.effective, found.masks) == (4 * 80, 80)
    assert found.gathered == 4 * 193 + 4 * 153
    assert training_memory(model, slots, 2, [model[0]], half=True).gathered == 2 * 193 + 4 * 153
    assert training_memory(model, slots, 2, [model[0]], scaled_gradients=True).masks == 5 * 80
    assert training_memory(model, slots, 1, [model[0]]).gathered == 0


def test_attention_keeps_no_scores() -> None:
    """7 tokens of 2 heads of 4: query, key, value and output, of which the projections before keep nothing more."""
    q, k, v = (torch.empty(1, 2, 7, 4, requires_grad=True) for _ in range(3))
    attend = torch.nn.functional.scaled_dot_product_attention
    assert saved_bytes(nn.Identity(), lambda _: attend(q, k, value=v)) == 4 * 4 * (2 * 7 * 4)


def test_what_autograd_keeps_of_a_forward_pass() -> None:
    """Linear keeps its input, ReLU its output, which the next Linear keeps as well: x, and the hidden features once."""
    for device in ("cpu", "meta"):
        model = network().to(device)
        x = torch.empty(3, 16, device=device)
        assert saved_bytes(model, lambda net, x=x: net(x)) == 4 * 3 * (16 + 9)
