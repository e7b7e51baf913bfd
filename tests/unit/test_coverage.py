"""`nmflow targets`: what its table says against the parameters themselves."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from nmflow import count_flops
from nmflow.cli import cli
from nmflow.models.skeleton import skeleton
from nmflow.report.columns import short
from nmflow.report.coverage import CoverageReport, Forward, report_coverage
from nmflow.targets import candidates, resolve


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(12, 2)
        self.linear1, self.linear2, self.norm = nn.Linear(12, 20), nn.Linear(20, 12), nn.LayerNorm(12)


    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x, x, x)[0]
        return x + self.linear2(self.linear1(self.norm(x)))


def report(model: nn.Module, rules: dict[str, str | None]) -> CoverageReport:
    """On seven tokens."""
    counted = count_flops(model, torch.zeros(7, 12), rules, remainder="partial")
    found = resolve(model, rules, remainder="partial")
    return report_coverage("mine", candidates(model), found, Forward("seven tokens", counted))


def test_weights_that_differ_in_a_number_share_a_line() -> None:
    model = nn.Sequential(Block(), Block(), Block(), nn.Linear(12, 5))
    found = report(model, {"ff": "1:4", "qk": "2:8", "1.linear2.weight": "1:2"})
    lines = {(group.name, group.pattern): group for group in found.groups}
    assert {key: (group.count, group.roles, group.rows, group.axis) for key, group in lines.items()} == {
        ("*.attn.in_proj_weight[0:12]", "2:8"): (3, "q", 12, 12),
        ("*.attn.in_proj_weight[12:24]", "2:8"): (3, "k", 12, 12),
        ("*.attn.in_proj_weight[24:36]", None): (3, "v", 12, 12),
        ("*.attn.out_proj.weight", None): (3, "o", 12, 12),
        ("*.linear1.weight", "1:4"): (3, "ff", 20, 12),
        ("*.linear2.weight", "1:4"): (2, "ff", 12, 20),
        ("*.linear2.weight", "1:2"): (1, "ff", 12, 20),
        ("*.weight", None): (1, "", 5, 12),
    }
    # 12 entries at 2:8: two of the first eight, two of the four that are left
    kept = {"in_proj_weight[0:12]": 3 * 12 * 4, "linear1.weight": 3 * 20 * 3}
    assert {key: lines[(f"*.attn.{key}" if "proj" in key else f"*.{key}", "2:8" if "proj" in key else "1:4")].kept
            for key in kept} == kept  # fmt: skip
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.others == sum(p.numel() for p in model.parameters() if p.dim() == 1)
    assert found.others + sum(group.weights for group in found.groups) == found.parameters


def test_flops_stand_beside_the_weights_they_are_of() -> None:
    """Seven tokens read every weight once: two FLOPs a weight and token; Logit and Attend have no weights."""
    found = report(nn.Sequential(Block(), Block()), {"ff": "1:4", "q": "2:8"})
    assert len(found.groups) == 6
    for group in found.groups:
        assert (group.flops, group.flops_kept) == (14 * group.weights, 14 * group.kept)
    products = 2 * (2 * 2 * 7 * 7 * 12)
    dense = products + sum(group.flops for group in found.groups)
    kept = products + sum(group.flops_kept for group in found.groups)
    assert found.to_dict()["flops"] == {"example": "seven tokens", "dense": dense, "sparse": kept}
    told = f"FLOPs of seven tokens: {short(dense)}, {short(products)} of them in products without these weights; "
    assert found.lines()[-2] == f"{told}{short(kept)} are kept, {100 * kept / dense:.1f} %"
    assert next(line for line in found.lines() if "linear1" in line).split()[-4:] == ["6.720", "K", "1.680", "K"]


def test_a_rule_that_takes_a_whole_projection_is_one_line() -> None:
    [whole] = [group for group in report(Block(), {"qkv": "1:4"}).groups if "in_proj" in group.name]
    assert (whole.name, whole.roles, whole.rows, whole.pattern) == ("attn.in_proj_weight", "q k v", 36, "1:4")


def test_the_command_answers_for_networks_by_name() -> None:
    done = CliRunner().invoke(cli, ["targets", "vit-tiny", "--targets", "ff=1:16"])
    assert done.exit_code == 0, done.output
    ff = 3 * 2 * 192 * 768
    parameters = sum(parameter.numel() for parameter in skeleton("vit-tiny").parameters())
    kept = parameters - ff + ff // 16
    assert done.output.splitlines()[-1] == (
        f"vit-tiny: {ff:,} of {parameters:,} parameters are N:M; {kept:,} are kept, {100 * kept / parameters:.1f} %"
    )
    assert "encoder.layers.*.linear1.weight" in done.output
    facts = json.loads(CliRunner().invoke(cli, ["targets", "lm-tiny", "--json"]).output)
    assert facts["kept"] == facts["parameters"]
    assert {group["roles"] for group in facts["groups"]} == {"q k v", "o", "ff", ""}
    assert facts["flops"]["example"] == "1 text of 128 tokens; its context is 128"
    assert facts["flops"]["dense"] == facts["flops"]["sparse"] > 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["vit-tny"], 'no network "vit-tny"; there are timm:NAME'),
        (["vit-tiny", "--targets", "conv=1:4"], 'target "conv" matches nothing'),
        (["vit-tiny", "--targets", "ff=1:128"], "128 does not divide it"),
    ],
)
def test_what_there_is_not_is_refused(arguments: list[str], told: str) -> None:
    done = CliRunner().invoke(cli, ["targets", *arguments])
    assert done.exit_code == 2
    assert told in done.output


def test_networks_of_the_libraries_take_no_memory() -> None:
    pytest.importorskip("timm", reason="an extra")
    pytest.importorskip("transformers", reason="an extra")
    for name, millions in (("timm:vit_large_patch16_224", 304), ("transformers:llama", 6738 - 131)):  # without its head
        model = skeleton(name)
        assert all(parameter.is_meta for parameter in model.parameters())
        assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6) == millions
    with pytest.raises(ValueError, match="hf download nobody-has/this"):
        skeleton("transformers:nobody-has/this")
