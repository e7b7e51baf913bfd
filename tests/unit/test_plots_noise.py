"""The plot of gradient noise draws what stands in the logs, and says which logs have none."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from nmflow.report.plots_noise import noise_figure, plot_noise
from nmflow.report.tables import PlannedRun


def run(folder: Path, recipe: str, seed: int, values: dict[int, float | None], pattern: str = "1:8") -> PlannedRun:
    """A log with lines of other kinds in it; Var(v) is a millionth of Var(abs(g))."""
    path = folder / f"{recipe}-{pattern.replace(':', '-')}-{seed}"
    path.mkdir(parents=True)
    lines: list[dict[str, object]] = [{"step": 0, "phase": "dense"}]
    for step, value in values.items():
        tiny = None if value is None else value * 1e-6
        lines += [
            {"step": step, "loss": 1.0},
            {"step": step, "grad_abs_var": 7.0, "grad_abs_var_average": value, "second_moment_var_average": tiny},
        ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return PlannedRun(recipe, pattern, seed, path)


def test_a_line_a_recipe_and_a_band_over_seeds(tmp_path: Path) -> None:
    runs = [
        run(tmp_path, "sr-ste", 0, {10: 1e-9, 20: 4e-9, 30: 1e-8}),
        run(tmp_path, "sr-ste", 1, {10: 4e-9, 20: 1e-9}),
        run(tmp_path, "dense", 0, {10: 2e-9, 20: None, 30: 0.0}, "dense"),
    ]
    upper, lower = noise_figure(runs).axes
    for axes, factor in ((upper, 1e-6), (lower, 1.0)):
        assert axes.get_yscale() == "log"
        sparse, dense = axes.lines
        np.testing.assert_array_equal(sparse.get_xdata(), [10, 20])
        np.testing.assert_allclose(np.asarray(sparse.get_ydata(), float), [2e-9 * factor, 2e-9 * factor])
        np.testing.assert_array_equal(dense.get_xdata(), [10])
        corners = axes.collections[0].get_paths()[0].vertices
        heights = np.asarray(corners)[:, 1] / factor
        assert (heights.min(), heights.max()) == pytest.approx((1e-9, 4e-9))
        assert [line.get_label() for line in axes.lines] == ["sr-ste (2 seeds)", "dense"]
    assert lower.get_xlim() == (0, 30)


def test_several_patterns_are_named(tmp_path: Path) -> None:
    runs = [run(tmp_path, "ste", 0, {5: 1.0, 10: 2.0}, pattern) for pattern in ("1:8", "1:16")]
    assert [line.get_label() for line in noise_figure(runs).axes[0].lines] == ["ste, 1:8", "ste, 1:16"]
    plot_noise(runs, tmp_path / "noise.png")
    assert (tmp_path / "noise.png").read_bytes().startswith(b"\x89PNG")


def test_logs_without_noise_are_named(tmp_path: Path) -> None:
    whole, empty = run(tmp_path, "ste", 0, {5: 1.0}), run(tmp_path, "ste", 1, {})
    nowhere = PlannedRun("ste", "1:8", 2, tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"(?s)ste-1-8-1: no gradient noise .*probe_every.*nowhere: no gradient"):
        noise_figure([whole, empty, nowhere])
    with pytest.raises(ValueError, match="no runs are given"):
        noise_figure([])
