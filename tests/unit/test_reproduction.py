"""The paper's tables as they were typed in, the runs that a table asks for, and how both are laid side by side."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nmflow.experiments.catalogue import Table, catalogue, find_table
from nmflow.experiments.cells import Setup, setup
from nmflow.experiments.counted import Counted
from nmflow.experiments.paper import half_unit, paper_tables
from nmflow.experiments.reproduction import Place, Reproduction, Several, reproductions, state_lines
from nmflow.experiments.studies import SCALES, Study, StudyFolder, studies
from nmflow.experiments.trained import Trained
from nmflow.report.cost import Cost
from nmflow.report.curves import Curves
from nmflow.report.noise import Noise
from nmflow.report.side_by_side import Entry, SideBySide
from nmflow.report.tables import Cell, PlannedRun


# ---------------------------------------------------------------------------------------------- what was typed in
def test_the_printed_tables_agree_with_each_other() -> None:
    """Where the paper prints one number twice, it was typed in alike; table 12's means are those of its columns."""
    tables = paper_tables()
    for row, printed in tables["table-12"].rows.items():
        overall, cola, mnli, mismatched, *others = map(float, printed)
        f1, accuracy, qnli, qqp_f1, qqp_accuracy, rte, sst, pearson, spearman = others
        pairs = [(f1 + accuracy) / 2, (qqp_f1 + qqp_accuracy) / 2, (pearson + spearman) / 2]
        assert abs(sum([cola, mnli, mismatched, qnli, rte, sst, *pairs]) / 9 - overall) < 0.06, row
    for row in tables["table-4"].rows:
        for recipe in tables["table-4"].columns:
            in_12 = tables["table-12"].value(f"{recipe} dense=0.1 {row}", "overall")
            assert tables["table-4"].value(row, recipe) == in_12
    assert tables["table-7"].value("ff=1:32", "sr-ste") == tables["table-4"].value("ff=1:32", "sr-ste")
    linear = {row: tables["table-2"].value(row, "mdgf-linear") for row in tables["table-11"].rows}
    assert [linear["ff=2:4"], linear["ff=1:4"]] == [tables["table-11"].rows[row][1] for row in ("ff=2:4", "ff=1:4")]
    assert linear["ff=1:8"] == tables["table-11"].rows["ff=1:8"][0]
    assert tables["table-2"].value("ff=1:128", "sdgf-geometric") == "69.801"


@pytest.mark.parametrize("scale", SCALES)
def test_every_cell_of_every_table_can_be_configured(scale: str) -> None:
    for table in catalogue().values():
        if table.kind == "cells":
            assert table.setups()  # the words of every row and column can be read
        for name in table.studies.get(scale, {}).values():
            study = studies(scale)[name]
            for cell in (setup("dense"), *table.setups().values()):
                config = study.config(cell, study.rates[0], 1, Path("data"))
                assert config.build_recipe().name == cell.recipe
                assert "{" not in (config.data.path or "") + config.model.name
                assert config.seed == 1


def test_a_scale_or_table_that_there_is_not_is_named() -> None:
    with pytest.raises(ValueError, match='no scale "tpu"; there are cpu'):
        studies("tpu")
    with pytest.raises(ValueError, match='no table "table-20"; did you mean table-2'):
        find_table("table-20")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("ff=1:8", "found none"), ("ste idp ff=1:8", "found ste and idp"), ("ste", "needs targets"),
        ("dense ff=1:8", "has none"),
    ],
)  # fmt: skip
def test_words_that_are_no_cell(words: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        setup(words)


# ------------------------------------------------------------------------------------------------------- counted
@pytest.mark.parametrize("name", ["table-1", "table-17", "table-18"])
def test_tables_of_flops_are_exact_and_a_wrong_value_is_seen(name: str) -> None:
    pytest.importorskip("timm", reason="ViT-Base comes from timm, which is an extra")
    counted = Counted.of(find_table(name))
    assert counted.misses() == []
    assert "agree" in "\n".join(counted.lines())
    row, values = next(iter(counted.values.items()))
    unit = 2 * half_unit(counted.table.paper.rows[row][0])  # type: ignore[union-attr]  # these have one
    off = max(unit, 0.005 * values[0]) * 1.5
    wrong = replace(counted, values={**counted.values, row: (values[0] + off, *values[1:])})
    assert len(wrong.misses()) == 1
    assert "agree" not in "\n".join(wrong.lines())
    assert json.loads(json.dumps(wrong.to_dict()))["misses"] == wrong.misses()


# ---------------------------------------------------------------------------------------------- the runs of a table
STUDY = Study("cpu", "tiny", "a network", "small", 2, "ff=1:16", (0.1, 0.2, 0.4), {"data": "digits", "steps": 10})


def finish(folder: StudyFolder, cell: str, rate: float, seed: int, val: float, test: float, measure: str) -> None:
    run = folder.run(setup(cell), rate, seed)
    run.folder.path.mkdir(parents=True)
    result: dict[str, Any] = {"measure": measure, "val": {measure: val}, "test": {measure: test}}
    result["config"] = run.config.stored()
    run.folder.result.write_text(json.dumps(result))


@pytest.mark.parametrize(("measure", "chosen"), [("accuracy", 0.2), ("perplexity", 0.1)])
def test_a_recipe_runs_at_the_rate_that_was_best_on_validation(tmp_path: Path, measure: str, chosen: float) -> None:
    folder, cell = StudyFolder(STUDY, tmp_path, Path("data")), setup("ste ff=1:8")
    for rate, val, test in ((0.1, 0.3, 0.9), (0.2, 0.5, 0.1)):  # the test split says the opposite, and has no voice
        assert folder.rate(cell) is None
        assert folder.runs(cell) is None
        finish(folder, "ste ff=1:16", rate, 0, val, test, measure)
    finish(folder, "ste ff=1:16", 0.4, 0, 0.5 if chosen == 0.2 else 0.3, 0.5, measure)  # as good as the best, larger
    assert folder.rate(cell) == chosen
    assert folder.rate(setup("ste ff=1:8 dense=0.1")) == chosen  # options have the tries of their recipe
    assert folder.rate(setup("sr-ste ff=1:8")) is None
    runs = folder.runs(cell)
    assert runs is not None
    assert [(run.config.optim.lr, run.config.seed) for run in runs] == [(chosen, 0), (chosen, 1)]
    assert len({run.folder.path for run in runs} | {run.folder.path for run in folder.tries(cell)}) == 5


def test_runs_are_begun_in_order_and_counted_once(tmp_path: Path) -> None:
    folder = StudyFolder(STUDY, tmp_path, Path("data"))
    cells = [setup("dense"), setup("ste ff=1:16"), setup("ste ff=1:32")]
    # 3 tries of each recipe; the first seed of dense and of 1:16 is one of them
    assert folder.count(cells) == (0, 3 + 3 + 1 + 1 + 2)
    assert [run.config.optim.lr for run in folder.open_runs(cells)] == [0.1, 0.2, 0.4] * 2
    for rate in STUDY.rates:
        finish(folder, "ste ff=1:16", rate, 0, rate, 0.5, "accuracy")
    assert folder.count(cells) == (3, 10)
    names = [run.label for run in folder.open_runs(cells)]
    assert names[:3] == [f"tiny dense lr {rate} seed 0" for rate in (0.1, 0.2, 0.4)]
    assert names[3:] == [f"tiny ste {at} lr 0.4 seed {seed}" for at, seed in
                         (("ff=1:32", 0), ("ff=1:16", 1), ("ff=1:32", 1))]  # fmt: skip
    assert [cell.n for cell in folder.results(cells)] == [0, 1, 0]
    assert [cell.missing for cell in folder.results(cells)] == [(0, 1), (1,), (0, 1)]


def test_a_try_that_diverged_has_lost_and_is_not_begun_again(tmp_path: Path) -> None:
    folder, cell = StudyFolder(STUDY, tmp_path, Path("data")), setup("ste ff=1:8")
    finish(folder, "ste ff=1:16", 0.1, 0, 0.3, 0.3, "accuracy")
    finish(folder, "ste ff=1:16", 0.2, 0, 0.4, 0.4, "accuracy")
    last = folder.tries(cell)[2]
    last.folder.path.mkdir()
    assert folder.rate(cell) is None
    last.give_up("step 3: loss NaN or inf")
    assert folder.rate(cell) == 0.2
    assert last not in folder.open_runs([cell])
    assert folder.count([cell]) == (3, 5)


def test_runs_of_other_settings_are_refused(tmp_path: Path) -> None:
    """A study that was changed, or runs that somebody moved there, would make a table of two kinds of runs."""
    before = StudyFolder(STUDY, tmp_path, Path("data"))
    for rate in STUDY.rates:
        finish(before, "ste ff=1:16", rate, 0, rate, 0.5, "accuracy")
    cells = [setup("ste ff=1:16")]
    free = dict.fromkeys(("log_every", "eval_every", "checkpoint_every", "probe_every"), 1)
    moved = StudyFolder(replace(STUDY, settings={**STUDY.settings, **free}), tmp_path, Path("elsewhere"))
    assert moved.results(cells)[0].n == 1  # what changes no figure is no other setting
    tails = StudyFolder(replace(STUDY, settings={**STUDY.settings, "remainder": "partial"}), tmp_path, Path("data"))
    assert tails.results(cells)[0].n == 1  # what was done where remainders are refused had none
    longer = StudyFolder(replace(STUDY, settings={"data": "digits", "steps": 11}), tmp_path, Path("data"))
    for ask in (longer.results, longer.open_runs, longer.count):
        with pytest.raises(ValueError, match="done with another steps than the study has now"):
            ask(cells)
    single = StudyFolder(replace(longer.study, rates=(0.1,)), tmp_path, Path("data"))
    with pytest.raises(ValueError, match="another steps"):
        single.results(cells)


def test_runs_that_may_have_had_remainders_are_not_taken_where_they_are_refused(tmp_path: Path) -> None:
    tails = StudyFolder(replace(STUDY, settings={**STUDY.settings, "remainder": "partial"}), tmp_path, Path("data"))
    for rate in STUDY.rates:
        finish(tails, "ste ff=1:16", rate, 0, rate, 0.5, "accuracy")
    with pytest.raises(ValueError, match="done with another remainder than"):
        StudyFolder(STUDY, tmp_path, Path("data")).results([setup("ste ff=1:16")])


def test_a_single_rate_is_taken_without_tries(tmp_path: Path) -> None:
    folder = StudyFolder(replace(STUDY, rates=(0.3,)), tmp_path, Path("data"))
    assert folder.tries(setup("ste ff=1:8")) == []
    assert folder.rate(setup("ste ff=1:8")) == 0.3
    assert folder.count([setup("ste ff=1:8")]) == (0, 2)


def test_a_dense_run_is_looked_at_where_the_others_are_sparse() -> None:
    config = STUDY.config(setup("dense"), 0.1, 0, Path("data"))
    assert (config.recipe, config.targets, config.baseline) == ("dense", {"ff": "1:16"}, False)
    config = STUDY.config(setup("mdgf-linear dense=0.1 ff=1:8 qk=1:4"), 0.1, 0, Path("data"))
    assert (config.recipe, config.targets) == ({"name": "mdgf-linear", "dense": 0.1}, {"ff": "1:8", "qk": "1:4"})


def test_tables_that_share_runs_have_them_done_once(tmp_path: Path) -> None:
    place = Place("cpu", tmp_path, Path("data"))
    both = reproductions(["baselines", "language-model", "baselines"], place)
    assert [part.table.name for part in both] == ["baselines", "language-model"]
    trained = [part.trained for part in both if part.trained is not None]
    one, two = ({run.folder.path for run in part.open_runs()} for part in trained)
    assert one & two
    assert {run.folder.path for run in Several(tuple(trained)).open_runs()} == one | two
    for scale, to_come in (("cpu", False), ("paper", True)):  # our own tables have no setting of the paper's
        lines = state_lines(reproductions(["all"], replace(place, scale=scale)))
        assert len(lines) == len(catalogue())
        assert any("to come" in line for line in lines) == to_come
    assert Reproduction(find_table("table-18"), place).state == "counted"


def finish_glue(path: Path, mrpc: tuple[float, float], sst: float) -> None:
    """Every run of both tasks that there are, at 1:32 as good as said, else better by 0.1."""
    for task, measures in (("mrpc", {"f1": mrpc[0], "accuracy": mrpc[1]}), ("sst-2", {"accuracy": sst})):
        folder = Place("cpu", path, Path("data")).study(task)
        table = find_table("table-4")
        cells = [setup("dense"), *table.setups().values()]
        while runs := folder.open_runs(cells):
            for run in runs:
                run.folder.path.mkdir(parents=True)
                better = 0.0 if run.config.targets == {"ff": "1:32"} else 0.1
                found = {name: value + better + 0.01 * run.config.seed for name, value in measures.items()}
                main = {"score": (found["f1"] + found["accuracy"]) / 2, **found} if task == "mrpc" else found
                result = {"measure": next(iter(main)), "val": main, "test": main, "config": run.config.stored()}
                run.folder.result.write_text(json.dumps(result))


def test_tables_of_glue_are_means_over_tasks_or_columns_by_task(tmp_path: Path) -> None:
    place = Place("cpu", tmp_path, Path("data"))
    finish_glue(tmp_path, (0.5, 0.4), 0.6)
    trained = [Reproduction(find_table(name), place).trained for name in ("table-4", "table-12")]
    means, tasks = (each.result() for each in trained if each is not None)
    by_place = {(entry.row, entry.column): entry for entry in means.entries}
    entry = by_place["ff=1:32", "sdgf-stepwise"]
    assert (entry.paper, entry.cell.n) == ("80.9", 3)
    assert entry.cell.mean == pytest.approx(((0.5 + 0.4) / 2 + 0.6) / 2 + 0.01)  # seeds add 0, 0.01 and 0.02
    assert means.dense is not None
    assert (means.paper_dense, means.dense.mean) == ("86.2", pytest.approx(0.525 + 0.1 + 0.01))
    assert by_place["ff=1:4", "sr-ste"].cell.mean == pytest.approx(0.635)
    by_place = {(entry.row, entry.column): entry for entry in tasks.entries}
    row = "sdgf-stepwise dense=0.1 ff=1:32"
    expected = {"MRPC F1": 0.51, "MRPC accuracy": 0.41, "SST-2": 0.61, "overall": 0.535}
    for column, value in expected.items():
        assert by_place[row, column].cell.mean == pytest.approx(value), column
    assert by_place[row, "CoLA"].cell.n == 0
    assert by_place["sr-ste dense=0 ff=1:32", "SST-2"].cell.n == 0  # another setup, of which nothing is done
    assert tasks.dense is None
    assert "missing" in "\n".join(tasks.lines())


# ---------------------------------------------------------------------------------------------------- side by side
def cell(recipe: str, values: list[float | None], measure: str = "accuracy") -> Cell:
    return Cell.of(recipe, "ff=1:8", dict(enumerate(values)), measure)


def beside(measure: str = "accuracy") -> SideBySide:
    rows = [("a", "3", [0.90, 0.92]), ("b", "2", [0.80, 0.82]), ("c", "1", [0.81, 0.83]), ("d", "1", [None, None])]
    entries = [Entry("ff=1:8", name, cell(name, [*values], measure), paper) for name, paper, values in rows]
    return SideBySide("a table", tuple(entries), paper_measure="accuracy, %")


def test_the_order_of_recipes_is_compared_where_runs_tell_them_apart() -> None:
    """a > b and a > c as printed; b, c: 0.01 apart, standard error 0.0141; d: missing; c and d: printed alike."""
    order = beside().order()
    assert (order.same, order.other, order.unclear, order.missing) == (2, 0, 1, 2)
    assert order.text().startswith("order as in the paper: 2 of the 2 pairs that the runs tell apart; 1 lie within 2")
    assert "2 missing" in order.text()
    assert (beside("perplexity").order().same, beside("perplexity").order().other) == (0, 2)


def test_a_gap_of_just_over_two_standard_errors_is_told_apart() -> None:
    error = math.sqrt(2 * 0.02**2 / 2 / 2)  # two runs each, 0.02 apart: sd² = 0.02² / 2
    for gap, told in ((1.99, 0), (2.01, 1)):
        pair = [cell("a", [0.5 + gap * error, 0.52 + gap * error]), cell("b", [0.5, 0.52])]
        table = SideBySide("", (Entry("r", "a", pair[0], "2"), Entry("r", "b", pair[1], "1")))
        assert table.order().same == told
        assert table.best() == {"r": ["a", "b"][: 2 - told]}


def test_one_run_alone_tells_nothing_apart() -> None:
    table = SideBySide("", (Entry("r", "a", cell("a", [0.9]), "2"), Entry("r", "b", cell("b", [0.1]), "1")))
    assert (table.order().same, table.order().unclear) == (0, 1)


def test_what_is_printed() -> None:
    lines = replace(beside(), dense=cell("dense", [0.95, 0.97]), paper_dense="4").lines()
    assert "| ff=1:8 | 3 / 91.00 ± 1.41 | 2 / 81.00 ± 1.41 | 1 / 82.00 ± 1.41 | 1 / missing |" in lines
    assert "dense: 4 / 96.00 ± 1.41" in lines
    assert json.loads(json.dumps(beside().to_dict()))["order"]["same"] == 2
    alone = SideBySide("ours", (Entry("r", "a", cell("a", [0.9, None])),))
    assert beside().best() == {"ff=1:8": ["a"]}
    assert beside("perplexity").best() == {"ff=1:8": ["b", "c"]}
    assert "best at ff=1:8: b, not told from c" in beside("perplexity").lines()
    assert any("90.00 (n 1)" in line and "/" not in line for line in alone.lines())
    assert not any("order" in line for line in alone.lines())


def test_setup_texts_read_back() -> None:
    for words in ("dense", "mdgf-linear dense=0.05 ff=1:8 qk=1:4", "sdgf-stepwise pruned_gradient=decay ff=1:16"):
        found = setup(words)
        assert setup(found.text) == found
    assert setup("dense") == Setup("dense")


# ----------------------------------------------------------------------------------------------------------- noise
def probed(folder: Path, values: dict[int, float]) -> Path:
    """A run that is done, with these running averages of Var(v) and a tenth of them of Var(abs(g))."""
    folder.mkdir()
    (folder / "result.json").write_text("{}")
    lines: list[dict[str, Any]] = [{"step": 0, "loss": 1.0}]
    for step, value in values.items():
        averages = {"second_moment_var_average": value, "grad_abs_var_average": value / 10}
        lines.append({"step": step, "grad_abs_var": 1.0, "second_moment_var": 1.0, **averages})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def noise(folder: Path, ends: list[float]) -> Noise:
    """a starts at 8e-20 and ends at `ends`, b is 2e-20 throughout; a seed each."""
    runs = []
    for seed, end in enumerate(ends):
        a = probed(folder / f"a{seed}", {10: 9e-20, 50: 8e-20, 60: 1e-20, 100: end})
        b = probed(folder / f"b{seed}", {50: 2e-20, 100: 2e-20})
        runs += [PlannedRun("a", "1:16", seed, a), PlannedRun("b", "1:16", seed, b)]
    return Noise("figure-3", "a", "b", tuple(runs))


def test_noise_is_compared_seed_by_seed_half_way_and_at_the_end(tmp_path: Path) -> None:
    found = noise(tmp_path, [1e-20, 0.5e-20, 0.25e-20])  # at the end 1/2, 1/4 and 1/8 of b
    by_place = {(each.quantity, each.part): each for each in found.ratios()}
    assert len(by_place) == 4
    for quantity in ("second_moment_var_average", "grad_abs_var_average"):
        half, end = by_place[quantity, 0.5], by_place[quantity, 1.0]
        assert (half.ratio, half.lowest, half.highest, half.n) == (*[pytest.approx(4.0)] * 3, 3)
        assert [end.ratio, end.lowest, end.highest] == pytest.approx([1 / 4, 1 / 8, 1 / 2])
        assert end.told  # log2: -2 with a standard deviation of 1 over 3 seeds, so 3.5 standard errors
    assert found.verdict()[0] == "Var(v) at the end: that of b is 4 times that of a"
    assert found.draw(tmp_path / "noise.png")
    assert (tmp_path / "noise.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(json.dumps(found.to_dict()))["verdict"] == found.verdict()


def test_noise_that_seeds_do_not_tell_apart_or_that_nobody_measured(tmp_path: Path) -> None:
    apart = noise(tmp_path, [8e-20, 0.5e-20])  # four times, and a quarter
    assert [each.told for each in apart.ratios() if each.part == 1.0] == [False, False]
    assert "the 2 seeds do not tell a from b" in apart.verdict()[0]
    one = Noise("", "a", "b", apart.runs[:2])
    assert not any(each.told for each in one.ratios())
    for run in apart.runs:
        (run.folder / "result.json").unlink()
    assert apart.ratios() == []
    assert not apart.draw(tmp_path / "none.png")
    assert "no run of both recipes is done" in apart.lines()


def test_noise_is_compared_at_the_same_learning_rate(tmp_path: Path) -> None:
    """a is told from b where each has its own rate, and less so, the other way, where they have the same."""
    (tmp_path / "own").mkdir()
    own = noise(tmp_path / "own", [8e-20, 8.8e-20])
    slow = [PlannedRun("a", "1:16", seed, probed(tmp_path / f"as{seed}", {5: 1e-20, 10: 1e-20})) for seed in (0, 1)]
    b = [run for run in own.runs if run.recipe == "b"]
    nowhere = [PlannedRun(recipe, "1:16", 0, tmp_path / "nowhere") for recipe in ("a", "b")]
    by_rate = {0.1: (*own.runs,), 0.2: (*slow, *b[:1]), 0.4: tuple(nowhere)}
    found = replace(own, by_rate=by_rate, chosen={"a": 0.1, "b": 0.2})
    ratios = found.at_same_rate()
    assert list(ratios) == [0.1, 0.2]  # nobody ran at 0.4
    assert ratios[0.1] == own.ratios()
    assert [(each.ratio, each.n) for each in ratios[0.2]] == [(pytest.approx(0.5), 1)] * 4
    assert found.verdict()[:2] == own.verdict()
    assert found.verdict()[2] == "but a chose the learning rate 0.1, b 0.2, on which noise depends too"
    assert len(replace(found, chosen={"a": 0.1, "b": 0.1}).verdict()) == 2
    text = found.lines()
    [first], [second] = ([line for line in text if line.startswith(f"| {rate} ")] for rate in (0.1, 0.2))
    assert [word.strip() for word in first.split("|")[-3:-1]] == ["2", "Var(v), Var(abs(g))"]
    assert [word.strip() for word in second.split("|")[2:-1]] == ["0.5", "0.5", "0.5", "0.5", "1", "-"]
    stored = json.loads(json.dumps(found.to_dict()))
    assert stored["rates"] == {"a": 0.1, "b": 0.2}
    assert [each["rate"] for each in stored["same_rate"]] == [0.1, 0.2]


def test_a_table_of_noise_asks_for_both_recipes_at_both_rates(tmp_path: Path) -> None:
    """Once it is known which they chose; each with every seed, and none twice."""
    folder = StudyFolder(STUDY, tmp_path, Path("data"))
    table = Table("noise", "noise", "noise", ("ff=1:16",), ("sr-ste", "mdgf-exponential"))
    trained = Trained(table, {"": folder})
    for recipe in ("dense", "sr-ste ff=1:16", "mdgf-exponential ff=1:16"):
        assert not any("seed 1" in run.label for run in trained.open_runs() if recipe in run.label)
        for rate in STUDY.rates:
            best = 0.1 if recipe.startswith("sr-ste") else 0.4
            finish(folder, recipe, rate, 0, float(rate == best), 0.5, "accuracy")
    labels = [run.label.removeprefix("tiny ") for run in trained.open_runs()]
    assert labels == [
        "dense lr 0.4 seed 1", "sr-ste ff=1:16 lr 0.1 seed 1", "mdgf-exponential ff=1:16 lr 0.4 seed 1",
        "sr-ste ff=1:16 lr 0.4 seed 1", "mdgf-exponential ff=1:16 lr 0.1 seed 1",
    ]  # fmt: skip
    assert trained.count() == (9, 14)
    finish(folder, "sr-ste ff=1:16", 0.4, 1, 0.0, 0.5, "accuracy")
    assert trained.count() == (10, 14)
    result = trained.result()
    assert isinstance(result, Noise)
    assert result.chosen == {"sr-ste": 0.1, "mdgf-exponential": 0.4}
    assert {rate: len(runs) for rate, runs in result.by_rate.items()} == {0.1: 4, 0.2: 4, 0.4: 4}
    stored = folder.run(setup("sr-ste ff=1:16"), 0.4, 1).folder.result
    stored.write_text(stored.read_text().replace('"steps": 10', '"steps": 20'))
    with pytest.raises(ValueError, match="done with another steps"):
        trained.result()


# ------------------------------------------------------------------------------------------------- cost and curves
def done_run(folder: Path, recipe: str, pattern: str, seed: int, value: float, flops: int) -> PlannedRun:
    path = folder / f"{recipe}-{pattern.replace(':', '-')}-{seed}"
    path.mkdir(parents=True)
    cost = {"forward": {"sparse": flops}, "training": {"sparse": 10 * flops}}
    result = {"measure": "accuracy", "test": {"accuracy": value}, "flops": cost}
    (path / "result.json").write_text(json.dumps(result))
    lines = [{"step": 0, "loss": 1.0}, {"step": 5, "val_accuracy": value / 2}, {"step": 10, "val_accuracy": value}]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return PlannedRun(recipe, pattern, seed, path)


def test_the_front_is_what_nothing_cheaper_reaches(tmp_path: Path) -> None:
    """a at 100 is the cheapest; b at 100 is worse; c at 200 is no better than a; d at 300 is better than all."""
    points = [("a", 100, 0.8), ("b", 100, 0.7), ("c", 200, 0.8), ("d", 300, 0.9), ("e", 400, 0.85)]
    runs = [
        done_run(tmp_path, recipe, "1:8", seed, value + shift, flops)
        for recipe, flops, value in points
        for seed, shift in ((0, -0.01), (1, 0.01))
    ]
    missing = PlannedRun("f", "1:8", 0, tmp_path / "nothing")
    for axis, times in (("forward", 1), ("training", 10)):
        cost = Cost("figure-5", axis, (*runs, missing))  # type: ignore[arg-type]  # both are axes
        assert [(point.cell.recipe, point.flops) for point in cost.front()] == [("a", 100 * times), ("d", 300 * times)]
        assert len(cost.points()) == 5
        assert sum("yes" in line for line in cost.lines()) == 2
        assert cost.draw(tmp_path / "cost.png")
        assert json.loads(json.dumps(cost.to_dict()))["points"][0]["flops"] == 100 * times
    assert not Cost("", "forward", (missing,)).draw(tmp_path / "none.png")
    assert "no run is done" in Cost("", "forward", (missing,)).lines()


def test_curves_are_means_at_the_steps_that_all_runs_have(tmp_path: Path) -> None:
    runs = [done_run(tmp_path, "ste", "1:8", seed, value, 1) for seed, value in ((0, 0.4), (1, 0.8))]
    with (runs[1].folder / "metrics.jsonl").open("a") as log:
        log.write(json.dumps({"step": 12, "val_accuracy": 1.0}) + "\n")
    dense = done_run(tmp_path, "dense", "dense", 0, 0.9, 1)
    found = Curves("figure-6", {"MRPC": (dense, *runs), "SST-2": (PlannedRun("ste", "1:8", 0, tmp_path / "no"),)})
    [(name, curves)] = found.curves().items()
    assert (name, [curve.n for curve in curves]) == ("MRPC", [1, 2])
    assert list(curves[1].values) == [5, 10]
    assert [curves[1].mean(step) for step in (5, 10)] == pytest.approx([0.3, 0.6])
    assert any("30.00" in line and "60.00" in line for line in found.lines())
    assert found.draw(tmp_path / "curves.png")
    assert json.loads(json.dumps(found.to_dict()))["curves"]["MRPC"][1]["values"] == [[0.2, 0.4], [0.4, 0.8]]
    assert not Curves("", {"a": ()}).draw(tmp_path / "none.png")


# ---------------------------------------------------------------------------------------------------------- timed
def machine() -> dict[str, Any]:
    return {"machine": {"cpu": "a CPU", "threads": 2, "isa": "avx2", "torch": "2.10"}}


def test_speeds_of_networks_are_read_row_by_row(tmp_path: Path) -> None:
    part = Reproduction(find_table("table-8"), Place("cpu", tmp_path, Path("data")))
    assert (part.state, part.is_unfilled) == ("0 of 6 rows", False)
    assert Reproduction(part.table, replace(part.place, scale="paper")).state == "to come"
    assert part.timed is not None
    file = part.timed.files["ff=1:8"]
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"speed_up": 2.345, "setup": machine()}))
    assert part.state == "1 of 6 rows"
    lines = part.result().lines()
    assert ["|", "ff=1:8", "|", "3.019", "|", "2.958", "|", "2.35", "|"] in [line.split() for line in lines]
    assert sum("missing" in line for line in lines) == 5
    assert "here: a CPU, 2 threads, avx2, torch 2.10" in lines


def test_speeds_of_products_are_over_2_4_both_products_together(tmp_path: Path) -> None:
    """2:4 takes 30 + 50, 1:8 takes 10 + 6: five times as fast, where the mean of the ratios would be 5.7."""
    part = Reproduction(find_table("table-19"), Place("cpu", tmp_path, Path("data")))
    assert part.timed is not None
    times = {"2:4": (30.0, 50.0), "1:8": (10.0, 6.0), "1:4": (20.0, 20.0), "1:16": (8.0, 8.0), "1:32": (4.0, 4.0),
             "1:128": (2.0, 2.0)}  # fmt: skip
    cells = [
        {"pattern": pattern, "us": {"nmflow": us, "F.linear": 99.0}} for pattern, both in times.items() for us in both
    ]
    part.place.table("table-19").mkdir(parents=True)
    part.timed.files["ff=1:8"].write_text(json.dumps({"cells": cells, "setup": machine()}))
    rows = {row["row"]: row for row in part.result().to_dict()["rows"]}
    assert rows["ff=1:8"]["ours"] == {"here": 5.0}
    paper = {"V100": "1.83", "A100": "1.85", "GH200": "1.80"}
    assert rows["ff=1:4"] == {"row": "ff=1:4", "paper": paper, "ours": {"here": 2.0}}
    assert part.state == "5 of 5 rows"


def on_gpu(table: str, tmp_path: Path, times: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Ours by row, where these were the microseconds of the cells of each pattern."""
    part = Reproduction(find_table(table), Place("gpu", tmp_path, Path("data")))
    assert part.timed is not None
    assert "missing" in part.result().lines()[4]  # nothing is measured yet
    cells = [{"place": {"pattern": pattern}, "us": us} for pattern, both in times.items() for us in both]
    setup = {"device": "A GPU", "torch": "2.15", "cuda": "13.2", "triton": "3.9"}
    part.place.table(table).mkdir(parents=True)
    part.timed.files["ff=1:8"].write_text(json.dumps({"cells": cells, "setup": setup}))
    assert part.state == f"{len(part.table.rows)} of {len(part.table.rows)} rows"
    assert "here: A GPU, torch 2.15, CUDA 13.2, Triton 3.9" in part.result().lines()
    return {row["row"]: row["ours"] for row in part.result().to_dict()["rows"]}


def test_speeds_of_products_on_a_gpu_stand_beside_a_dense_product(tmp_path: Path) -> None:
    """CSR: 2:4 takes 90, 1:8 takes 30. Dense: 20. Ours: 16 at 1:8. What failed at one shape is missing."""
    times = {
        "2:4": [{"cuSPARSE CSR": 40.0, "F.linear": 10.0, "nmflow": 10.0}, {"cuSPARSE CSR": 50.0, "F.linear": 10.0}],
        "1:8": [{"cuSPARSE CSR": 10.0, "F.linear": 10.0, "nmflow": 6.0}] * 2,
    }
    times["1:8"][1] = {"cuSPARSE CSR": 20.0, "F.linear": 10.0, "nmflow": 10.0}
    found = on_gpu("table-19", tmp_path, times)
    wanted = {"CSR over CSR at 2:4": 3.0, "CSR over dense": 20 / 30, "nmflow over dense": 1.25}
    assert found["ff=1:8"] == pytest.approx(wanted)
    assert set(found["ff=1:16"].values()) == {None}


def test_speeds_of_networks_on_a_gpu_are_over_both_dense_ones(tmp_path: Path) -> None:
    times = {"1:8": [{"dense, eager": 30.0, "dense, compiled": 20.0, "nmflow": 10.0}], "2:4": [{}]}
    found = on_gpu("table-8", tmp_path, times)
    assert found["ff=1:8"] == {"over dense, compiled": 2.0, "over dense, eager": 3.0}
    assert set(found["ff=2:4"].values()) == {None}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_without_a_gpu_its_tables_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    part = Reproduction(find_table("table-19"), Place("gpu", tmp_path / "out", Path("data")))
    assert part.timed is not None
    with pytest.raises(ValueError, match="no CUDA device to measure; --scale cpu"):
        part.timed.measure(lambda line: None)
    assert not (tmp_path / "out").exists()
