"""What a benchmark is asked, how rounds are judged, what counts as reached: everything about speed but the speed."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nmflow.bench import goals
from nmflow.bench.cells import CONV, CONV_LAST, CSR, DENSE, OURS, Cell, ConvCell, MaskCell
from nmflow.bench.goals import Verdict
from nmflow.bench.kernels import places
from nmflow.bench.machine import Ceilings, Machine, Setup
from nmflow.bench.output import write
from nmflow.bench.results import KernelResult
from nmflow.bench.settings import KernelSettings, ModelSettings, read
from nmflow.bench.timing import Rounds, in_turns

CELL = Cell(
    part="linear", shape=(3072, 768), pattern="1:8", tokens=16, dtype="float32", layers=1,
    us={DENSE: 800.0, OURS: 100.0, CSR: 300.0}, over={DENSE: 8.0, CSR: 3.0}, of_peak=0.5, of_bandwidth=None,
    goal=7.5, tiling="tb 128 64x256 rows", disturbed=0,
)  # fmt: skip
CONVOLUTION = ConvCell(
    layer=(64, 128, 3, 2, 56), pattern="1:8", dtype="float32", us={OURS: 10.0, CONV: 20.0, CONV_LAST: 15.0},
    over={CONV: 2.0, CONV_LAST: 1.5}, product=True, disturbed=2,
)  # fmt: skip
MASK = MaskCell((768, 3072), "1:8", "float32", {OURS: 0.1, "copy": 0.08}, 30.0, 12.0, 0.8, 20.0, None, 1)
SETUP = Setup(
    Machine("A Processor", 2, 2, 8.0, "Linux x86_64", "3.11", "2.15", "0.1", "avx512", True, 0.25),
    Ceilings(235.0, 470.0, 57.0, 58.0),
)


def test_ceilings_say_what_one_thread_reads_where_it_was_measured() -> None:
    assert SETUP.lines()[-1].endswith("read 57 GB/s, copy 58 GB/s")
    measured = dataclasses.replace(SETUP, ceilings=dataclasses.replace(SETUP.ceilings, read_alone_gbs=41.2))
    assert measured.lines()[-1].endswith("read 57 GB/s (one thread 41), copy 58 GB/s")
    assert Setup.from_dict(measured.to_dict()) == measured


# ------------------------------------------------------------------------------------------------ settings
def test_settings_are_read() -> None:
    found = read(KernelSettings, ["patterns=1:8,2:4", "tokens=1,16", "shapes=8x16,32x64", "threads=1", "parts=masks"])
    assert found == KernelSettings(
        patterns=("1:8", "2:4"), tokens=(1, 16), shapes=((8, 16), (32, 64)), threads=1, parts=("masks",)
    )
    assert read(ModelSettings, []).targets == {"ff": "1:8"}
    found_model = read(ModelSettings, ["pattern=1:16", "targets.re:.*head=2:4", "targets.o=dense"], {"batch": 4})
    assert found_model.targets == {"ff": "1:16", "re:.*head": "2:4", "o": "dense"}
    assert found_model.batch == 4
    assert read(ModelSettings, ["batch=2"], {"batch": 4}).batch == 2


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("patern=1:8", 'did you mean "patterns"? Known: '),
        ("foo=1", "no such setting. Known: "),
        ("patterns=8:1", 'did you mean "1:8"?'),
        ("threads", "expected key=value"),
        ("threads=", "expected key=value"),
        ("threads=0", "no whole number above 0"),
        ("rounds=-3", "no whole number above 0"),
        ("rounds=²", "no whole number above 0"),
        ("shapes=3072", "no ROWSxCOLS"),
        ("shapes=3072x0", "no whole number above 0"),
        ("dtype=float16", "none of float32, bfloat16"),
        ("parts=linear,hot", '"hot" is none of linear, cold, bf16, conv, masks'),
        ("targets.ff=1:8", "no such setting"),
    ],
)
def test_wrong_settings_are_told(setting: str, problem: str) -> None:
    with pytest.raises(ValueError, match=r".") as refused:
        read(KernelSettings, [setting])
    assert problem in str(refused.value)
    assert setting in str(refused.value)


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    given = ["threads=1", "threads=2", "rounds=x", f"out={tmp_path / 'file'}"]
    with pytest.raises(ValueError, match="twice") as refused:
        read(KernelSettings, given)
    assert len(str(refused.value).splitlines()) == 3
    with pytest.raises(ValueError, match='"ff" is given twice'):
        read(ModelSettings, ["pattern=1:8", "targets.ff=1:16"])


def test_the_places_are_the_product_of_the_settings() -> None:
    whole = list(places(KernelSettings()))
    assert len(whole) == len(set(whole)) == 4 * (6 * 5 + 3 * 2 + 5)
    assert {place.layers for place in whole if place.part == "cold"} == {24}
    assert {(place.dtype, place.tokens) for place in whole if place.part == "bf16"} == {("bfloat16", 196)}
    few = list(places(read(KernelSettings, ["parts=linear,masks", "patterns=1:8", "tokens=3", "shapes=8x8,8x16"])))
    assert [(place.shape, place.tokens) for place in few] == [((8, 8), 3), ((8, 16), 3)]


# -------------------------------------------------------------------------------------------------- timing
def counted(calls: dict[str, int], name: str) -> Callable[[], object]:
    def run() -> None:
        calls[name] = calls.get(name, 0) + 1

    return run


def steps(*losses: int) -> Callable[[], int]:
    """A count of lost cores that grows by each of `losses` from one question to the next, then no more."""
    seen: Iterator[int] = itertools.accumulate(itertools.chain(losses, itertools.repeat(0)))
    return lambda: next(seen)


def test_ratios_are_those_of_the_rounds() -> None:
    timed = Rounds({"a": (1.0, 10.0, 1.0), "b": (2.0, 30.0, 4.0)}, 0)
    assert timed.median("a") == 1.0
    assert timed.ratio("a", "b") == 3.0, "the median of 2, 3 and 4, not the ratio of the medians"
    assert timed.ratio("b", "a") == pytest.approx(1 / 3)


def test_sides_take_turns() -> None:
    order: list[str] = []
    timed = in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2, seconds=0.0, lost=lambda: 0)
    assert {name: len(times) for name, times in timed.seconds.items()} == {"a": 2, "b": 2}
    assert timed.disturbed == 0
    assert [name for name, _ in itertools.groupby(order)] == ["a", "b"] * 3, "once to count the calls, then two rounds"
    assert all(time >= 0 for times in timed.seconds.values() for time in times)


def test_a_disturbed_round_is_done_again() -> None:
    calls: dict[str, int] = {}
    # Asked before and after each round: the second round loses a core.
    timed = in_turns({"a": counted(calls, "a")}, 3, seconds=0.0, lost=steps(0, 0, 0, 1))
    assert (len(timed.seconds["a"]), timed.disturbed) == (3, 0)
    assert calls["a"] == 2 + 2 * 4, "two calls to begin with, then one unclocked and one clocked in each of four rounds"


@pytest.mark.parametrize(("rounds", "kept"), [(1, 1), (2, 2), (5, 3)])
def test_where_every_round_is_disturbed_a_few_are_kept_and_counted(rounds: int, kept: int) -> None:
    counter = itertools.count()
    timed = in_turns({"a": lambda: None}, rounds, seconds=0.0, tries=2, lost=lambda: next(counter))
    assert (len(timed.seconds["a"]), timed.disturbed) == (kept, kept)


# --------------------------------------------------------------------------------------------------- goals
@pytest.mark.parametrize(
    ("part", "shape", "dtype", "pattern", "tokens", "threads", "goal"),
    [
        ("linear", (3072, 768), "float32", "2:4", 1, 2, 3.5),
        ("linear", (1024, 4096), "float32", "1:128", 1576, 2, 34.0),
        ("linear", (768, 3072), "float32", "1:16", 196, 2, 10.0),
        ("linear", (768, 3072), "float32", "1:16", 17, 2, None),
        ("linear", (768, 3072), "float32", "1:5", 16, 2, None),
        ("linear", (768, 3072), "float32", "1:16", 196, 1, None),
        ("linear", (768, 768), "float32", "1:16", 196, 2, None),
        ("cold", (768, 3072), "float32", "1:32", 1, 2, 30.0),
        ("cold", (768, 3072), "float32", "1:16", 1, 2, None),
        ("cold", (768, 3072), "bfloat16", "1:32", 1, 2, None),
        ("bf16", (768, 3072), "bfloat16", "1:8", 196, 2, 4.9),
        ("bf16", (768, 3072), "bfloat16", "1:32", 196, 2, None),
        ("bf16", (768, 3072), "bfloat16", "1:8", 16, 2, None),
    ],
)
def test_goals_of_products(
    part: str, shape: tuple[int, int], dtype: str, pattern: str, tokens: int, threads: int, goal: float | None
) -> None:
    assert goals.of_product(part, shape, dtype, pattern, tokens, threads) == goal


def test_goals_of_masks_and_networks() -> None:
    assert goals.of_masks("16:128", (768, 3072), "float32", 2) == (20.0, None)
    assert goals.of_masks("1:8", (4096, 4096), "float32", 2) == (None, 0.8)
    assert goals.of_masks("1:8", (4096, 4096), "float32", 1) == (None, None)
    vit = "timm:vit_base_patch16_224"
    assert goals.of_model(vit, {"ff": "1:8"}, 1, 2) == 1.85
    assert goals.of_model(vit, {"ff": "1:8"}, 2, 2) is None
    assert goals.of_model(vit, {"ff": "1:16", "qkv": "1:16", "o": "1:16"}, 1, 2) == 3.0
    assert goals.of_model(vit, {"ff": "1:16", "q": "1:16", "k": "1:16", "v": "1:16", "o": "1:16"}, 1, 2) == 3.0
    assert goals.of_model(vit, {"ff": "1:16", "qkv": "1:8", "o": "1:16"}, 1, 2) is None
    assert goals.of_mask_share(vit, 4, 2) == 0.01
    assert goals.of_mask_share(vit, 8, 2) is None


def test_verdicts() -> None:
    assert Verdict("a", 2.0, 2.0).reached is True
    assert Verdict("a", 1.999, 2.0).reached is False
    assert Verdict("a", 2.0, None).reached is None
    assert Verdict("a", 0.01, 0.01, at_most=True).reached is True
    assert Verdict("a", 0.011, 0.01, at_most=True).reached is False
    assert Verdict("a", math.nan, 2.0).reached is False, "no figure is no goal reached"
    assert Verdict("a", math.nan, 2.0, at_most=True).reached is False
    assert goals.short([]) == goals.short([Verdict("a", 1.0, None)]) == ["no goals stand for these settings"]
    assert goals.short([Verdict("a", 1.0, None), Verdict("b", 3.0, 2.0)]) == ["every goal is reached (1)"]
    lines = goals.short([Verdict("fast", 3.0, 2.0), Verdict("slow", 1.25, 2.0), Verdict("a", 1.0, None)])
    assert lines == ["short of its goal, 1 of 2:", "  slow: 1.25, goal at least 2"]


def test_the_worst_shape_decides() -> None:
    slow = dataclasses.replace(CELL, shape=(768, 3072), over={DENSE: 7.0})
    other = dataclasses.replace(CELL, tokens=196, over={DENSE: 5.7}, goal=5.6)
    assert goals.worst([CELL, slow, other]) == [slow, other]
    assert [verdict.reached for verdict in goals.verdicts([CELL, slow, other], [MASK])] == [False, True, True]
    result = KernelResult(SETUP, 15, (CELL, slow, other), (), (MASK,))
    text = "\n".join(result.summary())
    assert "7.00 / 7.5 !" in text
    assert "5.70 / 5.6" in text
    assert "5.70 / 5.6 !" not in text
    assert "short of its goal, 1 of 3:" in text
    assert "worst shape 768x3072" in text.splitlines()[-1]
    assert "other work took a core in 1 of the rounds" in text
    assert "NO" not in CELL.line()
    assert "NO" in slow.line()
    cold = dataclasses.replace(CELL, part="cold", tokens=1, layers=24, of_bandwidth=0.6, read_gbs=36.4)
    assert "60% of reading at 36 GB/s" in cold.line()


# ------------------------------------------------------------------------------------------------- results
def test_results_survive_json_and_the_folder_holds_them(tmp_path: Path) -> None:
    cold = dataclasses.replace(CELL, part="cold", tokens=1, layers=24, of_bandwidth=0.6, goal=None, read_gbs=36.4)
    result = KernelResult(SETUP, 15, (CELL, cold, dataclasses.replace(CELL, tokens=196)), (CONVOLUTION,), (MASK,))
    paths = write(result, tmp_path / "new" / "folder")
    assert [path.name for path in paths] == ["results.json", "table.md", "plot.png"]
    assert KernelResult.from_dict(json.loads(paths[0].read_text(encoding="utf-8"))) == result
    page = paths[1].read_text(encoding="utf-8")
    assert "| 1:8 | 8.00 / 7.5 | 8.00 / 7.5 |" in page
    assert "| 3x3/2 64-128 of 56² | 1.50 |" in page
    assert "A Processor" in page
    assert paths[2].read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == sorted(p.name for p in paths)
    with pytest.raises(ValueError, match="no results of nmflow bench kernels"):
        KernelResult.from_dict({"format": "something else"})


def test_what_is_drawn_is_what_was_measured() -> None:
    from nmflow.report.plots_bench import kernels_figure

    slow = dataclasses.replace(CELL, shape=(768, 3072), over={DENSE: 6.0})
    many = dataclasses.replace(CELL, tokens=196, over={DENSE: 5.0}, of_peak=0.25)
    other = (256, 64, 1, 1, 56)
    unused = dataclasses.replace(CONVOLUTION, layer=other, over={CONV: 0.5, CONV_LAST: 0.6}, product=False)
    figure = kernels_figure(KernelResult(SETUP, 15, (CELL, slow, many), (CONVOLUTION, unused), (MASK,)).to_dict())
    products, convolutions, masks = figure.axes
    line, ceiling = products.lines[:2]
    assert list(line.get_ydata()) == [6.0, 5.0], "the worst shape at 16 tokens, then 196"
    assert list(ceiling.get_ydata()) == [12.0, 20.0]
    assert [list(line.get_ydata()) for line in convolutions.lines[:2]] == [[1.5, 0.5], [0.5]], "faster one; not taken"
    assert [bar.get_height() for bar in masks.patches] == [30.0]
    with pytest.raises(ValueError, match="nothing was measured"):
        kernels_figure(KernelResult(SETUP, 15, (), (), ()).to_dict())
