"""Which rows of a weight a process holds, counted by hand; and models that others have taken over."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import nmflow
from nmflow.layout import Layout, rows_shape, to_rows
from nmflow.pattern import Pattern
from nmflow.shards import Shard, held, is_spread, summed, whole
from nmflow.targets import Slot


def shard(shape: tuple[int, ...], layout: Layout, dim: int, rank: int, size: int, m: int = 4) -> Shard:
    """The share of one of `size` processes, without any of them."""
    made = object.__new__(Shard)
    made.__dict__.update(
        _managed=SimpleNamespace(offload_to_cpu=False, post_forward_mesh_info=None, mesh_info=None),
        _dim=dim, _full=shape, _step=-(-shape[dim] // size),
    )  # fmt: skip
    made._start = min(rank * made._step, shape[dim])
    made._stop = min(made._start + made._step, shape[dim])
    made._check("w", layout, size, [m])
    return made


@pytest.mark.parametrize(
    ("shape", "layout", "dim"),
    [((10, 8), "rows", 0), ((3, 4, 8), "rows", 0), ((6, 4, 3, 3), "conv", 0), ((8, 10), "columns", 0),
     ((8, 10), "columns", 1), ((16,), "rows", 0)],
)  # fmt: skip
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_parts_of_all_processes_are_the_slot(
    shape: tuple[int, ...], layout: Layout, dim: int, size: int
) -> None:
    """Every entry of every slot is in the part of exactly one process, where that process holds it."""
    if (layout == "columns" and dim == 1 and shape[dim] % size) or (shape == (8, 10) and dim == 0 and size == 4):
        pytest.skip("FSDP2 spreads no other dimension unevenly; eight entries are no blocks of four for each of four")
    values = torch.arange(torch.Size(shape).numel()).reshape(shape)
    height = rows_shape(shape, layout)[0]
    slots = [Slot("w", layout, shape, Pattern.parse("1:4"), rows) for rows in ((0, height // 3), (height // 3, height))]
    slots = slots if height > 1 else [Slot("w", layout, shape, Pattern.parse("1:4"))]
    for slot in slots:
        all_of_it = to_rows(values, layout)[slice(*slot.row_range)]
        seen = torch.zeros_like(all_of_it)
        for rank, mine in enumerate(torch.chunk(values, size, dim)):
            part = shard(shape, layout, dim, rank, size).part(slot)
            here = to_rows(mine, layout)[part.local]
            assert torch.equal(here, all_of_it[part.rows, part.columns])
            seen[part.rows, part.columns] += 1
        assert bool((seen == 1).all())


def test_a_process_without_rows_holds_nothing() -> None:
    slot = Slot("w", "rows", (5, 8), Pattern.parse("1:4"), (0, 2))
    part = shard((5, 8), "rows", 0, 3, 4).part(slot)
    assert torch.empty(0, 8)[part.local].shape == torch.empty(2, 8)[part.rows, part.columns].shape == (0, 8)


@pytest.mark.parametrize(
    ("shape", "layout", "dim", "message"),
    [((12, 8), "columns", 0, "cuts its reduction axis of 12 into 2 parts of 6, which M = 4 does not divide"),
     ((12,), "rows", 0, "M = 4"), ((10, 8), "rows", 1, "spreads dim 1"), ((6, 4, 3, 3), "conv", 1, "spreads dim 1")],
)  # fmt: skip
def test_cuts_through_blocks_are_refused(shape: tuple[int, ...], layout: Layout, dim: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shard(shape, layout, dim, 0, 2)


@pytest.mark.parametrize(
    ("shape", "layout", "dim", "rows", "v", "size", "message"),
    [
        ((16, 8), "rows", 0, None, 4, 2, None),
        ((16, 8), "rows", 0, None, 4, 3, "cuts the weight every 6 rows for 3 processes, .* of 4 rows .*use 1:4v2,"),
        ((16, 8), "rows", 0, None, 16, 2, "use 1:4v8"),
        ((16, 8), "rows", 0, None, 16, 1, None),
        ((12, 8), "rows", 0, (2, 12), 4, 2, None),                 # a slice that begins at row 2 is cut at its fourth
        ((12, 8), "rows", 0, (3, 12), 4, 2, r"w\[3:12\]: .* groups of 4 .*use 1:4,"),
        ((12, 8), "rows", 0, (0, 6), 4, 2, None),                  # the cut lies between two slices
        ((3, 4, 8), "rows", 0, None, 3, 3, "every 4 rows for 3 .*use 1:4,"),
        ((3, 4, 8), "rows", 0, None, 4, 3, None),
        ((6, 4, 3, 3), "conv", 0, None, 3, 2, None),
        ((6, 4, 3, 3), "conv", 0, None, 2, 2, "every 3 rows for 2"),
        ((8, 12), "columns", 0, None, 5, 2, None),                 # along the inputs every group is whole
        ((8, 12), "columns", 1, None, 4, 2, "every 6 rows for 2 .*use 1:4v2"),
        ((5, 8), "rows", 0, None, 2, 4, None),                     # parts of 2, 2, 1 and 0 rows
    ],
)
def test_cuts_through_groups_of_rows_are_refused(
    shape: tuple[int, ...],
    layout: Layout,
    dim: int,
    rows: tuple[int, int] | None,
    v: int,
    size: int,
    message: str | None,
) -> None:
    share = shard(shape, layout, dim, 0, size)
    slot = Slot("w", layout, shape, Pattern(1, 4, v), rows)
    if message is None:
        share._check_groups(slot, size)
    else:
        with pytest.raises(ValueError, match=message):
            share._check_groups(slot, size)


def test_an_ordinary_weight_is_whole() -> None:
    weight = nn.Linear(8, 6).weight
    slot = Slot("weight", "rows", (6, 8), Pattern.parse("1:4"), (2, 5))
    assert not is_spread(weight)
    assert held(weight) is weight
    part = whole(slot)
    assert torch.equal(weight[part.local], weight[2:5])
    assert (part.rows, part.columns) == (slice(0, 3), slice(0, 8))
    counts = torch.tensor([[3], [4]])
    assert torch.equal(summed(counts.clone(), [None, None]), counts)


def _engine() -> nn.Module:
    """A module of a class that DeepSpeed brings."""
    kind: Any = type("DeepSpeedEngine", (nn.Sequential,), {"__module__": "deepspeed.runtime.engine"})
    return kind(nn.Linear(8, 8))


def _zero3() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].weight.ds_id = 0
    return model


def _fsdp1() -> nn.Module:
    kind: Any = type("FullyShardedDataParallel", (nn.Sequential,), {})
    return nn.Sequential(kind(nn.Linear(8, 8)))


@pytest.mark.parametrize(
    ("build", "message"), [(_engine, "belongs to DeepSpeed"), (_zero3, "belongs to DeepSpeed"), (_fsdp1, "FSDP1")]
)
def test_models_that_others_have_taken_over(build: Any, message: str) -> None:
    model = build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        nmflow.Sparsifier(model, {"re:.*weight": "1:4"}, total_steps=4)
    assert all(type(module).__name__[:2] != "NM" for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_what_is_refused_while_attaching_leaves_the_model_ordinary() -> None:
    """That nobody gathers a weight is found when its part is looked for: by then the modules read W~."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    mesh = init_device_mesh("cpu", (1,))
    model[1].weight = nn.Parameter(distribute_tensor(model[1].weight.detach(), mesh, [Replicate()]))
    with pytest.raises(ValueError, match="tensor parallel makes it"):
        nmflow.Sparsifier(model, {"re:.*weight": "1:4"}, total_steps=4)
    assert [type(module) for module in model] == [nn.Linear, nn.Linear]
    assert not any(key.startswith("_nm") for module in model for key in vars(module))
