"""FLOPs of a network and of a run on it: which part of a weight every product reads, and what the rules make of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

from torch import nn

from nmflow.attach import attached_weights
from nmflow.flops.observe import observe
from nmflow.flops.report import FlopsReport, LayerFlops
from nmflow.flops.training import schedule_of
from nmflow.flops.watch import OTHER, Product
from nmflow.layout import rows_shape
from nmflow.masks import Remainder
from nmflow.pattern import Pattern
from nmflow.roles import roles_of
from nmflow.runtime.convert import decompress, is_compressed
from nmflow.runtime.example import Example
from nmflow.schedules import Recipe
from nmflow.schedules import recipe as recipe_by_name
from nmflow.slot_plans import plan_slots
from nmflow.targets import Candidate, Slot, Targets, candidates, recorded, resolve

_KINDS = {"q": "Q", "k": "K", "v": "V", "o": "O", "ff": "FF", "conv": "conv"}


def count_flops(
    model: nn.Module,
    example_input: Example,
    targets: Targets | None = None,
    recipe: str | Recipe | None = None,
    total_steps: int | None = None,
    remainder: Remainder = "error",
) -> FlopsReport:
    """Count what a network multiplies for an example, dense and with its sparse weights at their patterns.

        forward = Σ 2 · multiply-adds · kept(K) / K
        training = Σ over steps: forward + input gradients (· kept(K) / K where W~ is sparse, D = 0)
                                 + weight gradients (always dense)

    `model` is run once without numbers, so one on the meta device will do; whatever it is built of, linear layers,
    matmul, einsum, convolutions and attention are counted, each with the rows of the weight that it reads. Norms,
    activations, biases, embeddings and the optimizer are not. `example_input` is a tensor, or positional or keyword
    arguments; batch and tokens are those that it has, and a training step is one on it.

    `targets` are rules as the `Sparsifier` takes them; without them, the patterns are those of the model's sparsifier,
    or what finalize or compress left, or dense. With `recipe` and `total_steps` the run is counted too (and the recipe
    "dense" leaves every weight dense).

    Raises `ValueError` for rules and recipes that a `Sparsifier` refuses, a recipe without steps or the reverse, and
    a network that does not run. Source: Bambhaniya et al. 2025, appendix D; docs/flops.md.

    >>> import torch
    >>> report = count_flops(nn.Linear(64, 32), torch.zeros(10, 64), {"weight": "1:16"}, "ste", total_steps=100)
    >>> report.dense.total, report.total, report.training == 100 * (2560 + 2560 + 40960)
    (40960, 2560, True)
    """
    made = recipe_by_name(recipe) if isinstance(recipe, str) else recipe
    if (made is None) != (total_steps is None):
        raise ValueError("the FLOPs of a run need both: recipe=, such as mdgf-exponential or dense, and total_steps=")
    model = getattr(model, "_orig_mod", model)  # torch.compile wraps it
    if is_compressed(model):
        model = decompress(model)
    slots = _slots(model, targets, remainder)
    if made is not None and total_steps is not None:
        if not slots and made.name != "dense":
            raise ValueError(f'recipe "{made.name}" without a sparse weight; give targets, such as {{"ff": "1:16"}}')
        _, problems = plan_slots(slots, made, total_steps, remainder)
        if problems:
            raise ValueError("\n".join(dict.fromkeys(problems)))
        ends = {slot: made.at(total_steps, total_steps, slot.pattern, slot.axis).pattern for slot in slots}
        slots = tuple(slot for slot in slots if not ends[slot].is_dense)  # the recipe "dense" ends so
    seen = observe(model, example_input)
    layers = _layers(seen.products, candidates(model), slots)
    schedule = None if made is None or total_steps is None else schedule_of(layers, slots, made, total_steps)
    return FlopsReport(layers, schedule, seen.unknown)


def _slots(model: nn.Module, targets: Targets | None, remainder: Remainder) -> tuple[Slot, ...]:
    if targets is not None:
        return resolve(model, targets, remainder).slots
    attached = [replace(slot, name=name) for name, (_, effective) in attached_weights(model).items()
                for _, slot in effective.slots]  # fmt: skip
    return tuple(attached) or recorded(model) or ()


def _layers(
    products: Iterable[Product], known: Iterable[Candidate], slots: Sequence[Slot]
) -> tuple[LayerFlops, ...]:
    """Products by layer, kind and part of the weight, in the order of the forward."""
    parts = {candidate.name: list(_parts(candidate, slots)) for candidate in known}
    counted: dict[LayerFlops, LayerFlops] = {}
    for product in products:
        of_weight = [LayerFlops("", _kind(product))] if product.parameter is None else parts[product.parameter]
        start, stop = product.rows
        for part in of_weight:
            first, last = part.rows or product.rows
            inside = min(stop, last) - max(start, first)
            if inside > 0:
                flops, key = product.flops * inside // (stop - start), replace(part, layer=product.layer)
                so_far = counted.get(key, key)
                counted[key] = replace(
                    so_far,
                    forward=so_far.forward + flops,
                    input_gradient=so_far.input_gradient + flops * product.input_gradients,
                    weight_gradient=so_far.weight_gradient + flops * product.weight_gradient,
                )
    return tuple(counted.values())


def _kind(product: Product) -> str:
    """Of a product without a parameter. What a weight is made of (a weight norm's, say) has the role of its layer."""
    if product.kind != OTHER:
        return product.kind
    roles = roles_of(f"{product.layer}.weight")
    return _KINDS[roles[0]] if len(roles) == 1 else OTHER


def _parts(candidate: Candidate, slots: Iterable[Slot]) -> Iterator[LayerFlops]:
    """The row slices of a weight that have one role and one pattern each; nothing counted yet."""
    height, axis = rows_shape(candidate.shape, candidate.layout)
    whole = (0, height)
    roles = [(role, rows or whole) for role, rows in candidate.slices()]
    patterns = [(slot.pattern, slot.row_range) for slot in slots if slot.name == candidate.name]
    cuts = {0, height, *(cut for _, rows in [*roles, *patterns] for cut in rows)}
    for rows in pairwise(sorted(cuts)):
        role = next(role for role, span in roles if span[0] <= rows[0] < span[1])
        pattern = next((pattern for pattern, span in patterns if span[0] <= rows[0] < span[1]), Pattern.dense())
        yield LayerFlops(
            "", _KINDS.get(role, OTHER), candidate.name, None if rows == whole else rows, axis, pattern
        )
