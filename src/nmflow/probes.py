"""How noisy gradients are while a network becomes sparse: what is measured of every layer, and how it is averaged."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn, optim

from nmflow.attach import EffectiveWeight, attached_weights
from nmflow.moments import Moments, Sums, joined, read, sums
from nmflow.shards import Shard, held, is_spread, summed
from nmflow.sparsifier import Sparsifier
from nmflow.targets import Slot

QUANTITIES = ("grad_abs_var", "second_moment_var", "flip_rate")
"""What is measured, by the names that stand in metrics.jsonl; the running average of each is NAME_average."""

_MOMENT = "exp_avg_sq"
_KEEPS_IT = (optim.Adam, optim.AdamW, optim.NAdam, optim.RAdam, optim.SparseAdam)


@dataclass(frozen=True)
class NoiseFigures:
    """What one look saw of a layer, or of all layers together, and the running averages with it.

    None where there was nothing to see: no gradient, no second moment yet, no mask, or a number that is NaN or inf.
    """

    grad_abs_var: float | None
    """Var(abs(g)), g = dL/dW of the dense weight."""
    second_moment_var: float | None
    """Var(v), v Adam's second moment after the step."""
    flip_rate: float | None
    """Part of the entries of Φ that the step changed, 0..1."""
    grad_abs_var_average: float | None
    second_moment_var_average: float | None
    flip_rate_average: float | None


@dataclass(frozen=True)
class GradientNoise:
    """One look of a `GradientProbe`."""

    step: int
    """Optimizer steps done."""
    pooled: NoiseFigures
    """Over the entries of all layers, taken as one set."""
    layers: Mapping[str, NoiseFigures]
    """By slot label or by the name that was given."""

    def line(self) -> dict[str, Any]:
        """The pooled figures in one line of a log."""
        return {"step": self.step, **asdict(self.pooled)}

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON: the line, and the same figures of every layer under "layers"."""
        return {**self.line(), "layers": {label: asdict(figures) for label, figures in self.layers.items()}}


class GradientProbe:
    """Looks, every `every` optimizer steps, at the noise in the gradients of the sparse weights.

        probe = nmflow.GradientProbe(sparsifier, optimizer, every=10)
        for step in range(total_steps):
            loss(model, batch).backward()
            sparsifier.edit_gradients()
            probe.before_step()                    # after edit_gradients, before clipping
            optimizer.step(); optimizer.zero_grad()
            sparsifier.step()
            noise = probe.after_step()             # every tenth time a `GradientNoise`, else None

        Var(x) = Σ (x - x̄)² / n,    x = abs(g) before the step, x = v after it

    over the n entries of a slot, and over those of all slots as one set (`pooled`), so that layers of different
    means count as noise too; slots without a gradient are left out of that. g is what lies in `.grad` when
    `before_step` is called. Call it before clipping: clipping divides a step's gradients by their norm, which is
    large where they are noisy, and would hide what is looked for. (Clipped, Var(abs(g)) is min(1, clip/norm)² of it.)
    The flip rate is that of the step itself: with `mask_every` > 1 it is 0 at steps that take no new mask.

    The running average A of each figure is exponential, and a plain mean of the first 1/(1 - β) looks:

        A_i = β_i·A_{i-1} + (1 - β_i)·x_i,    β_i = min(β, (i - 1)/i),    β = `smoothing`

    i counts the looks that saw the figure. `weights` is a `Sparsifier` (with the recipe "dense" for a baseline on
    the same layers) or named parameters, `{"fc1": model.fc1.weight}`, which have no flips. Nothing is written to
    model, gradients or optimizer. Under FSDP2 the figures are those of whole weights, and a look is collective.

    Raises one `ValueError` listing every problem: an optimizer without second moments (`exp_avg_sq`; inside
    Accelerate's wrapper too), weights that it does not train, parameters that are spread over processes and were
    given by name. Source: Bambhaniya et al. 2025, section 4 and figure 3.
    """

    def __init__(
        self,
        weights: Sparsifier | Mapping[str, nn.Parameter] | Iterable[tuple[str, nn.Parameter]],
        optimizer: optim.Optimizer,
        every: int = 10,
        smoothing: float = 0.9,
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every is a number of optimizer steps, 1 or more, not {every!r}")
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing is the part of an average that stays, 0 <= β < 1, not {smoothing!r}")
        if isinstance(weights, nn.Module):
            raise ValueError("the probe was given a module; give it the parameters: dict(module.named_parameters())")
        self.every = every
        self.smoothing = float(smoothing)
        self.step = 0
        """Optimizer steps done, the one that is being taken included."""
        self._sparsifier = weights if isinstance(weights, Sparsifier) else None
        self._parameters = {} if isinstance(weights, Sparsifier) else dict(weights)
        self._optimizer = _unwrapped(optimizer)
        self._labels = tuple(self._parameters)
        if self._sparsifier is not None:
            self._labels = tuple(slot.label for slot in self._sparsifier.slots)
        problems = [*self._misnamed(), *_lacking(self._optimizer)]
        if not problems:
            problems = self._not_trained(self._layers())
        if problems:
            raise ValueError("\n".join(problems))
        self._pooled: _Averages = {}
        self._averages: dict[str, _Averages] = {label: {} for label in self._labels}
        self._open = False  # between before_step and after_step
        self._before = 0  # `step` before the one that is open
        self._seen: list[tuple[_Layer, Sums]] | None = None

    # -- looking -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def before_step(self, n: int | None = None) -> None:
        """Look at the gradients, where this step is due; `n` = optimizer steps done once this one is taken.

        Without `n` the calls are counted. Raises `ValueError` for an `n` that goes back, `RuntimeError` where
        `after_step` was left out or the sparsifier is finalized.
        """
        step = self.step + 1 if n is None else n
        if isinstance(step, bool) or not isinstance(step, int):
            raise TypeError(f"n is a number of optimizer steps, not {n!r}")
        if step < self.step:
            raise ValueError(f"step {step} lies before step {self.step}; load_state_dict rewinds a probe")
        if self._open:
            raise RuntimeError("before_step was called twice; call after_step() after every optimizer.step()")
        seen = None
        if step % self.every == 0:
            layers = self._layers()
            problems = self._not_trained(layers)
            if problems:
                raise RuntimeError("\n".join(problems))
            seen = [(layer, sums(layer.entries(layer.weight.grad), magnitudes=True)) for layer in layers]
        self._before, self.step, self._seen, self._open = self.step, step, seen, True

    @torch.no_grad()
    def after_step(self) -> GradientNoise | None:
        """Look at second moments and masks, and give what was measured; None where this step was not due.

        After `optimizer.step()` and `sparsifier.step()`. Raises `RuntimeError` without `before_step`, and
        `ValueError` where the optimizer turns out to keep no `exp_avg_sq`.
        """
        if not self._open:
            raise RuntimeError("after_step was called without before_step(), which looks at the gradients of the step")
        seen, self._seen, self._open = self._seen, None, False
        if seen is None:
            return None
        layers = [layer for layer, _ in seen]
        both = [(gradient, sums(layer.entries(self._second_moment(layer)))) for layer, gradient in seen]
        moments, flips = _whole(layers, both, [layer.flips() for layer in layers])
        found = [
            _values([each if each.size == layer.size else None for each in of_layer], flipped, layer.size)
            for layer, of_layer, flipped in zip(layers, moments, flips, strict=True)
        ]
        together = [
            joined(each for layer, each in zip(layers, of_kind, strict=True) if each.size == layer.size)
            for of_kind in zip(*moments, strict=True)
        ]
        flipped = None if self._sparsifier is None else sum(each for each in flips if each is not None)
        pooled = _values(together, flipped, sum(layer.size for layer in layers))
        return GradientNoise(
            self.step,
            self._figures(self._pooled, pooled),
            {
                layer.label: self._figures(self._averages[layer.label], values)
                for layer, values in zip(layers, found, strict=True)
            },
        )

    def _figures(self, averages: _Averages, values: Sequence[float | None]) -> NoiseFigures:
        """Take values into their running averages."""
        for name, value in zip(QUANTITIES, values, strict=True):
            if value is not None:
                averages[name] = averages.get(name, _Average(0.0, 0)).taking(value, self.smoothing)
        return NoiseFigures(*values, *(averages[name].value if name in averages else None for name in QUANTITIES))

    # -- what is looked at ---------------------------------------------------------------------------------------

    def _layers(self) -> list[_Layer]:
        """The weights as they lie now: FSDP2 may have spread them since the last look."""
        if self._sparsifier is None:
            return [_Layer(name, weight, weight.numel()) for name, weight in self._parameters.items()]
        found = {
            place: _Layer(slot.label, weight, slot.weights, effective, place, slot)
            for weight, effective in attached_weights(self._sparsifier.model).values()
            for place, slot in effective.slots
        }
        if len(found) != len(self._sparsifier.slots):
            raise RuntimeError("the model carries no sparse weights of this run; a probe ends where finalize begins")
        return [found[place] for place in range(len(found))]

    def _second_moment(self, layer: _Layer) -> Tensor | None:
        """v of a weight; None before its first step."""
        state = self._optimizer.state.get(layer.weight)  # `state[...]` would make an entry
        if not state:
            return None
        if _MOMENT not in state:
            raise ValueError(_no_second_moment(self._optimizer))
        return cast(Tensor, state[_MOMENT])

    def _misnamed(self) -> Iterator[str]:
        if self._sparsifier is None and not self._parameters:
            yield "no parameters to look at"
        first: dict[int, str] = {}
        for name, weight in self._parameters.items():
            if is_spread(weight):
                yield (
                    f"{name}: a DTensor, of which this process holds a part; give the probe a Sparsifier, which knows "
                    'the whole (recipe "dense" for a network that stays dense)'
                )
            if first.setdefault(id(weight), name) != name:
                yield f"{name}: the same parameter as {first[id(weight)]}; name it once"

    def _not_trained(self, layers: Iterable[_Layer]) -> list[str]:
        trained = {id(weight) for group in self._optimizer.param_groups for weight in group["params"]}
        lost = dict.fromkeys(layer.label for layer in layers if id(layer.weight) not in trained)
        return [
            f"{label}: not among the optimizer's parameters; make the optimizer after the model is spread or moved, "
            "and the probe after the optimizer"
            for label in lost
        ]

    # -- saving --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The running averages as plain data; JSON gives their bits back. A look that is under way is left out."""
        layers = {label: _to_json(averages) for label, averages in self._averages.items()}
        step = self._before if self._open else self.step
        return {**self._identity(), "step": step, "pooled": _to_json(self._pooled), "layers": layers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken. Raises `ValueError` naming what differs, before any change."""
        problems = self.problems(state)
        if problems:
            raise ValueError("this state belongs to another probe:\n" + "\n".join(problems))
        self.step, self._open, self._seen = state["step"], False, None
        self._pooled = _from_json(state["pooled"])
        self._averages = {label: _from_json(state["layers"][label]) for label in self._labels}

    def problems(self, state: Any) -> list[str]:
        """Why `load_state_dict` would refuse a state."""
        mine = self._identity()
        keys = state if isinstance(state, Mapping) else ()
        missing = [key for key in (*mine, "step", "pooled", "layers") if key not in keys]
        if missing:
            return [f"not a probe's state: it lacks {', '.join(missing)}"]
        found = [
            f"{key}: the state has {state[key]!r}, this probe {value!r}"
            for key, value in mine.items()
            if state[key] != value
        ]
        step, layers = state["step"], state["layers"]
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            found.append(f"step: {step!r} is no number of steps")
        if not isinstance(layers, Mapping):
            return [*found, "layers: no mapping"]
        found += [f"{label}: the state has no averages of it" for label in self._labels if label not in layers]
        found += [f"{label}: no layer of this probe" for label in layers if label not in self._averages]
        return found + [
            f"{label}: {averages!r} are no running averages"
            for label, averages in (("pooled", state["pooled"]), *layers.items())
            if not _are_averages(averages)
        ]

    def _identity(self) -> dict[str, Any]:
        return {"format": 1, "every": self.every, "smoothing": self.smoothing}


# -- averages ----------------------------------------------------------------------------------------------------


class _Average(NamedTuple):
    value: float
    looks: int

    def taking(self, value: float, smoothing: float) -> _Average:
        part = max(1.0 - smoothing, 1.0 / (self.looks + 1))  # 1 - β_i
        return _Average(self.value + part * (value - self.value), self.looks + 1)


_Averages = dict[str, _Average]


def _to_json(averages: _Averages) -> dict[str, list[float]]:
    return {name: list(average) for name, average in averages.items()}


def _from_json(stored: Mapping[str, Sequence[Any]]) -> _Averages:
    return {name: _Average(float(value), int(looks)) for name, (value, looks) in stored.items()}


def _are_averages(stored: Any) -> bool:
    return isinstance(stored, Mapping) and all(
        name in QUANTITIES
        and isinstance(pair, Sequence)
        and len(pair) == 2
        and isinstance(pair[0], int | float)
        and math.isfinite(pair[0])
        and isinstance(pair[1], int)
        and pair[1] >= 1
        for name, pair in stored.items()
    )


# -- optimizers --------------------------------------------------------------------------------------------------


def _unwrapped(optimizer: Any) -> optim.Optimizer:
    """The optimizer inside those that hold one: Accelerate's, Lightning's."""
    while isinstance(getattr(optimizer, "optimizer", None), optim.Optimizer):
        optimizer = optimizer.optimizer
    return cast(optim.Optimizer, optimizer)


def _lacking(optimizer: object) -> list[str]:
    """Why this optimizer has no second moment to look at. One that torch does not know shows it at its first step."""
    if not isinstance(optimizer, optim.Optimizer):
        return [f"{type(optimizer).__name__} is no optimizer of torch; give the one whose step() the loop calls"]
    own = next(kind for kind in type(optimizer).__mro__ if kind.__module__.startswith("torch.optim"))
    known = own is not optim.Optimizer and not issubclass(own, _KEEPS_IT)
    shown = any(state and _MOMENT not in state for state in optimizer.state.values())
    return [_no_second_moment(optimizer)] if known or shown else []


def _no_second_moment(optimizer: optim.Optimizer) -> str:
    name = type(optimizer).__name__
    return f'{name} keeps no second moment ("{_MOMENT}"); gradient noise is probed with Adam or AdamW'


# -- layers ------------------------------------------------------------------------------------------------------


class _Layer(NamedTuple):
    """One weight, or one row slice of it, as it lies at one step."""

    label: str
    weight: nn.Parameter
    size: int
    """Entries on all processes together."""
    effective: EffectiveWeight | None = None
    place: int = 0
    """Among the sparsifier's slots."""
    slot: Slot | None = None

    def entries(self, tensor: Tensor | None) -> Tensor | None:
        """Of a tensor that lies like the weight the entries of this layer that are held here, in any order."""
        if tensor is None:
            return None
        if self.effective is None or self.slot is None or self.slot.rows is None:
            return held(tensor)
        return self.effective.rows(tensor, self.slot)

    def flips(self) -> Tensor | int | None:
        return None if self.effective is None else self.effective.flips.get(self.place, 0)

    @property
    def shard(self) -> Shard | None:
        return None if self.effective is None else self.effective.shard


def _whole(
    layers: Sequence[_Layer], sums: Sequence[tuple[Sums, Sums]], flips: Sequence[Tensor | int | None]
) -> tuple[list[list[Moments]], list[int | None]]:
    """Moments and flips of whole layers. The device is waited for once; collective where weights are spread."""
    waiting = [tensor for of_layer in sums for each in of_layer for tensor in each.tensors]
    numbers = iter(read([*waiting, *(each for each in flips if isinstance(each, Tensor))]))
    moments = [[each.moments(numbers) for each in of_layer] for of_layer in sums]
    flipped = [int(next(numbers)) if isinstance(each, Tensor) else each for each in flips]
    shards = [layer.shard for layer in layers]
    if any(shards):
        device = held(layers[0].weight).device
        moments = _over_processes(moments, shards, device)
        counts = summed(torch.tensor([each or 0 for each in flipped], device=device), shards)
        flipped = [None if each is None else int(count) for each, count in zip(flipped, counts.tolist(), strict=True)]
    return moments, flipped


def _over_processes(
    moments: Sequence[Sequence[Moments]], shards: Sequence[Shard | None], device: torch.device
) -> list[list[Moments]]:
    """`joined` over the processes that share a weight. Collective."""
    mine = torch.tensor(moments, dtype=torch.float64, device=device)
    size, total, squares = mine.unbind(-1)
    whole = summed(mine[..., :2].clone(), shards)
    mean = whole[..., 1] / whole[..., 0].clamp(min=1)
    apart = torch.where(size > 0, total / size.clamp(min=1) - mean, 0)
    all_squares = summed(squares + size * apart * apart, shards)
    return [
        [Moments(int(n), t, s) for (n, t), s in zip(*of_layer, strict=True)]
        for of_layer in zip(whole.tolist(), all_squares.tolist(), strict=True)
    ]


def _values(moments: Sequence[Moments | None], flips: int | None, size: int) -> tuple[float | None, ...]:
    """The quantities of a set: two variances and the flip rate."""
    variances = (None if each is None else each.variance for each in moments)
    values = (*variances, None if flips is None else flips / size)
    return tuple(value if value is not None and math.isfinite(value) else None for value in values)
