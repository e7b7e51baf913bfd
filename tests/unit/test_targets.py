"""Rules to slots: which weights a rule takes, which rule wins, and what is refused. Expectations written by hand."""

from __future__ import annotations

import json
import re

import pytest
from torch import nn

from nmflow import Pattern
from nmflow.roles import roles_of
from nmflow.targets import (
    Slot,
    candidates,
    candidates_of_names,
    record,
    recorded,
    resolve,
    slots_from_json,
    slots_to_json,
)


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attn = Attention(width)
        self.mlp = Mlp(width)


class Net(nn.Module):
    """Embedding, two blocks, head: the shape of a small transformer."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(2)])
        self.head = nn.Linear(width, 32, bias=False)


def taken(model: nn.Module, targets: dict[str, str | None], **options: str) -> dict[str, str]:
    found = resolve(model, targets, **options)  # type: ignore[arg-type]  # names of remainders
    return {slot.label: str(slot.pattern) for slot in found.slots}


def test_role_takes_every_layer_of_that_role_and_no_other() -> None:
    assert taken(Net(), {"ff": "1:8"}) == {
        f"blocks.{i}.mlp.{name}.weight": "1:8" for i in range(2) for name in ("fc1", "fc2")
    }


def test_grouped_role_takes_row_slices_and_the_single_role_is_more_exact() -> None:
    assert taken(Net(), {"qkv": "1:4", "k": "1:8"}) == {
        f"blocks.{i}.attn.qkv.weight[{rows}]": pattern
        for i in range(2)
        for rows, pattern in (("0:16", "1:4"), ("16:32", "1:8"), ("32:48", "1:4"))
    }


def test_one_pattern_for_a_whole_fused_projection_is_one_slot() -> None:
    assert taken(Net(), {"qkv": "1:4", "blocks.1": None}) == {"blocks.0.attn.qkv.weight": "1:4"}


def test_the_more_exact_rule_wins_whatever_the_order() -> None:
    rules = {
        "ff": "1:2",
        r"re:blocks\.\d\.mlp\.fc1\.weight": "1:4",
        "blocks.0.mlp": "1:8",
        "blocks.0.mlp.fc1.weight": "1:16",
    }
    wanted = {
        "blocks.0.mlp.fc1.weight": "1:16",
        "blocks.0.mlp.fc2.weight": "1:8",
        "blocks.1.mlp.fc1.weight": "1:4",
        "blocks.1.mlp.fc2.weight": "1:2",
    }
    assert taken(Net(), dict(rules)) == wanted
    assert taken(Net(), dict(reversed(rules.items()))) == wanted


def test_none_and_dense_keep_a_weight_out_and_say_so() -> None:
    coverage = resolve(Net(), {"ff": "1:8", "blocks.0.mlp.fc1": None, "blocks.1.mlp.fc2": "dense"})
    assert {slot.label for slot in coverage.slots} == {"blocks.0.mlp.fc2.weight", "blocks.1.mlp.fc1.weight"}
    assert coverage.dense["blocks.0.mlp.fc1.weight"] == '"blocks.0.mlp.fc1" keeps it dense'
    assert coverage.dense["head.weight"] == "no rule names it"


def test_regular_expression_falls_back_to_module_names() -> None:
    assert set(taken(Net(), {r"re:blocks\.1\.mlp": "1:4"})) == {"blocks.1.mlp.fc1.weight", "blocks.1.mlp.fc2.weight"}


def test_bare_parameters_are_reached_by_exact_name_only() -> None:
    assert "embed.weight" not in taken(Net(), {"re:.*": "1:4"})
    assert taken(Net(), {"embed.weight": "1:4"}) == {"embed.weight": "1:4"}
    assert taken(Net(), {"embed": "1:4"}) == {"embed.weight": "1:4"}
    assert taken(Net(), {"blocks.0.norm.weight": "1:4"}) == {"blocks.0.norm.weight": "1:4"}


def test_a_bare_linear_is_a_model() -> None:
    assert taken(nn.Linear(8, 4), {"weight": "1:4"}) == {"weight": "1:4"}


def test_tied_weights_are_one_slot_under_the_first_name() -> None:
    model = Net()
    model.head.weight = model.embed.weight  # type: ignore[assignment]  # tied on purpose
    assert taken(model, {"head.weight": "1:4"}) == {"embed.weight": "1:4"}
    assert "embed.weight" not in taken(model, {"re:.*": "1:4"})


def test_convolutions_but_not_stem_or_depthwise() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 16, 3, groups=2)
    )
    assert taken(model, {"conv": "1:4"}) == {"1.weight": "1:4", "3.weight": "1:4"}
    assert taken(model, {"0.weight": "1:3"}) == {"0.weight": "1:3"}
    with pytest.raises(ValueError, match=r"2\.weight: a depthwise convolution"):
        resolve(model, {"2.weight": "1:3"})
    assert taken(model, {"2.weight": "1:4"}, remainder="partial") == {"2.weight": "1:4"}


def test_remainder_policies() -> None:
    model = nn.Sequential(nn.Linear(12, 4), nn.Linear(16, 4))
    with pytest.raises(ValueError, match=r"0\.weight: dim 1 has 12 entries, 8 does not divide it; use 1:6, remainder"):
        resolve(model, {"re:.*": "1:8"})
    assert taken(model, {"re:.*": "1:8"}, remainder="partial") == {"0.weight": "1:8", "1.weight": "1:8"}
    coverage = resolve(model, {"re:.*": "1:8"}, "skip")
    assert [slot.label for slot in coverage.slots] == ["1.weight"]
    assert coverage.dense["0.weight"] == "8 does not divide 12"


def test_remainders_of_rows() -> None:
    model = nn.Sequential(nn.Linear(16, 6), nn.Linear(16, 8))
    with pytest.raises(ValueError, match=r"0\.weight: it has 6 rows, groups of 4 .*use 1:8v3, remainder="):
        resolve(model, {"re:.*": "1:8v4"})
    assert taken(model, {"re:.*": "1:8v4"}, remainder="partial") == {"0.weight": "1:8v4", "1.weight": "1:8v4"}
    coverage = resolve(model, {"re:.*": "1:8v4"}, "skip")
    assert [slot.label for slot in coverage.slots] == ["1.weight"]
    assert coverage.dense["0.weight"] == "4 does not divide 6 rows"
    with pytest.raises(ValueError, match=r"0\.bias: it has 1 row, groups of 2 do not divide them; use 1:3, remainder"):
        resolve(model, {"0.bias": "1:3v2"})
    with pytest.raises(ValueError, match="use 1:4v4") as error:
        resolve(model, {"0.weight": "1:5v4", "1.weight": "1:12v5"})
    assert len(str(error.value).splitlines()) == 4                # axis and rows of both
    assert "use 1:8v5" in str(error.value)                        # the other M keeps V


def test_groups_of_rows_end_with_their_slice() -> None:
    """48 rows of a fused projection: 16 each of q, k and v."""
    net = Net()
    whole = {f"blocks.{i}.attn.qkv.weight": "1:4v8" for i in range(2)}
    assert taken(net, {"qkv": "1:4v8"}) == whole
    name = "blocks.0.attn.qkv.weight"
    slices = {f"{name}[{start}:{start + 16}]": "1:4v3" for start in (0, 16, 32)}
    assert taken(net, {name: "1:4v3"}, remainder="partial") == slices                # 3 divides 48, not 16
    with pytest.raises(ValueError, match=r"qkv\.weight\[0:16\]: it has 16 rows, groups of 3 .*use 1:4v2"):
        resolve(net, {name: "1:4v3"})
    left = resolve(net, {name: "1:4v3", "o": "1:4"}, "skip").dense
    assert [left[label] for label in slices] == ["3 does not divide 16 rows"] * 3


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({"ffn": "1:4"}, 'target "ffn" matches nothing; near misses: ff'),
        ({"blocks.0.mlp.fc3": "1:4"}, "near misses: blocks.0.mlp.fc"),
        ({"conv": "1:4"}, 'target "conv" matches nothing: this model has ff, k, o, q, v, qk, qkv'),
        ({"re:nothing": "1:4"}, 'target "re:nothing" matches nothing'),
        ({"re:[": "1:4"}, "not a regular expression"),
        ({"ff": "16:1"}, 'target "ff": pattern "16:1"'),
        ({"ff": 4}, 'target "ff": a pattern is a string'),
        ({}, "no targets"),
        ({r"re:.*fc1\.weight": "1:4", r"re:blocks\.0.*": "1:8"}, "blocks.0.mlp.fc1.weight: two rules of one rank"),
        ({"qk": "1:4", "qkv": "1:8"}, "two rules of one rank (grouped role) disagree"),
    ],
)
def test_refusals(targets: dict[str, str | None], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        resolve(Net(), targets)


def test_coverage_prints_a_line_a_weight() -> None:
    printed = str(resolve(Block(16), {"ff": "1:8"})).splitlines()
    assert [line.split(maxsplit=1) for line in printed] == [
        ["mlp.fc1.weight", "1:8"],
        ["mlp.fc2.weight", "1:8"],
        ["attn.qkv.weight", "dense: no rule names it"],
        ["attn.proj.weight", "dense: no rule names it"],
    ]


def test_targets_are_a_mapping() -> None:
    with pytest.raises(TypeError, match=r"targets '1:8': expected a mapping of rules, such as {\"ff\": \"1:8\"}"):
        resolve(Net(), "1:8")  # type: ignore[arg-type]  # what is refused


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ValueError, match="matches nothing") as error:
        resolve(Net(), {"fff": "1:4", "o": "2:1", "ff": "1:7"})
    lines = str(error.value).splitlines()
    assert len(lines) == 2 + 4  # an unknown key, a bad pattern, and four FF weights that 7 does not divide


def test_agreeing_rules_of_one_rank_are_no_conflict() -> None:
    assert taken(Net(), {"qk": "1:4", "qkv": "1:4"}) == {f"blocks.{i}.attn.qkv.weight": "1:4" for i in range(2)}


@pytest.mark.parametrize(
    ("name", "roles"),
    [
        ("blocks.3.attn.qkv.weight", ("q", "k", "v")),
        ("layers.0.self_attn.in_proj_weight", ("q", "k", "v")),
        ("in_proj_weight", ("q", "k", "v")),
        ("transformer.h.0.attn.c_attn.weight", ("q", "k", "v")),
        ("transformer.h.0.attn.c_proj.weight", ("o",)),
        ("transformer.h.0.mlp.c_proj.weight", ("ff",)),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", ("q",)),
        ("encoder.block.0.layer.0.SelfAttention.o.weight", ("o",)),
        ("encoder.block.0.layer.1.DenseReluDense.wi_1.weight", ("ff",)),
        ("encoder.block.0.layer.1.DenseReluDense.wo.weight", ("ff",)),
        ("bert.encoder.layer.0.attention.self.key.weight", ("k",)),
        ("bert.encoder.layer.0.attention.output.dense.weight", ("o",)),
        ("bert.encoder.layer.0.intermediate.dense.weight", ("ff",)),
        ("bert.encoder.layer.0.output.dense.weight", ("ff",)),
        ("bert.pooler.dense.weight", ()),
        ("model.layers.0.self_attn.v_proj.weight", ("v",)),
        ("model.layers.0.mlp.gate_proj.weight", ("ff",)),
        ("layers.0.linear2.weight", ("ff",)),
        ("layers.0.self_attn.out_proj.weight", ("o",)),
        ("layers.0.blocks.0.attn.cpb_mlp.fc1.weight", ()),
        ("lm_head.weight", ()),
        ("head.weight", ()),
        ("embeddings.word_embeddings.weight", ()),
        ("transformer.h.0.self_attention.query_key_value.weight", ()),
    ],
)
def test_roles_by_name(name: str, roles: tuple[str, ...]) -> None:
    assert roles_of(name) == roles


def test_files_are_asked_by_the_same_rules() -> None:
    shapes = {"blocks.0.attn.qkv.weight": (48, 16), "blocks.0.mlp.fc1.weight": (64, 16), "blocks.0.norm.weight": (16,)}
    coverage = resolve(candidates_of_names(shapes), {"ff": "1:8", "q": "1:4"})
    assert [slot.label for slot in coverage.slots] == ["blocks.0.attn.qkv.weight[0:16]", "blocks.0.mlp.fc1.weight"]


def test_every_parameter_is_a_candidate_once() -> None:
    model = Net()
    assert [c.name for c in candidates(model)] == [name for name, _ in model.named_parameters()]


def test_slots_survive_json_and_a_model_remembers_them() -> None:
    model = Net()
    slots = resolve(model, {"qk": "1:4", "ff": "2:8"}).slots
    assert slots_from_json(json.loads(json.dumps(slots_to_json(slots)))) == slots
    assert recorded(model) is None
    record(model, slots)
    assert recorded(model) == slots
    assert list(model.state_dict()) == list(Net().state_dict())


GOOD = {"name": "w", "layout": "rows", "shape": [4, 8], "pattern": "1:4", "rows": [0, 2], "rule": ""}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 3}, "expected an object with a name"),
        ({"shape": [4, -8]}, "is not a list of sizes"),
        ({"shape": "4x8"}, "is not a list of sizes"),
        ({"layout": "diagonal"}, "none of rows, columns, conv"),
        ({"rows": [2, 1]}, "is not \\[start, stop\\]"),
        ({"rows": [0, 5]}, "lie outside"),
        ({"pattern": "4:1"}, "did you mean"),
        ({"pattern": None}, "slot 0"),
        ({"pattern": "1:4v0"}, "slot 0 .w.: .*1 to 2147483647"),
        ({"pattern": "1:4v99999999999999999999"}, "1 to 2147483647"),
    ],
)
def test_slots_from_a_hostile_file(change: dict[str, object], message: str) -> None:
    assert slots_from_json([GOOD]) == (Slot("w", "rows", (4, 8), Pattern(1, 4), (0, 2)),)
    with pytest.raises(ValueError, match=message):
        slots_from_json([{**GOOD, **change}])
