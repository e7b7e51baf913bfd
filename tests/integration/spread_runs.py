"""What several processes do under FSDP2, each line beside one process with the whole model; started by test_spread.

Every process builds both models and asserts that they agree; what the first prints, the test reads.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import nmflow
from nmflow.shards import full, held

STEPS = 6
WIDTH = 32


def build(columns: bool = False) -> nn.Sequential:
    """Two transformer layers with fused and separate projections and a head; `columns`: GPT-2's layers."""
    torch.manual_seed(0)
    if columns:
        from transformers.pytorch_utils import Conv1D

        return nn.Sequential(Conv1D(48, WIDTH), nn.GELU(), Conv1D(WIDTH, 48), nn.Linear(WIDTH, 5))
    layers = [nn.TransformerEncoderLayer(WIDTH, 2, 48, 0.0, batch_first=True) for _ in range(2)]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 5))


def shard(model: nn.Sequential, **options: Any) -> None:
    """As a person does it: the blocks one by one, then what is left."""
    for block in model:
        if any(True for _ in block.parameters()):
            fully_shard(block, **options)
    fully_shard(model, **options)


def batch(step: int, spread: bool) -> tuple[Tensor, Tensor]:
    """Items of a step: all, or every n-th of them."""
    rank, size = dist.get_rank(), dist.get_world_size()
    draw = torch.Generator().manual_seed(step)
    x, y = torch.randn(24, 6, WIDTH, generator=draw), torch.randint(0, 5, (24,), generator=draw)
    return (x[rank::size].contiguous(), y[rank::size]) if spread else (x, y)


def steps(
    model: nn.Module, sparsifier: nmflow.Sparsifier, spread: bool, first: int = 0, last: int = STEPS, micro: int = 1
) -> list[tuple[float, float]]:
    """Train; the mean loss and the gradient norm of every step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)
    curve = []
    for step in range(first, last):
        x, y = batch(step, spread)
        total = torch.zeros(())
        for part in range(micro):
            loss = nn.functional.cross_entropy(model(x[part::micro]).float().mean(1), y[part::micro]) / micro
            loss.backward()
            total += loss.detach()
        sparsifier.edit_gradients()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        sparsifier.step()
        if spread:
            dist.all_reduce(total)
            total /= dist.get_world_size()
        curve.append((float(total), float(whole(norm))))
    return curve


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, spread or not."""
    return full(tensor.detach())


def sparsify(model: nn.Module, recipe: str, options: dict[str, Any], **settings: Any) -> nmflow.Sparsifier:
    targets = settings.pop("targets", {"ff": "1:8", "qkv": "2:4"})
    return nmflow.Sparsifier(model, targets, nmflow.recipe(recipe, **options), total_steps=STEPS, **settings)


def alike(one: nn.Module, two: nn.Module, tolerance: float = 1e-6) -> None:
    """Every parameter of both models, under the same names."""
    expected, found = dict(one.named_parameters()), dict(two.named_parameters())
    assert expected.keys() == found.keys()
    for name, parameter in expected.items():
        torch.testing.assert_close(whole(found[name]), whole(parameter), rtol=0, atol=tolerance)


def train_alike(one: nn.Module, two: nn.Module, first: nmflow.Sparsifier, second: nmflow.Sparsifier) -> None:
    """Train a whole model and a spread one to the end; losses, norms and finalized weights are alike."""
    curve, spread = steps(one, first, False), steps(two, second, True)
    torch.testing.assert_close(torch.tensor(spread), torch.tensor(curve), rtol=0, atol=1e-6)
    first.finalize()
    second.finalize()
    alike(one, two)


def check_recipe(recipe: str, options: dict[str, Any], micro: int = 1, **settings: Any) -> None:
    """Loss, gradient norm, masks, report and finalized weights are those of one process."""
    one, two = build(), build()
    first, second = sparsify(one, recipe, options, **settings), sparsify(two, recipe, options, **settings)
    shard(two)
    if recipe == "snip":  # scored on the same batches everywhere
        for sparsifier in (first, second):
            sparsifier.calibrate(_loss, [batch(7, False), batch(8, False)])
    curve, spread = steps(one, first, False, micro=micro), steps(two, second, True, micro=micro)
    torch.testing.assert_close(torch.tensor(spread), torch.tensor(curve), rtol=0, atol=1e-6)
    assert second.report().to_dict() == first.report().to_dict()
    for (label, bits), (other, others) in zip(
        first.state_dict()["masks"].items(), second.state_dict()["masks"].items(), strict=True
    ):
        assert label == other
        assert torch.equal(bits, others)
    first.finalize()
    second.finalize()
    for use in (nmflow.verify, nmflow.compress):
        with pytest.raises(ValueError, match="spread over processes; gather the weights"):
            use(two)
    alike(one, two)
    assert [type(module).__name__.removeprefix("FSDP") for module in two.modules()] == [
        type(module).__name__ for module in one.modules()
    ]
    for name, parameter in one.named_parameters():
        if name.endswith("linear1.weight") and recipe != "dense":
            assert nmflow.masks.is_nm(whole(dict(two.named_parameters())[name]), "1:8")
            assert nmflow.masks.is_nm(parameter, "1:8")
    x, _ = batch(99, spread=False)
    torch.testing.assert_close(two.eval()(x), one.eval()(x), rtol=0, atol=1e-5)


def check_groups() -> None:
    """Rows that share their columns are scored together where they lie together, which is asked for."""
    targets = {r"re:.*linear1\.weight": "1:8v4", "qkv": "2:4v8"}
    check_recipe("sdgf-stepwise", {"pruned_gradient": "masked"}, targets=targets)
    check_recipe("snip", {}, targets=targets)
    refused = build()
    sparsifier = sparsify(refused, "mdgf-linear", {}, targets={r"re:.*linear1\.weight": "1:8v48"})
    shard(refused)
    step = 48 // dist.get_world_size()
    with pytest.raises(ValueError, match=rf"0\.linear1\.weight: .* every {step} rows .*of 48 rows .*use 1:8v{step},"):
        steps(refused, sparsifier, True, last=1)


def _loss(model: nn.Module, items: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(items[0]).mean(1), items[1])


def check_memory() -> None:
    """Mask and W~ of a process are of the size of its share."""
    model = build()
    sparsifier = sparsify(model, "mdgf-linear", {})
    shard(model)
    steps(model, sparsifier, True, last=1)
    size = dist.get_world_size()
    for effective in sparsifier._effective.values():
        rows = effective.slots[0][1].shape[0]
        assert effective.mask.shape[0] <= -(-rows // size)
        assert effective.effective.shape == effective.mask.shape


def check_convolutions() -> None:
    """Weights [out, in, kernel], whose rows are no view of them; masks that follow from W, and masks that are kept."""
    for recipe, options in (("mdgf-linear", {"pruned_gradient": "decay"}), ("idp", {})):
        models = []
        for _ in range(2):
            torch.manual_seed(0)
            filters = [nn.Conv1d(6, 48, 3, padding=1), nn.GELU(), nn.Conv1d(48, 6, 3, padding=1)]
            models.append(nn.Sequential(*filters, nn.Linear(WIDTH, 5)))
        one, two = models
        first, second = (sparsify(m, recipe, options, targets={"0.weight": "1:3", "2.weight": "1:4"}) for m in models)
        shard(two)
        train_alike(one, two, first, second)


def check_columns() -> None:
    """GPT-2's weights lie the other way round: shards end where blocks do, or this is refused; dim 1 is free."""
    even = WIDTH % dist.get_world_size() == 0
    if even:
        targets = {"0.weight": "1:4", "2.weight": "1:4"}
        one, two = build(columns=True), build(columns=True)
        first, second = (sparsify(m, "mdgf-linear", {}, targets=targets) for m in (one, two))
        shard(two)
        train_alike(one, two, first, second)
    wide = {"0.weight": "1:32", "2.weight": "1:8"}
    refused = build(columns=True)
    sparsifier = sparsify(refused, "mdgf-linear", {}, targets=wide)
    shard(refused)
    with pytest.raises(ValueError, match=r"0\.weight: FSDP2 cuts its reduction axis of 32 into .* which M = 32"):
        steps(refused, sparsifier, True, last=1)
    if not even:  # FSDP2 spreads no other dimension unevenly
        return
    from torch.distributed.tensor import Shard

    along = build(columns=True)
    sparsifier = sparsify(along, "mdgf-linear", {}, targets=wide)
    shard(along, shard_placement_fn=lambda p: Shard(1) if p.dim() == 2 and p.shape[1] % 4 == 0 else Shard(0))
    one = build(columns=True)
    curve = steps(one, sparsify(one, "mdgf-linear", {}, targets=wide), False)
    torch.testing.assert_close(torch.tensor(steps(along, sparsifier, True)), torch.tensor(curve), rtol=0, atol=1e-6)


def check_resume() -> None:
    """The state of a spread run goes on spread, and whole; masks that are kept come along."""
    for recipe, options, settings in (("ste", {}, {"mask_every": 3}), ("idp", {}, {}), ("mdgf-exponential", {}, {})):
        model = build()
        sparsifier = sparsify(model, recipe, options, **settings)
        shard(model)
        steps(model, sparsifier, True, last=4)
        weights = {name: whole(tensor).clone() for name, tensor in model.state_dict().items()}
        state = sparsifier.state_dict()
        expected = steps(model, sparsifier, True, first=4)
        for spread in (False, True):
            again = build()
            again.load_state_dict(weights)
            resumed = sparsify(again, recipe, options, **settings)
            resumed.load_state_dict(state)
            if spread:
                shard(again)
            found = steps(again, resumed, spread, first=4)
            torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=0, atol=1e-6)


def check_attached_afterwards() -> None:
    """A trainer may have spread the model before the sparsifier sees it; NaN in one process's rows stops them all."""
    broken = build()
    shard(broken)
    with torch.no_grad():
        if dist.get_rank() == dist.get_world_size() - 1:
            held(broken[0].linear1.weight)[-1, -1] = torch.nan
    with pytest.raises(ValueError, match=r"0\.linear1\.weight: 1 of its weights are NaN or inf"):
        sparsify(broken, "sr-ste", {})
    one, two = build(), build()
    shard(two)
    first, second = sparsify(one, "sr-ste", {}), sparsify(two, "sr-ste", {})
    train_alike(one, two, first, second)


def check_loaded_anew() -> None:
    """Weights that replace the spread ones, padded shards among them, are made sparse as well."""
    from torch.distributed.tensor import distribute_tensor

    one, two = build(), build()
    first, second = sparsify(one, "mdgf-linear", {"dense": 0.0}), sparsify(two, "mdgf-linear", {"dense": 0.0})
    shard(two)
    steps(one, first, False, last=2)
    steps(two, second, True, last=2)
    torch.manual_seed(5)
    new = {name: torch.randn(whole(tensor).shape) * 0.1 for name, tensor in one.state_dict().items()}
    one.load_state_dict(new)
    spread = {
        name: distribute_tensor(new[name], tensor.device_mesh, tensor.placements)
        for name, tensor in two.state_dict().items()
    }
    two.load_state_dict(spread, assign=True)
    curve, found = steps(one, first, False, first=2), steps(two, second, True, first=2)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(curve), rtol=0, atol=1e-6)


def check_accelerate() -> None:
    """Accelerate's own way into FSDP2, which it opens on GPUs alone; from the meta device as well."""
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    one = build()
    first = sparsify(one, "sr-ste", {})
    curve = steps(one, first, False)
    first.finalize()
    for through_meta in (False, True):
        accelerator = Accelerator(cpu=True)
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, cpu_ram_efficient_loading=through_meta, auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["TransformerEncoderLayer"],
            reshard_after_forward=True,
        )  # fmt: skip
        two = build()
        second = sparsify(two, "sr-ste", {})
        fsdp2_prepare_model(accelerator, two)
        torch.testing.assert_close(torch.tensor(steps(two, second, True)), torch.tensor(curve), rtol=0, atol=1e-6)
        second.finalize()
        alike(one, two)


def check_bf16() -> None:
    """Gathered in bf16, kept in float32; the masks are those of the float32 weights."""
    model = build()
    sparsifier = sparsify(model, "mdgf-exponential", {})
    shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    seen = []
    model[0].linear1.register_forward_hook(lambda module, args, out: seen.append((module.weight.dtype, out.dtype)))
    losses = [loss for loss, _ in steps(model, sparsifier, True)]
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    one = build()
    curve = [loss for loss, _ in steps(one, sparsify(one, "mdgf-exponential", {}), False)]
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(curve), rtol=0.05, atol=0.02)
    sparsifier.finalize()
    assert nmflow.masks.is_nm(whole(model[0].linear1.weight), "1:8")


def check_probes() -> None:
    """Gradient noise is that of whole weights, row slices of fused ones among them, also where rows part unevenly."""
    targets = {"ff": "1:8", "qk": "2:4"}
    one, two = build(), build()
    first, second = (sparsify(m, "sr-ste", {}, targets=targets) for m in (one, two))
    shard(two)
    seen: list[list[dict[str, Any]]] = []
    for model, sparsifier, spread in ((one, first, False), (two, second, True)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)
        probe = nmflow.GradientProbe(sparsifier, optimizer, every=2)
        looks = []
        for step in range(STEPS):
            x, y = batch(step, spread)
            nn.functional.cross_entropy(model(x).mean(1), y).backward()
            sparsifier.edit_gradients()
            probe.before_step()
            optimizer.step()
            optimizer.zero_grad()
            sparsifier.step()
            looks.append(probe.after_step())
        seen.append([look.to_dict() for look in looks if look is not None])
    assert len(seen[0]) == STEPS // 2
    for expected, found in zip(*seen, strict=True):
        for label, figures in expected.pop("layers").items():
            assert found["layers"][label] == pytest.approx(figures, rel=1e-4, abs=0), label
            assert all(value is not None for value in figures.values())
        del found["layers"]
        assert found == pytest.approx(expected, rel=1e-4, abs=0)
    weight = dict(two.named_parameters())["0.linear1.weight"]
    with pytest.raises(ValueError, match="first: a DTensor, of which this process holds a part"):
        nmflow.GradientProbe({"first": weight}, torch.optim.AdamW(two.parameters()))
    early = torch.optim.AdamW(build().parameters())
    with pytest.raises(ValueError, match="make the optimizer after the model is spread"):
        nmflow.GradientProbe(second, early)


def check_refusals() -> None:
    """What would train densely is refused, in words."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallel = nn.Sequential(nn.Linear(32, 32))
    sparsifier = nmflow.Sparsifier(parallel, {"0.weight": "1:8"}, total_steps=4)
    parallelize_module(parallel, mesh, {"0": ColwiseParallel()})
    for use in (lambda: parallel(torch.randn(2, 32)), sparsifier.step, sparsifier.finalize):
        with pytest.raises(ValueError, match="tensor parallel makes it"):
            use()
    offloaded = build()
    sparsifier = sparsify(offloaded, "mdgf-linear", {})
    shard(offloaded, offload_policy=CPUOffloadPolicy(pin_memory=False))
    with pytest.raises(ValueError, match="CPU offloading"):
        steps(offloaded, sparsifier, True, last=1)
    unedited = build()
    sparsifier = sparsify(unedited, "mdgf-linear", {"pruned_gradient": "masked"})
    shard(unedited)
    steps(unedited, sparsifier, True, last=2)
    with pytest.raises(RuntimeError, match="edit_gradients"):
        sparsifier.step()


CHECKS = {
    "recipes": lambda: [
        check_recipe(recipe, options)
        for recipe, options in (
            ("dense", {}), ("mdgf-linear", {}), ("mdgf-exponential", {"pruned_gradient": "decay"}), ("sr-ste", {}),
            ("sdgf-stepwise", {"pruned_gradient": "masked"}), ("sdgf-geometric", {}),
        )
    ],
    "masks": lambda: [check_recipe("ste", {}, mask_every=3), check_recipe("idp", {}), check_recipe("snip", {})],
    "groups": check_groups,
    "accumulation": lambda: check_recipe("mdgf-exponential", {"pruned_gradient": "masked"}, micro=2),
    "memory": check_memory,
    "convolutions": check_convolutions,
    "columns": check_columns,
    "resume": check_resume,
    "afterwards": check_attached_afterwards,
    "anew": check_loaded_anew,
    "accelerate": check_accelerate,
    "bf16": check_bf16,
    "probes": check_probes,
    "refusals": check_refusals,
}


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for name in sys.argv[1:] or CHECKS:
        CHECKS[name]()
        if dist.get_rank() == 0:
            print(name, "agrees", flush=True)
    dist.destroy_process_group()
