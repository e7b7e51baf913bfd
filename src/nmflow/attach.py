"""How a weight is made sparse while training: a property hands every reader of `module.weight` the effective W~.

The only file that rewires a module. The module's class becomes a derived one whose property reads W~; the dense W
stays the `nn.Parameter` under its old name, so optimizers, state dicts and averages see what they always saw.
W~ is computed once an optimizer step into a buffer; a read costs one autograd node that routes the gradient to W.

Neither buffer nor mask is a registered buffer: they follow from (W, stage), so checkpoints keep the dense keys,
DDP has nothing to broadcast, and an average of models averages only W. Where FSDP2 spreads W, mask and W~ are those of
this process's rows, and what a layer reads is the W~ that was gathered (`nmflow.shards`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from nmflow.layout import Layout, rows_in_place, rows_shape, to_rows, write_back
from nmflow.masks import Remainder
from nmflow.ops import apply_mask, as_stored, project
from nmflow.schedules.stage import Stage
from nmflow.shards import Part, Shard, held, is_spread, whole
from nmflow.targets import Slot

_EFFECTIVE = "_nm_effective"


class Progress:
    """Where in its recipe a run is: one stage a slot. Shared by a model and its deep copies.

    That is what makes an averaged model (EMA) sparse: it keeps its own W, mask and W~, but follows the run's stage.
    """

    def __init__(self, stages: Sequence[Stage], carries_masks: bool = False) -> None:
        self.stages = list(stages)
        self.serial = 0  # changes with every step, so that copies notice
        self.carries_masks = carries_masks  # mask_every > 1
        self.resumed = False  # since the last step a state was loaded: its masks stay if weights are loaded after it
        self.fixed: dict[int, Tensor] = {}  # slot -> mask that does not follow from W (frozen, inherited)

    def __deepcopy__(self, memo: dict[int, Any]) -> Progress:
        return self


class _Seen(NamedTuple):
    """What W~ was derived from; any difference means it is stale."""

    weight: Tensor
    version: int
    address: int  # `.data` may be replaced without a trace in the version
    serial: int
    effective_version: int


class EffectiveWeight:
    """W~ of one parameter, kept in a buffer and derived anew whenever W or the stage has changed.

        W~ = W ⊙ C,    C = Φ + D·(Φ_outer - Φ),    one (Φ, D, Φ_outer) per slot; rows of no slot have C = 1

    Written with `where`, so a pruned NaN or inf is 0. Tied parameters share one object.
    Source: Bambhaniya et al. 2025, section 3.
    """

    def __init__(
        self,
        slots: Sequence[tuple[int, Slot]],
        progress: Progress,
        remainder: Remainder,
        gradient: str,
        blocks: frozenset[int] = frozenset(),
    ) -> None:
        self.slots = tuple(slots)
        self.progress = progress
        self.remainder: Remainder = remainder
        self.gradient = gradient  # "straight-through", "decay", "masked", or "mixed" where stages differ
        self.flips: dict[int, Tensor | int] = {}  # slot -> entries of Φ changed by the last step, on the device
        self.mask: Tensor = torch.empty(0, dtype=torch.bool)
        self.effective: Tensor = torch.empty(0)
        self.coefficient: Tensor | None = None  # dL/dW over dL/dW~; None passes the gradient through
        self.blocks = blocks  # M of every pattern that the recipe passes through
        self.shard: Shard | None = None
        self._padded: Tensor = torch.empty(0)  # what FSDP2 gathers: W~ of this process, as long as everybody's
        self._gathered = -1  # serial of the W~ that was gathered last
        self._seen: _Seen | None = None
        self.is_copy = False

    # -- where W lies ----------------------------------------------------------------------------------------------

    def dense(self, module: nn.Module, name: str) -> nn.Parameter | None:
        """The dense W behind `module.NAME`; under FSDP2 the spread one, also while a layer has it gathered.

        Raises `ValueError` where W is spread in a way that cannot be followed (see `Shard`).
        """
        weight = module._parameters[name]
        if weight is not None and is_spread(weight):
            self._follow(module, name)
            return weight
        return weight if self.shard is None else self.shard.parameter

    def part(self, slot: Slot) -> Part:
        """What of a slot this process holds."""
        return whole(slot) if self.shard is None else self.shard.part(slot)

    def rows(self, tensor: Tensor, slot: Slot) -> Tensor:
        """Rows [R, K] of a slot in a tensor that lies like W (W, its gradient, a mask): those held here."""
        return to_rows(held(tensor), slot.layout)[self.part(slot).local]

    def write_rows(self, tensor: Tensor, slot: Slot, values_RK: Tensor) -> None:
        """Write rows [R, K] of a slot, those held here, into a tensor that lies like W."""
        tensor = held(tensor)
        rows = to_rows(tensor, slot.layout)
        rows[self.part(slot).local] = values_RK
        write_back(rows, tensor, slot.layout)

    def _follow(self, module: nn.Module, name: str) -> None:
        """Notice that FSDP2 has spread W, and let it gather W~ in W's place."""
        if self.shard is not None and self.shard.carries:
            return
        try:
            if self.shard is None:
                self.shard = Shard(module, name, [slot for _, slot in self.slots], self.blocks)
                self._keep_part()
            self.shard.carry(self._to_gather)
        except AttributeError as error:  # would make nn.Module hand out the dense weight in silence
            raise RuntimeError(
                f"{self.slots[0][1].name}: this torch ({torch.__version__}) keeps what FSDP2 spreads in another way "
                f"than is known here: {error}"
            ) from error

    def _keep_part(self) -> None:
        """Of masks that do not follow from W, keep the part that belongs to this process."""
        shape = held(cast(Shard, self.shard).parameter).shape
        mine = torch.ones(shape, dtype=torch.bool, device=self.mask.device)
        for index, slot in self.slots:
            part = self.part(slot)
            if index in self.progress.fixed:
                self.progress.fixed[index] = self.progress.fixed[index][part.rows, part.columns].clone()
            if self.mask.shape == slot.shape:
                of_slot = to_rows(self.mask, slot.layout)[slice(*slot.row_range)]
                self.write_rows(mine, slot, of_slot[part.rows, part.columns])
        self.mask, self.effective, self._seen = mine, torch.empty(0), None

    def _to_gather(self) -> Tensor:
        self._notice_changes(cast(Shard, self.shard).parameter)
        self._gathered = self.progress.serial
        return self._padded

    # -- reading -------------------------------------------------------------------------------------------------

    def read(self, weight: Tensor) -> Tensor:
        """W~ as a reader of `module.weight` gets it."""
        if self.shard is not None:
            return self._as_gathered(weight)
        # A compiled graph cannot look at versions; there the step, `load_state_dict` and `refresh` keep W~ current.
        # No step derives a copy: it looks between two graphs.
        if not torch.compiler.is_compiling():
            self._notice_changes(weight)
        elif self.is_copy and torch.compiler.is_dynamo_compiling():
            self._notice_outside_graphs(weight)
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return self.effective
        if self.coefficient is None:
            return cast(Tensor, _PassThrough.apply(weight, self.effective))
        return cast(Tensor, _Scaled.apply(weight, self.effective, self.coefficient))

    def _as_gathered(self, weight: Tensor) -> Tensor:
        """What FSDP2 gathered is W~ already, and its gradient goes where W~ came from."""
        if not (torch.compiler.is_compiling() or (self._gathered == self.progress.serial and self.shard.carries)):  # type: ignore[union-attr]  # the caller has looked
            raise RuntimeError(
                f"{self.slots[0][1].name}: the weight that FSDP2 has gathered is of an earlier step; call reshard() of "
                "the module that fully_shard made, which gathers it anew"
            )
        return weight

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch does not annotate it
    def _notice_outside_graphs(self, weight: Tensor) -> None:
        self._notice_changes(weight)

    def _notice_changes(self, weight: Tensor) -> None:
        seen = self._seen
        if seen is not None and self.effective._version != seen.effective_version:
            raise RuntimeError(
                f"{self.slots[0][1].name}: the effective weight was written in place, and the write would be lost "
                "at the next step; write to the dense one: sparsifier.dense_weight(name), or the module's "
                "_parameters"
            )
        if self.is_stale(weight):
            try:
                self.derive(weight, new_masks=not self.keeps_masks)
            except AttributeError as error:  # would make nn.Module hand out the dense weight in silence
                raise RuntimeError(f"deriving the effective weight failed: {error}") from error

    @property
    def keeps_masks(self) -> bool:
        """True where a change of W alone takes no new mask."""
        return self.progress.carries_masks and not self.is_copy

    def is_stale(self, weight: Tensor) -> bool:
        """True where W~ was derived from other weights, or in another stage."""
        seen = self._seen
        return (
            seen is None
            or seen.weight is not weight
            or seen.version != _version(weight)
            or seen.address != held(weight).data_ptr()
            or seen.serial != self.progress.serial
            or not _alike(self.effective, held(weight))
        )

    # -- deriving ------------------------------------------------------------------------------------------------

    def derive(self, weight: Tensor, new_masks: bool = True) -> None:
        """Compute mask, W~ and gradient coefficient from the dense weight and the current stages."""
        mine = held(weight)
        if mine.is_meta:  # on its way to another device, or to several; masks that do not follow from W stay
            self.effective, self._seen = torch.empty(0), None
            return
        with torch.inference_mode(False), torch.no_grad():
            new_masks = self._allocate(mine) or new_masks
            layout = self.slots[0][1].layout
            own = self._own_coefficient()
            buffers = [self.mask, self.effective] if own is None else [self.mask, self.effective, own]
            w, mask, effective, *factors = _rows_of([mine.detach(), *buffers], layout)
            if sum(stop - start for start, stop in (slot.row_range for _, slot in self.slots)) < self._height():
                effective.copy_(w)
            for index, slot in self.slots:
                rows = self.part(slot).local
                stage = self.progress.stages[index]
                self._derive_rows(index, stage, w[rows], mask[rows], effective[rows], new_masks)
                for factor in factors:
                    factor[rows] = _gradient_coefficient(stage, mask[rows], self._outer(stage, w[rows]))
            for written, buffer in zip([mask, effective, *factors], buffers, strict=True):
                write_back(written, buffer, layout)
        self._seen = _Seen(
            weight, _version(weight), mine.data_ptr(), self.progress.serial, self.effective._version
        )

    def _derive_rows(
        self, index: int, stage: Stage, w: Tensor, mask: Tensor, effective: Tensor, new_masks: bool
    ) -> None:
        """The rows of one slot, [R, K] or of a convolution [R, C, T]."""
        self.flips.pop(index, None)
        fixed = self.progress.fixed.get(index)
        if (stage.pattern.is_dense and stage.outer.is_dense) or (stage.mask != "fresh" and fixed is None):
            mask.fill_(True)
            effective.copy_(w)
            return
        if stage.mask != "fresh":
            kept = as_stored(cast(Tensor, fixed), mask)
            self.flips[index] = (mask != kept).sum()
            mask.copy_(kept)
        elif new_masks:
            self.flips[index] = project(w, stage.pattern, stage.decay, self.remainder, mask, effective)
            if stage.outer.is_dense:
                return
        apply_mask(w, mask, stage.decay, effective, self._outer(stage, w))

    def _outer(self, stage: Stage, w: Tensor) -> Tensor | None:
        """Φ_outer of a recipe in sequence, None where it is all ones or D makes it irrelevant."""
        if stage.outer.is_dense or stage.decay == 0.0:
            return None
        outer = torch.zeros_like(w, dtype=torch.bool)
        project(w, stage.outer, 0.0, self.remainder, outer, torch.empty_like(w))
        return outer

    def _height(self) -> int:
        """Rows of the whole parameter."""
        slot = self.slots[0][1]
        return rows_shape(slot.shape, slot.layout)[0]

    def _allocate(self, weight: Tensor) -> bool:
        """Make buffers that fit the weight; True if there was no mask to go by."""
        if _alike(self.effective, weight):
            return False
        moved = self.mask.shape == weight.shape  # another device or dtype: the mask still stands
        if self.shard is None:
            self.effective = torch.empty_like(weight)
        else:
            self.effective, self._padded = self.shard.empty(weight)
        self.mask = self.mask.to(weight.device) if moved else torch.ones_like(weight, dtype=torch.bool)
        if self.gradient == "masked":
            self.coefficient = self.mask
        elif self.gradient != "straight-through":
            self.coefficient = torch.ones_like(weight)
        return not moved

    def _own_coefficient(self) -> Tensor | None:
        return None if self.coefficient is self.mask else self.coefficient

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_seen": None}  # a copy or pickle looks at its own weight before it trusts W~

    def __deepcopy__(self, memo: dict[int, Any]) -> EffectiveWeight:
        copy = object.__new__(EffectiveWeight)
        memo[id(self)] = copy
        copy.__dict__.update(self.__getstate__(), is_copy=True, flips=dict(self.flips))
        copy.mask, copy.effective = self.mask.clone(), self.effective.clone()
        if self.coefficient is not None:
            own = self._own_coefficient()
            copy.coefficient = copy.mask if own is None else own.clone()
        return copy


def _rows_of(tensors: Sequence[Tensor], layout: Layout) -> list[Tensor]:
    """The rows of tensors that lie alike: views where possible, else copies, [R, K], to be written back."""
    found = [rows_in_place(tensor, layout) for tensor in tensors]
    in_place = [rows for rows in found if rows is not None]
    if len(in_place) == len(found) and len({rows.dim() for rows in in_place}) == 1:
        return in_place
    return [to_rows(tensor, layout) for tensor in tensors]


def _gradient_coefficient(stage: Stage, mask: Tensor, outer: Tensor | None) -> Tensor | float:
    """dL/dW over dL/dW~ at every entry: 1 where kept; 1, D (in Φ_outer) or 0 where pruned."""
    if stage.pruned_gradient == "straight-through":
        return 1.0
    if stage.pruned_gradient == "masked" or stage.decay == 0.0:
        return mask
    pruned = stage.decay if outer is None else stage.decay * outer
    return torch.where(mask, 1.0, pruned)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # inference tensors keep no count


def _alike(buffer: Tensor, weight: Tensor) -> bool:
    return buffer.shape == weight.shape and buffer.dtype == weight.dtype and buffer.device == weight.device


class _PassThrough(torch.autograd.Function):
    """W~ in the forward, dL/dW = dL/dW~ in the backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, effective: Tensor) -> Tensor:
        return effective.view_as(effective)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


class _Scaled(torch.autograd.Function):
    """W~ in the forward, dL/dW = C·dL/dW~ in the backward; where C is 0 the gradient is, whatever it was."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, effective: Tensor, coefficient: Tensor) -> Tensor:
        return effective.view_as(effective)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (coefficient,) = ctx.saved_tensors
        return torch.where(coefficient != 0, grads[0] * coefficient, 0), None, None


# -- the derived classes -----------------------------------------------------------------------------------------


class _Attached(nn.Module):
    """What a module gains while attached; mixed in before its own class."""

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        # `.to()` may swap data, or its order in memory, without a trace in the version count.
        result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # not annotated
        for effective in self.__dict__[_EFFECTIVE].values():
            effective.effective = torch.empty(0)
        _derive_all(self, new_masks=False)
        return result

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        for name, effective in self.__dict__[_EFFECTIVE].items():
            weight = effective.dense(self, name)
            if weight is not None and effective.is_stale(weight):  # a state need not have every weight
                keeps = effective.progress.resumed and effective.keeps_masks
                effective.derive(weight, new_masks=not keeps)

    def __reduce_ex__(self, protocol: Any) -> Any:
        base = type(self).__mro__[2]
        return _rebuild, (base, tuple(self.__dict__[_EFFECTIVE])), self.__dict__

    def extra_repr(self) -> str:
        effective: dict[str, EffectiveWeight] = self.__dict__[_EFFECTIVE]
        targets = {str(slot.pattern) for weight in effective.values() for _, slot in weight.slots}
        return ", ".join(filter(None, [super().extra_repr(), f"nm={'+'.join(sorted(targets))}"]))


def _reader(name: str) -> property:
    def read(module: nn.Module) -> Tensor:
        weight = cast(Tensor, module._parameters[name])
        effective: EffectiveWeight = module.__dict__[_EFFECTIVE][name]
        if is_spread(weight):  # between two layers, or before the first step: nobody computes with it
            return cast(Tensor, effective.dense(module, name))
        return effective.read(weight)

    return property(read, doc=f"The effective weight W~ of `{name}`; the dense W is the parameter of that name.")


_CLASSES: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}


def _derived_class(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """One class per (class, names), so that equal modules share compiled code. It holds no state."""
    if (base, names) not in _CLASSES:
        readers = {name: _reader(name) for name in names}
        _CLASSES[base, names] = type(f"NM{base.__name__}", (_Attached, base), readers)
    return _CLASSES[base, names]


def _own_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class as it would be had nothing been attached, also where another (FSDP2's) was derived from ours."""
    if _Attached in cls.__bases__:
        return cast("type[nn.Module]", cls.__bases__[1])
    if cls not in _OWN_CLASSES:
        bases = tuple(_own_class(base) if issubclass(base, _Attached) else base for base in cls.__bases__)
        body = {key: value for key, value in vars(cls).items() if key not in ("__dict__", "__weakref__")}
        _OWN_CLASSES[cls] = type(cls.__name__.replace("NM", "", 1), bases, body)
    return _OWN_CLASSES[cls]


_OWN_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def _rebuild(base: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    cls = _derived_class(base, names)
    return cls.__new__(cls)


def _derive_all(module: nn.Module, new_masks: bool) -> None:
    for name, effective in module.__dict__[_EFFECTIVE].items():
        weight = effective.dense(module, name)
        if weight is not None:
            effective.derive(weight, new_masks=new_masks or not effective.keeps_masks)


# -- what the sparsifier calls -----------------------------------------------------------------------------------


def attach(model: nn.Module, weights: dict[str, EffectiveWeight]) -> None:
    """Make every reader of the named parameters see their effective weights; tied modules share one.

    `weights` maps a parameter's first name to its effective weight. Names must exist; nothing is checked here.
    """
    by_parameter = {id(model.get_parameter(name)): effective for name, effective in weights.items()}
    for module in model.modules():
        mine = {
            local: by_parameter[id(parameter)]
            for local, parameter in module._parameters.items()
            if parameter is not None and id(parameter) in by_parameter
        }
        if mine:
            module.__dict__[_EFFECTIVE] = mine
            module.__class__ = _derived_class(type(module), tuple(mine))


def detach(model: nn.Module) -> None:
    """Give every attached module its own class back; the parameters stay as they are."""
    for module in list(attached_modules(model)):
        module.__class__ = _own_class(type(module))
        for effective in module.__dict__.pop(_EFFECTIVE).values():
            if effective.shard is not None:
                effective.shard.release()


def attached_modules(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of `model` (itself included) whose weights are effective ones."""
    return (module for module in model.modules() if isinstance(module, _Attached))


def attached_weights(model: nn.Module) -> dict[str, tuple[nn.Parameter, EffectiveWeight]]:
    """Qualified name -> (dense W, its effective weight), tied parameters once."""
    found: dict[str, tuple[nn.Parameter, EffectiveWeight]] = {}
    done: set[int] = set()
    for path, module in model.named_modules():
        if not isinstance(module, _Attached):
            continue
        for local, effective in module.__dict__[_EFFECTIVE].items():
            weight = effective.dense(module, local)
            if weight is not None and id(weight) not in done:
                done.add(id(weight))
                found[f"{path}.{local}" if path else local] = (weight, effective)
    return found


def refresh(model: nn.Module) -> None:
    """Derive W~ of every attached weight of `model` anew, masks included, from its dense weights now.

    Needed where a change cannot be noticed: a write into `.data`, or before a compiled model is called on
    weights that were changed from outside. A model without a sparsifier is left alone.
    """
    for weight, effective in attached_weights(model).values():
        effective.derive(weight, new_masks=True)
