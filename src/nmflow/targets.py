"""Which weights are made sparse, and to what: rules such as {"ff": "1:16", "qk": "1:4"} resolved to slots."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

from torch import nn

from nmflow.layout import LAYOUTS, Layout, rows_shape
from nmflow.masks import REMAINDERS, Remainder
from nmflow.pattern import Pattern
from nmflow.roles import GROUPS, ROLES, roles_of

Targets = Mapping[str, "str | Pattern | None"]


@dataclass(frozen=True)
class Slot:
    """One row slice of one parameter with a pattern of its own. A fused projection has one per slice."""

    name: str
    """Qualified name of the parameter; of a tied one, the first."""
    layout: Layout
    shape: tuple[int, ...]
    """Shape of the whole parameter."""
    pattern: Pattern
    rows: tuple[int, int] | None = None
    """[start, stop) of the rows (`layout.to_rows`); None for all of them."""
    rule: str = ""
    """The rule that put it here."""

    @property
    def label(self) -> str:
        """The name people read: `blocks.0.attn.qkv.weight[0:192]`."""
        return self.name if self.rows is None else f"{self.name}[{self.rows[0]}:{self.rows[1]}]"

    @property
    def axis(self) -> int:
        """Length K of the reduction axis."""
        return rows_shape(self.shape, self.layout)[1]

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.height * self.axis

    @property
    def height(self) -> int:
        """Number R of rows."""
        start, stop = self.row_range
        return stop - start

    @property
    def row_range(self) -> tuple[int, int]:
        """[start, stop) of the rows, also where the slot is the whole parameter."""
        return self.rows or (0, rows_shape(self.shape, self.layout)[0])


@dataclass(frozen=True)
class Candidate:
    """A weight as the rules see it: its name, how it lies, and the roles of its row slices."""

    name: str
    shape: tuple[int, ...]
    layout: Layout = "rows"
    roles: tuple[str, ...] = ()
    """One role for the whole, several for equal row slices, none where only a name reaches it."""
    aliases: tuple[str, ...] = ()
    """Other names of a tied parameter."""
    bare: bool = False
    """A bias, norm, embedding or unknown parameter: only its exact name makes it sparse."""
    depthwise: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)

    def slices(self) -> tuple[tuple[str, tuple[int, int] | None], ...]:
        """(role, rows) of every slice; role "" where there is none."""
        if len(self.roles) < 2:
            return (("".join(self.roles), None),)
        height = rows_shape(self.shape, self.layout)[0] // len(self.roles)
        return tuple((role, (i * height, (i + 1) * height)) for i, role in enumerate(self.roles))


@dataclass(frozen=True)
class Coverage:
    """What the rules took, and what stays dense and why."""

    slots: tuple[Slot, ...]
    dense: dict[str, str] = field(default_factory=dict)
    """Label of every candidate (slice) left dense -> the reason."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Those of `dense` that a rule asked for, left out by `remainder="skip"`."""

    def lines(self) -> list[str]:
        """For people: one line for each slot and each candidate left dense."""
        taken = {slot.label: str(slot.pattern) for slot in self.slots}
        width = max(map(len, [*taken, *self.dense]), default=0)
        lines = [f"{label:{width}}  {pattern}" for label, pattern in taken.items()]
        return [*lines, *(f"{label:{width}}  dense: {reason}" for label, reason in self.dense.items())]

    def __str__(self) -> str:
        return "\n".join(self.lines())


class _Rule(NamedTuple):
    key: str
    pattern: Pattern | None
    rank: int


_RANKS = ("parameter name", "module name", "re: on parameters", "re: on modules", "role", "grouped role")


def resolve(
    model: nn.Module | Sequence[Candidate], targets: Targets, remainder: Remainder = "error"
) -> Coverage:
    """Apply `targets` to a model (or to candidates, e.g. those of a file).

    Keys, the more exact first: parameter name, module name (every candidate weight in it), `re:` (full match on
    parameter names, else on module names), role (`ff q k v o conv`), grouped role (`qk qkv`). A value is a
    pattern, or None / "dense" to keep a weight dense. The most exact rule decides a slice.

    Raises one `ValueError` that lists all problems: a rule that matches nothing (with near misses), two rules of
    one rank with different patterns on one weight, an axis that M or rows that V does not divide under
    `remainder="error"`, a depthwise convolution asked for without `remainder="partial"`.
    """
    if remainder not in REMAINDERS:
        raise ValueError(f'remainder "{remainder}": one of {", ".join(REMAINDERS)}')
    if not targets:
        raise ValueError('no targets: give at least one rule, such as {"ff": "1:16"}')
    if not isinstance(targets, Mapping):
        raise TypeError(f'targets {targets!r:.60}: expected a mapping of rules, such as {{"ff": "1:8"}}')
    known = list(candidates(model)) if isinstance(model, nn.Module) else list(model)
    modules = [name for name, _ in model.named_modules()] if isinstance(model, nn.Module) else []
    problems: list[str] = []
    matches: dict[tuple[str, tuple[int, int] | None], list[_Rule]] = {}
    for key, value in targets.items():
        try:
            pattern = None if value is None else Pattern.parse(value)
        except (ValueError, TypeError) as error:
            problems.append(f'target "{key}": {error}')
            continue
        try:
            rank, found = _match(key, known, modules)
        except re.error as error:
            problems.append(f'target "{key}": not a regular expression: {error}')
            continue
        if not found:
            problems.append(_matches_nothing(key, known, modules))
        for name, rows in found:
            matches.setdefault((name, rows), []).append(_Rule(key, pattern, rank))

    slots: list[Slot] = []
    dense: dict[str, str] = {}
    skipped: dict[str, str] = {}
    for candidate in known:
        for slot, reason in _decide(candidate, matches, remainder, problems):
            if not reason:
                slots.append(slot)
            elif not (candidate.bare and reason == _NO_RULE):
                dense[slot.label] = reason
                if not slot.pattern.is_dense:
                    skipped[slot.label] = reason
    if problems:
        raise ValueError("\n".join(problems))
    return Coverage(tuple(slots), dense, skipped)


_NO_RULE = "no rule names it"


def _decide(
    candidate: Candidate,
    matches: Mapping[tuple[str, tuple[int, int] | None], list[_Rule]],
    remainder: Remainder,
    problems: list[str],
) -> Iterator[tuple[Slot, str]]:
    """The slots of one candidate, those that stay dense with a reason and the pattern that was asked for.

    Slices that all end up the same are one slot, unless groups of V rows would reach from one into the next.
    """
    whole = matches.get((candidate.name, None), [])
    slices = candidate.slices()
    chosen: list[tuple[tuple[int, int] | None, _Rule | None]] = []
    for _, rows in slices:
        rules = whole if rows is None else whole + matches.get((candidate.name, rows), [])
        best = min((rule.rank for rule in rules), default=None)
        rivals = [rule for rule in rules if rule.rank == best]
        chosen.append((rows, rivals[0] if rivals else None))
        if len({rule.pattern for rule in rivals}) > 1:
            said = " and ".join(f'"{rule.key}": {rule.pattern or "dense"}' for rule in rivals)
            problems.append(
                f"{candidate.name}: two rules of one rank ({_RANKS[rivals[0].rank]}) disagree: {said}; "
                "name the parameter itself to decide"
            )
    alike = len({rule and (rule.pattern or "dense") for _, rule in chosen}) == 1
    if alike and not any(rows and rule and rule.pattern and rows[0] % rule.pattern.v for rows, rule in chosen):
        chosen = [(None, chosen[0][1])]
    for rows, rule in chosen:
        slot = Slot(candidate.name, candidate.layout, candidate.shape, Pattern.dense(), rows)
        if rule is None:
            yield slot, "a depthwise convolution" if candidate.depthwise else _NO_RULE
            continue
        slot = replace(slot, rule=rule.key)
        if rule.pattern is None or rule.pattern.is_dense:
            yield slot, f'"{rule.key}" keeps it dense'
            continue
        slot = replace(slot, pattern=rule.pattern)
        if candidate.depthwise and remainder != "partial":
            problems.append(
                f'{slot.label}: a depthwise convolution has one input channel; remainder="partial" makes its '
                "kernel sparse all the same, or leave it out"
            )
        elif remainder == "skip" and (undivided := _undivided(slot, rule.pattern)):
            yield slot, undivided
        else:
            if remainder == "error":
                problems += shape_problems(slot, rule.pattern)
            yield slot, ""


def _undivided(slot: Slot, pattern: Pattern) -> str:
    """Why a pattern leaves a remainder, in a phrase; "" where it leaves none."""
    if slot.axis % pattern.m:
        return f"{pattern.m} does not divide {slot.axis}"
    return f"{pattern.v} does not divide {slot.height} rows" if slot.height % pattern.v else ""


def shape_problems(slot: Slot, pattern: Pattern) -> list[str]:
    """The messages for an axis that M and for rows that V does not divide: what, where, and the ways out."""
    problems = [_axis_problem(slot, pattern)] if slot.axis % pattern.m else []
    return [*problems, _rows_problem(slot, pattern)] if slot.height % pattern.v else problems


def _rows_problem(slot: Slot, pattern: Pattern) -> str:
    fits = next(v for v in range(min(pattern.v, slot.height), 0, -1) if slot.height % v == 0)
    return (
        f"{slot.label}: it has {slot.height} row{'' if slot.height == 1 else 's'}, groups of {pattern.v} do not divide "
        f'them; use {Pattern(pattern.n, pattern.m, fits)}, remainder="partial" or "skip", or leave it out'
    )


def _axis_problem(slot: Slot, pattern: Pattern) -> str:
    fits = [m for m in range(pattern.m - 1, 1, -1) if slot.axis % m == 0]
    other = f"use {Pattern(pattern.n, fits[0], pattern.v)}, " if fits and pattern.n < fits[0] else ""
    dim = {"rows": len(slot.shape) - 1, "columns": 0, "conv": "(kernel, in)"}[slot.layout]
    return (
        f"{slot.label}: dim {dim} has {slot.axis} entries, {pattern.m} does not divide it; {other}"
        'remainder="partial" or "skip", or leave it out'
    )


def _match(
    key: str, known: Sequence[Candidate], modules: Sequence[str]
) -> tuple[int, list[tuple[str, tuple[int, int] | None]]]:
    """(rank, [(parameter, rows)]) of one rule; rows None for the whole parameter."""
    by_name = [c for c in known if key in c.names]
    if by_name:
        return 0, [(c.name, None) for c in by_name]
    weights = [c for c in known if not c.bare and not c.depthwise]
    if key.startswith("re:"):
        form = re.compile(key[3:])
        named = [c for c in weights if any(form.fullmatch(name) for name in c.names)]
        if named:
            return 2, [(c.name, None) for c in named]
        inside = {name for name in _modules_of(weights, modules) if form.fullmatch(name)}
        return 3, [(c.name, None) for c in weights if any(_is_inside(n, m) for n in c.names for m in inside)]
    if key in _modules_of(known, modules):
        inner = [c for c in weights if any(_is_inside(name, key) for name in c.names)]
        # The name of an embedding, a norm or a depthwise convolution is as exact as that of its weight.
        inner = inner or [c for c in known if f"{key}.weight".removeprefix(".") in c.names]
        return 1, [(c.name, None) for c in inner]
    roles = GROUPS.get(key, (key,))
    rank = 5 if key in GROUPS else 4
    return rank, [(c.name, rows) for c in weights for role, rows in c.slices() if role and role in roles]


def _modules_of(known: Iterable[Candidate], modules: Sequence[str]) -> set[str]:
    owners = {name.rpartition(".")[0] for c in known for name in c.names}
    return {name for name in {*modules, *owners} if name}


def _is_inside(parameter: str, module: str) -> bool:
    return parameter.startswith(f"{module}.")


def _matches_nothing(key: str, known: Sequence[Candidate], modules: Sequence[str]) -> str:
    present = {role for c in known if not c.bare for role, _ in c.slices() if role}
    groups = [group for group, roles in GROUPS.items() if present & set(roles)]
    if key in ROLES or key in GROUPS:
        offered = ", ".join(sorted(present) + groups) or "no roles: name weights or modules, or use re:"
        return f'target "{key}" matches nothing: this model has {offered}'
    names = [name for c in known for name in c.names] + sorted(_modules_of(known, modules))
    near = difflib.get_close_matches(key.removeprefix("re:"), names + sorted(present) + groups, n=3, cutoff=0.5)
    hint = f"; near misses: {', '.join(near)}" if near else f"; it has weights such as {', '.join(names[:3])}"
    return f'target "{key}" matches nothing{hint}'


def candidates(model: nn.Module) -> list[Candidate]:
    """Every parameter of a model as the rules see it, tied ones once, in the order of `named_modules`."""
    found: dict[int, Candidate] = {}
    first_conv = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    for path, module in model.named_modules():
        for local, parameter in module._parameters.items():
            if parameter is None:
                continue
            name = f"{path}.{local}" if path else local
            candidate = _candidate(name, module, local, tuple(parameter.shape), module is first_conv)
            earlier = found.get(id(parameter))
            if earlier is None:
                found[id(parameter)] = candidate
            else:  # Tied: one slot under the first name. A weight that is an embedding too is reached by name only.
                found[id(parameter)] = replace(
                    earlier,
                    aliases=(*earlier.aliases, name),
                    bare=earlier.bare or candidate.bare,
                    roles=earlier.roles if earlier.roles == candidate.roles else (),
                )
    return list(found.values())


def candidates_of_names(shapes: Mapping[str, tuple[int, ...]]) -> list[Candidate]:
    """Candidates of a file, from names and shapes alone: matrices lie as in `nn.Linear`, 4-D as convolutions."""
    found = []
    for name, shape in shapes.items():
        roles = roles_of(name) if len(shape) == 2 else ("conv",) if len(shape) == 4 else ()
        layout: Layout = "conv" if len(shape) == 4 else "rows"
        found.append(Candidate(name, shape, layout, _whole_thirds(roles, shape, layout), bare=len(shape) < 2))
    return found


def _candidate(name: str, module: nn.Module, local: str, shape: tuple[int, ...], is_stem: bool) -> Candidate:
    if isinstance(module, nn.modules.conv._ConvNd) and local == "weight" and not module.transposed:
        depthwise = module.groups > 1 and shape[1] == 1
        roles = () if depthwise or is_stem or re.search(r"patch_embed|stem", name) else ("conv",)
        return Candidate(name, shape, "conv", roles, depthwise=depthwise)
    layout: Layout = "columns" if is_gpt2_conv1d(module) else "rows"
    is_linear = local == "weight" and (isinstance(module, nn.Linear) or layout == "columns")
    is_projection = isinstance(module, nn.MultiheadAttention) and local.endswith("proj_weight")
    if not (is_linear or is_projection):
        return Candidate(name, shape, bare=True)
    return Candidate(name, shape, layout, _whole_thirds(roles_of(name), shape, layout))


def _whole_thirds(roles: tuple[str, ...], shape: tuple[int, ...], layout: Layout) -> tuple[str, ...]:
    """Roles of a fused projection hold only where its rows split evenly; otherwise a name has to reach it."""
    return roles if len(roles) < 2 or rows_shape(shape, layout)[0] % len(roles) == 0 else ()


def is_gpt2_conv1d(module: nn.Module) -> bool:
    """True for transformers' `Conv1D` ([in, out] weight), without importing transformers."""
    return any(cls.__name__ == "Conv1D" for cls in type(module).__mro__) and hasattr(module, "nf")


# -- what finalize leaves behind, in memory and in files ---------------------------------------------------------

_RECORD = "_nmflow_slots"


def record(model: nn.Module, slots: Sequence[Slot]) -> None:
    """Note on a model which slots it was finalized to; `compress` and `verify` read it. Not in the state dict."""
    model.__dict__[_RECORD] = tuple(slots)


def recorded(model: nn.Module) -> tuple[Slot, ...] | None:
    """The slots that `record` noted, or None."""
    return cast("tuple[Slot, ...] | None", model.__dict__.get(_RECORD))


def slots_to_json(slots: Iterable[Slot]) -> list[dict[str, Any]]:
    """Slots as plain data for metadata and checkpoints."""
    return [
        {
            "name": slot.name,
            "rows": list(slot.rows) if slot.rows else None,
            "layout": slot.layout,
            "shape": list(slot.shape),
            "pattern": str(slot.pattern),
            "rule": slot.rule,
        }
        for slot in slots
    ]


def slots_from_json(data: object) -> tuple[Slot, ...]:
    """The inverse of `slots_to_json`, for data from a file: every field is checked, `ValueError` says which."""
    if not isinstance(data, list):
        raise ValueError(f"slots: expected a list, found {type(data).__name__}")
    return tuple(_slot_from_json(entry, index) for index, entry in enumerate(data))


def _slot_from_json(entry: object, index: int) -> Slot:
    where = f"slot {index}"
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise ValueError(f"{where}: expected an object with a name")
    where = f"slot {index} ({entry['name']})"
    shape, rows, layout = entry.get("shape"), entry.get("rows"), entry.get("layout")
    if not _are_sizes(shape):
        raise ValueError(f"{where}: shape {shape!r} is not a list of sizes")
    if layout not in LAYOUTS:
        raise ValueError(f"{where}: layout {layout!r} is none of {', '.join(LAYOUTS)}")
    if rows is not None and not (_are_sizes(rows) and len(rows) == 2 and rows[0] < rows[1]):
        raise ValueError(f"{where}: rows {rows!r} is not [start, stop]")
    try:
        pattern = Pattern.parse(cast("str", entry.get("pattern")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error
    span = None if rows is None else (rows[0], rows[1])
    slot = Slot(
        entry["name"], layout, tuple(cast("list[int]", shape)), pattern, span, str(entry.get("rule", ""))
    )
    if slot.row_range[1] > rows_shape(slot.shape, slot.layout)[0]:
        raise ValueError(f"{where}: rows {rows!r} lie outside a weight of shape {shape!r}")
    return slot


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in value)
