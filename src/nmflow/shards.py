"""Which part of a weight this process holds where FSDP2 spreads it, and how W~ is gathered in the place of W.

Every process derives mask and W~ of its own rows, once an optimizer step, and FSDP2 gathers W~ instead of W before a
layer runs. So the masks cost each process its share of the work and W~ its share of the memory, no whole W~ outlives
a layer, and the gradient that comes back belongs to W~. The sharded parameter stays the dense W under its old name.

FSDP2 asks the local tensor of a parameter what to gather (`fsdp_pre_all_gather`). That, and the list of the
parameters it manages, are not in torch's public API; whatever of it is missing is refused, never trained densely.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from nmflow.layout import rows_shape
from nmflow.targets import Slot

_PRE, _POST = "fsdp_pre_all_gather", "fsdp_post_all_gather"


class Part(NamedTuple):
    """What of a slot a process holds; of a weight that is not spread, all of it."""

    local: slice
    """Rows of `to_rows` of the tensor that is held."""
    rows: slice
    """The same rows, counted from the slot's first."""
    columns: slice
    """Entries of the reduction axis."""


def whole(slot: Slot) -> Part:
    """The part of a process that holds the whole weight."""
    start, stop = slot.row_range
    return Part(slice(start, stop), slice(0, stop - start), slice(0, slot.axis))


def is_spread(weight: Tensor) -> bool:
    """True for a DTensor: a weight of which this process sees one part."""
    return type(weight) is not nn.Parameter and hasattr(weight, "device_mesh")


def held(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, to read and to write; all of it where it is not spread."""
    # Not `to_local()`: it gives another object every time, and FSDP2 looks at this one.
    return cast(Tensor, cast(Any, tensor)._local_tensor) if is_spread(tensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor, spread or not. Collective where it is spread."""
    return cast(Tensor, cast(Any, tensor).full_tensor()) if is_spread(tensor) else tensor


class Shard:
    """This process's part of one weight under FSDP2.

    `name` is for errors, `blocks` are the M of every pattern that its recipe passes through. Raises `ValueError`
    where FSDP2 does not hold the weight (tensor parallel), where it spreads it through the blocks or through groups of
    rows that share their columns, and for CPU offloading.
    """

    def __init__(self, module: nn.Module, local_name: str, slots: Sequence[Slot], blocks: Iterable[int]) -> None:
        name = slots[0].name
        self._managed = _managed_by_fsdp(module, local_name, name)
        self._dim = int(self._managed.fsdp_placement.dim)
        self.mesh = self._managed.shard_mesh
        size, rank = self.mesh.size(), self.mesh.get_local_rank()
        full = slots[0].shape
        step = -(-full[self._dim] // size)
        self._start = min(rank * step, full[self._dim])
        self._stop = min(self._start + step, full[self._dim])
        self._step = step
        self._full = full
        self._check(name, slots[0].layout, size, blocks)
        for slot in slots:
            self._check_groups(slot, size)

    def _check(self, name: str, layout: str, size: int, blocks: Iterable[int]) -> None:
        managed, shape = self._managed, self._full
        if managed.offload_to_cpu:
            raise ValueError(f"{name}: FSDP2 with CPU offloading gathers nothing but W; leave CPUOffloadPolicy out")
        if managed.post_forward_mesh_info not in (None, managed.mesh_info):
            raise ValueError(
                f"{name}: reshard_after_forward as a number keeps W in a form that is not made sparse; say True or "
                "False"
            )
        if self._cuts_blocks(layout):
            cut = sorted({m for m in blocks if any(edge % m for edge in range(self._step, self._axis, self._step))})
            if cut:
                raise ValueError(
                    f"{name}: FSDP2 cuts its reduction axis of {self._axis} into {size} parts of {self._step}, which "
                    f"M = {', '.join(map(str, cut))} does not divide; fully_shard(..., shard_placement_fn=...) can "
                    "spread it along the outputs"
                )
        elif self._dim != 0 and not (layout == "columns" and self._dim == 1):
            raise ValueError(f"{name}: FSDP2 spreads dim {self._dim} of {list(shape)}; spread it along dim 0")

    def _check_groups(self, slot: Slot, size: int) -> None:
        """Refuse a group of rows of which one process holds some and another one the rest: neither could score it."""
        if self._cuts_blocks(slot.layout):
            return
        start, stop = slot.row_range
        step = self._step * self._tall(slot)
        cuts = [cut - start for cut in range(step, size * step, step) if start < cut < stop]
        if any(cut % slot.pattern.v for cut in cuts):
            fits = math.gcd(slot.pattern.v, *cuts)
            raise ValueError(
                f"{slot.label}: FSDP2 cuts the weight every {step} rows for {size} processes, through groups of "
                f"{slot.pattern.v} rows that share their columns; use {replace(slot.pattern, v=fits)}, or a number of "
                "processes whose parts are whole groups"
            )

    def _tall(self, slot: Slot) -> int:
        """Rows of `to_rows` for one index of the dimension that is spread."""
        return rows_shape(slot.shape[self._dim + 1 :], "rows")[0] if slot.layout == "rows" else 1

    def _cuts_blocks(self, layout: str) -> bool:
        """True where the dimension that is spread is the reduction axis."""
        return len(self._full) < 2 or (layout == "columns" and self._dim == 0)

    @property
    def _axis(self) -> int:
        return self._full[self._dim]

    def part(self, slot: Slot) -> Part:
        """What of a slot lies here; where that is nothing, slices of length 0."""
        start, stop = slot.row_range
        if self._cuts_blocks(slot.layout):
            return Part(slice(start, stop), slice(0, stop - start), slice(self._start, self._stop))
        tall = self._tall(slot)
        low, high = self._start * tall, self._stop * tall
        first, last = (min(max(row, low), high) for row in (start, stop))
        rows = slice(max(first - start, 0), max(last - start, 0))
        return Part(slice(first - low, last - low), rows, slice(0, slot.axis))

    # -- the weight ----------------------------------------------------------------------------------------------

    @property
    def parameter(self) -> nn.Parameter:
        """The dense W, a DTensor, also while a layer has it gathered."""
        return cast(nn.Parameter, self._managed.sharded_param)

    def empty(self, mine: Tensor) -> tuple[Tensor, Tensor]:
        """A tensor like `mine`, what is held of W, and the one that it is a part of, padded to one size everywhere."""
        padded = mine.new_zeros(self._managed.padded_sharded_param_size)
        return padded.narrow(self._dim, 0, mine.shape[self._dim]), padded

    def gathered(self, mine: Tensor) -> Tensor:
        """The whole of a tensor of which every process holds the part that belongs to its part of W. Collective."""
        from torch.distributed.tensor import DTensor, Shard

        like = torch.empty(self._full, device="meta")
        spread = DTensor.from_local(
            mine.contiguous(), self.mesh, [Shard(self._dim)], run_check=False, shape=like.shape, stride=like.stride()
        )
        return spread.full_tensor()

    # -- gathering -----------------------------------------------------------------------------------------------

    def carry(self, effective: Callable[[], Tensor]) -> None:
        """Let FSDP2 gather what `effective()` gives, padded and in W's dtype, in the place of W."""
        managed = self._managed

        def before(mesh: Any, outer_size: Any, outer_stride: Any, module: Any, mp_policy: Any) -> Any:
            tensor = effective()
            return (tensor.to(mp_policy.param_dtype or tensor.dtype),), None

        def after(outputs: Any, metadata: Any, param_dtype: Any, *, out: Any = None) -> Any:
            # The first time FSDP2 asks for the tensor; later it writes into the same storage.
            return None if out is not None else (outputs[0], ())

        def hook() -> None:
            mine = held(self.parameter)
            if not hasattr(mine, _PRE):
                setattr(mine, _PRE, before)
                setattr(mine, _POST, after)
                managed._init_extensions()

        def reset() -> None:  # FSDP2 calls it wherever the local tensor may have become another one
            type(managed).reset_sharded_param(managed)
            hook()

        hook()
        managed.reset_sharded_param = reset

    @property
    def carries(self) -> bool:
        """True while FSDP2 gathers W~ of this weight."""
        return hasattr(held(self.parameter), _PRE)

    def release(self) -> None:
        """Let FSDP2 gather W again."""
        mine = held(self.parameter)
        for name in (_PRE, _POST):
            if hasattr(mine, name):
                delattr(mine, name)
        self._managed.__dict__.pop("reset_sharded_param", None)


def summed(counts: Tensor, shards: Sequence[Shard | None]) -> Tensor:
    """Row i of `counts` [S, ...], summed over the processes that share weight i. Collective where any is spread."""
    groups: dict[Any, list[int]] = {}
    for place, shard in enumerate(shards):
        if shard is not None:
            groups.setdefault(shard.mesh, []).append(place)
    for mesh, places in groups.items():
        import torch.distributed as dist

        rows = counts[places].contiguous()
        dist.all_reduce(rows, group=mesh.get_group())
        counts[places] = rows
    return counts


def count_all(entries: Tensor, shard: Shard | None) -> int:
    """Non-zero entries of a tensor that lies like W, on all processes together. Collective where W is spread."""
    return int(summed(entries.count_nonzero().view(1), [shard]))


def reshard(model: nn.Module) -> None:
    """Give back what FSDP2 has gathered and kept, so that every parameter is its sharded self again."""
    for module in model.modules():
        if hasattr(module, "set_reshard_after_backward"):  # FSDPModule, without importing it
            cast(Any, module).reshard()


def refuse_spread(model: nn.Module, verb: str) -> None:
    """Raise `ValueError` where this process holds parts of the weights only."""
    name = next((name for name, parameter in model.named_parameters() if is_spread(parameter)), None)
    if name is not None:
        raise ValueError(
            f"{verb}: {name} is spread over processes; gather the weights into an ordinary model first, with "
            "torch.distributed.checkpoint.state_dict.get_model_state_dict and full_state_dict=True (docs/scaling.md)"
        )


def refuse_other_wrappers(model: nn.Module) -> None:
    """Raise `ValueError` for a model that DeepSpeed or FSDP1 has taken over: there the weights are no longer in it."""
    kinds = {kind.__module__.partition(".")[0] for module in model.modules() for kind in type(module).__mro__}
    zero3 = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    if zero3 or "deepspeed" in kinds:
        raise ValueError(
            "the model belongs to DeepSpeed: ZeRO keeps gradients and master weights in buffers of its own, where no "
            "mask, no SR-STE term and no exact resume can reach them; train with DDP or FSDP2 (docs/scaling.md)"
        )
    if any(kind.__name__ == "FullyShardedDataParallel" for module in model.modules() for kind in type(module).__mro__):
        raise ValueError(
            "the model is wrapped in FSDP1, which flattens weights so that their rows are lost; use "
            "torch.distributed.fsdp.fully_shard (docs/scaling.md)"
        )


def _managed_by_fsdp(module: nn.Module, local_name: str, name: str) -> Any:
    """FSDP2's record of one parameter. Raises `ValueError` where there is none."""
    for record in _fsdp_records():
        info = record._module_info
        owners = [(info.module, info.param_name), *zip(info.shared_modules, info.shared_param_names, strict=True)]
        if any(owner is module and owned == local_name for owner, owned in owners):
            if getattr(record, "is_dtensor", False):
                break
            return record
    raise ValueError(
        f"{name}: a DTensor that FSDP2 alone does not hold, as tensor parallel makes it; its layers would compute "
        "with the dense weight. Tensor parallel is not supported: spread the model with fully_shard only"
    )


def _fsdp_records() -> Iterable[Any]:
    try:
        from torch.distributed._composable_state import _module_state_mapping
    except ImportError as error:
        raise ValueError(f"this torch ({torch.__version__}) does not say which weights FSDP2 holds") from error
    for reference in list(_module_state_mapping.values()):
        state = reference()
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        for group in groups:
            yield from group.fsdp_params if group is not None else ()
