"""Tables, plots and pages say what the files say: figures by hand, drawn lines point by point."""

from __future__ import annotations

import json
import statistics
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import same_color

from nmflow.report.folder import RunFolder, read_json, read_metrics
from nmflow.report.page import write_page
from nmflow.report.plots import DENSE, compare_figure, plot_compare, plot_training, table_figure, training_figure
from nmflow.report.tables import (
    Cell,
    PlannedRun,
    read_cells,
    result_lines,
    table_lines,
    table_to_json,
)


def state(step, decay, density, phase, pattern, **more):
    return {"step": step, "decay": decay, "density": density, "phase": phase, "pattern": pattern, "flips": 0, **more}


SPARSE = [
    state(0, 1.0, 1.0, "dense", "dense"),
    state(10, 1.0, 1.0, "decay", "1:4", loss=2.0, lr=0.1, grad_norm=1.0),
    state(20, 0.5, 1.0, "decay", "1:4", loss=1.5, lr=0.1, grad_norm=1.0),
    {"step": 20, "val_loss": 1.4, "val_accuracy": 0.5},
    state(30, 0.0, 0.25, "fine-tune", "1:4", loss=1.2, lr=0.1, grad_norm=1.0),
    state(40, 0.0, 0.25, "fine-tune", "1:4", loss=1.0, lr=0.1, grad_norm=1.0),
    {"step": 40, "val_loss": 0.9, "val_accuracy": 0.8},
]
BASELINE = [
    state(0, 1.0, 1.0, "dense", "dense"),
    state(40, 1.0, 1.0, "dense", "dense", loss=0.7, lr=0.1, grad_norm=1.0),
    {"step": 40, "val_loss": 0.6, "val_accuracy": 0.9},
]


def score(right, items=50, loss=0.25):
    return {"loss": loss, "accuracy": right / items, "items": items}


RESULT = {
    "format": 1,
    "config": {"data": {"name": "digits", "path": "<i>&amp;"}, "recipe": "mdgf-linear", "optim": {"lr": 0.001}},
    "data": "digits: <all> of them",
    "model": "vit-tiny",
    "parameters": 12345,
    "pattern": "1:4",
    "steps": 40,
    "seed": 3,
    "seconds": 61.25,
    "val": score(40),
    "test": score(41, loss=0.5125),
    "sparsity": {"density": 0.25, "weights": 1000},
    "verify": {
        "ok": True,
        "layers": [
            {"label": "a.weight", "pattern": "1:4", "blocks": 1200, "broken": 0, "first": []},
            {"label": "b.weight[0:8]", "pattern": "1:4", "blocks": 34, "broken": 0, "first": []},
        ],
    },
    "compressed": {
        "test": score(41),
        "layers": [{"name": "a.weight", "pattern": "1:4", "bytes_before": 4800, "bytes_after": 1500, "kernel": "x"}],
        "bytes_before": 9000,
        "bytes_after": 4000,
    },
    "dense": {"test": score(45), "seconds": 50.0},
}


def write_run(path: Path, result=None, lines=(), baseline=()):
    folder = RunFolder(path)
    for place, log in ((folder, lines), (folder.dense, baseline)):
        if log:
            place.path.mkdir(parents=True, exist_ok=True)
            place.metrics.write_text("".join(json.dumps(line) + "\n" for line in log))
    path.mkdir(parents=True, exist_ok=True)
    if result is not None:
        folder.result.write_text(json.dumps(result))
    folder.environment.write_text(json.dumps({"nmflow": "0.1.0", "packages": {"torch": "2.15.0"}, "commit": None}))
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_run(tmp_path / "run", RESULT, SPARSE, BASELINE)


# -- reading -----------------------------------------------------------------------------------------------------


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\n[2]\n')
    with pytest.raises(ValueError, match="line 2"):
        read_metrics(path)
    path.write_text('{"step": 1}\nnonsense\n')
    with pytest.raises(ValueError, match="line 2"):
        read_metrics(path)


def test_json_that_is_none(tmp_path):
    (tmp_path / "x.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"x\.json: expected a JSON object"):
        read_json(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match=r"x\.json: no JSON"):
        read_json(tmp_path / "x.json")


# -- the last lines of a run -------------------------------------------------------------------------------------


def test_result_lines(folder):
    assert result_lines(folder) == [
        "dense test accuracy:  90.0 % (45 of 50)",
        "sparse test accuracy: 82.0 % (41 of 50), 1:4 by mdgf-linear",
        "compressed:           82.0 % (41 of 50), measured from the compressed file",
        "verified: 2 of 2 layers are N:M",
        "bytes: 9,000 -> 4,000 (2.25 times smaller)",
        f"run folder: {folder.path}",
        f"plot: {folder.plot}",
        f"report: {folder.page}",
    ]


def test_result_lines_of_a_dense_run(tmp_path):
    alone = {**RESULT, "compressed": None, "verify": None, "dense": None}
    lines = result_lines(write_run(tmp_path, alone))
    assert lines[0] == "dense test accuracy:  82.0 % (41 of 50)"
    assert lines[1].startswith("run folder")


# -- the table of many runs --------------------------------------------------------------------------------------


def planned(tmp_path, recipe, pattern, accuracies):
    runs = []
    for seed, accuracy in enumerate(accuracies):
        path = tmp_path / f"{recipe}-{pattern}-{seed}"
        if accuracy is not None:
            write_run(path, {"test": {"accuracy": accuracy}})
        runs.append(PlannedRun(recipe, pattern, seed, path))
    return runs


@pytest.fixture
def cells(tmp_path):
    return read_cells(
        planned(tmp_path, "dense", "dense", [0.9, 0.92])
        + planned(tmp_path, "ste", "1:4", [0.7, 0.8, 0.9])
        + planned(tmp_path, "idp", "1:4", [None, 0.85, None])
        + planned(tmp_path, "ste", "1:8", [None, None])
    )


def test_cells_by_hand(cells):
    dense, ste, idp, none = cells
    assert (ste.n, ste.mean, ste.sd, ste.min, ste.max) == (3, pytest.approx(0.8), pytest.approx(0.1), 0.7, 0.9)
    assert (dense.n, dense.mean, dense.sd) == (2, pytest.approx(0.91), pytest.approx(0.01 * 2**0.5))
    assert (idp.n, idp.mean, idp.sd, idp.missing) == (1, 0.85, None, (0, 2))
    assert (none.n, none.mean, none.sd, none.min, none.missing) == (0, None, None, None, (0, 1))


@settings(max_examples=25)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=9))
def test_spread(tmp_path_factory, accuracies):
    [cell] = read_cells(planned(tmp_path_factory.mktemp("runs"), "ste", "1:4", accuracies))
    assert cell.mean == pytest.approx(sum(accuracies) / len(accuracies))
    assert cell.sd**2 * (cell.n - 1) == pytest.approx(sum((a - cell.mean) ** 2 for a in accuracies), abs=1e-12)
    assert cell.sd == pytest.approx(statistics.stdev(accuracies))


def test_table_in_text(cells):
    assert [[word.strip() for word in line.strip("|").split("|")] for line in table_lines(cells)[2:]] == [
        ["dense", "dense", "91.00 ± 1.41", "2", "90.00", "92.00", ""],
        ["1:4", "ste", "80.00 ± 10.00", "3", "70.00", "90.00", "-11.00"],
        ["1:4", "idp", "85.00", "1 of 3", "85.00", "85.00", "-6.00"],
        ["1:8", "ste", "missing", "0 of 2", "", "", ""],
    ]
    assert len({len(line) for line in table_lines(cells)}) == 1


def test_table_as_data(cells):
    data = json.loads(json.dumps(table_to_json(cells)))
    assert [cell["missing"] for cell in data["cells"]] == [[], [], [0, 2], [0, 1]]
    assert data["cells"][1]["values"] == [0.7, 0.8, 0.9]
    assert "n - 1" in data["sd"]


# -- plots -------------------------------------------------------------------------------------------------------


def drawn(axes, colour=None):
    """Points of the lines of an axes, those of one colour."""
    return [
        list(zip(*line.get_data(), strict=True))
        for line in axes.lines
        if colour is None or same_color(line.get_color(), colour)
    ]


def test_training_figure_draws_the_log(folder):
    decay, density, loss, accuracy = training_figure(folder.path).axes
    # jumps where phase or pattern change, straight lines within
    assert drawn(decay) == [[(0, 1), (10, 1), (10, 1), (20, 0.5), (30, 0.5), (30, 0), (40, 0)]]
    assert drawn(density) == [[(0, 1), (10, 1), (10, 1), (20, 1), (30, 1), (30, 0.25), (40, 0.25)]]
    assert drawn(loss, DENSE) == [[(40, 0.7)], [(40, 0.6)]]
    assert [(10, 2.0), (20, 1.5), (30, 1.2), (40, 1.0)] in drawn(loss)
    assert [(20, 1.4), (40, 0.9)] in drawn(loss)
    assert drawn(accuracy, DENSE) == [[(40, 0.9)]]
    assert [(20, 0.5), (40, 0.8)] in drawn(accuracy)
    assert accuracy.yaxis.get_major_formatter()(0.99) == "99 %"
    assert accuracy.yaxis.get_major_formatter()(0.985) == "98.5 %"
    assert accuracy.get_xlim() == (0, 40)
    assert [text.get_text() for text in decay.texts] == ["dense", "decay", "fine-tune"]
    assert [text.get_text() for text in density.texts] == ["1:4"]
    for axes in (decay, density, loss, accuracy):
        edges = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in axes.patches]
        assert edges == [(0, 10), (10, 30), (30, 40)]


def test_legends_leave_the_curves_alone(tmp_path):
    """A loss that rises, and an accuracy that falls, where a legend in a fixed corner would lie on them."""
    steps = [{**SPARSE[0], "step": step} for step in range(0, 101, 5)]
    lines = [{**line, "loss": 1 + line["step"], "val_accuracy": 0.9 - line["step"] / 200} for line in steps]
    write_run(tmp_path, None, lines)
    figure = training_figure(tmp_path)
    figure.draw_without_rendering()
    for axes in figure.axes[2:]:
        box = axes.get_legend().get_window_extent()
        points = [point for line in axes.lines for point in axes.transData.transform(line.get_xydata())]
        assert points
        assert not any(box.contains(*point) for point in points)


def test_training_figure_of_a_run_that_has_only_begun(tmp_path):
    with pytest.raises(ValueError, match="no figures"):
        training_figure(tmp_path)
    write_run(tmp_path, None, SPARSE[:2])
    assert len(training_figure(tmp_path).axes) == 4


def test_pngs_are_written_whole_and_are_no_blank_sheets(folder, cells, tmp_path):
    from PIL import Image

    plot_training(folder.path, tmp_path / "a.png")
    plot_compare(cells, tmp_path / "b.png")
    for name in ("a.png", "b.png"):
        with Image.open(tmp_path / name) as image:
            assert min(image.size) > 600
            assert len(image.convert("RGB").getcolors(maxcolors=1 << 20)) > 50


def test_compare_figure_draws_every_run_and_every_mean(cells):
    [axes] = compare_figure(cells).axes
    dots = sorted(round(y, 6) for line in axes.lines if line.get_marker() == "o" for y in line.get_ydata())
    assert dots == [0.7, 0.8, 0.85, 0.9]
    bars = [round(segment[0][1], 6) for bar in axes.collections for segment in bar.get_segments()]
    assert bars == [0.8, 0.85]
    [dense] = [line for line in axes.lines if same_color(line.get_color(), DENSE)]
    assert list(dense.get_ydata()) == pytest.approx([0.91, 0.91])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1:4", "1:8"]
    assert [text.get_text() for text in axes.figure.legends[0].get_texts()] == [
        "dense (mean and range of 2)", "ste", "idp",
    ]  # fmt: skip


def test_table_figure_has_a_place_for_every_row_and_a_legend_that_fits():
    """Rows and columns may both be words of a recipe, of which cells have one pattern only."""
    columns = ["mdgf-exponential pruned_gradient=straight-through", "mdgf-exponential pruned_gradient=masked", "ste"]
    cells = {
        (row, column): Cell(f"{column} {row}", "1:4", (0,), (value,), 1, value, None, value, value)
        for row, values in {"1:4 dense=0": (0.5, 0.6, 0.7), "1:4 dense=0.1": (0.4, None, 0.3)}.items()
        for column, value in zip(columns, values, strict=True)
        if value is not None
    }
    missing = Cell(columns[1], "1:4", (0,), (None,), 0, None, None, None, None)
    entries = [(*place, cell) for place, cell in cells.items()] + [("1:4 dense=0.1", columns[1], missing)]
    figure = table_figure(entries, None)
    [axes] = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1:4\ndense=0", "1:4\ndense=0.1"]
    bars = [(bar.get_label(), bar.get_segments()[0].mean(axis=0).tolist()) for bar in axes.collections]
    assert [(name, round(x), round(y, 6)) for name, (x, y) in bars] == [
        (columns[0], 0, 0.5), (columns[1], 0, 0.6), (columns[2], 0, 0.7), (columns[0], 1, 0.4), (columns[2], 1, 0.3),
    ]  # fmt: skip
    assert [x for _, (x, _) in bars] == sorted(x for _, (x, _) in bars)
    colours = [tuple(bar.get_color()[0]) for bar in axes.collections]
    assert colours[:1] + colours[2:3] == colours[3:]
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == columns
    figure.draw_without_rendering()
    extent = legend.get_window_extent()
    assert extent.x0 >= 0
    assert extent.x1 <= figure.bbox.x1


def test_compare_figure_of_nothing():
    with pytest.raises(ValueError, match="no run is done"):
        compare_figure([Cell("ste", "1:4", (0,), (None,), 0, None, None, None, None)])


# -- the page ----------------------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """Text, tags and addresses of a page."""

    def __init__(self):
        super().__init__()
        self.text, self.sources, self.open = [], [], []

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data.strip())


def test_page(folder):
    plot_training(folder.path, folder.plot)
    write_page(folder.path, folder.page, "nmflow train data.path='a & b'")
    reader = Reader()
    reader.feed(folder.page.read_text())
    assert not reader.open
    [source] = reader.sources
    assert source.startswith("data:image/png;base64,")
    words = " ".join(reader.text)
    for said in (
        "vit-tiny on digits, 1:4 by mdgf-linear, seed 3", "digits: <all> of them", "12,345 parameters", "90.00 %",
        "82.00 %", "0.5125", "61.2", "verified: 2 of 2 layers are N:M", "a.weight", "b.weight[0:8]", "1,200", "4,800",
        "1,500", "3.20", "9,000", "4,000", "2.25", "nmflow train data.path='a & b'", "optim.lr", "packages.torch",
        "<i>&amp;",
    ):  # fmt: skip
        assert said in words, said


def test_page_of_a_dense_run(tmp_path):
    alone = write_run(tmp_path, {**RESULT, "compressed": None, "verify": None, "dense": None}, BASELINE)
    plot_training(alone.path, alone.plot)
    write_page(alone.path, alone.page, "nmflow train recipe=dense")
    assert "Proof" not in alone.page.read_text()


def test_page_of_a_run_that_is_not_done(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_page(tmp_path, tmp_path / "report.html", "")
