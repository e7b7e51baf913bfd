"""The paper's tables that are trained: the runs their cells ask for, and the cells that the runs fill."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nmflow.experiments.catalogue import Table
from nmflow.experiments.cells import Setup, setup
from nmflow.experiments.studies import Run, StudyFolder
from nmflow.report.cost import Cost
from nmflow.report.curves import Curves
from nmflow.report.glue import COLUMNS, Average, GlueRow, glue_rows
from nmflow.report.noise import Noise
from nmflow.report.side_by_side import Entry, SideBySide
from nmflow.report.tables import Cell, PlannedRun

_DENSE = setup("dense")
_MEASURES = {"F1": "f1", "accuracy": "accuracy", "Pearson": "pearson", "Spearman": "spearman"}


@dataclass(frozen=True)
class Trained:
    """One table whose cells are runs of one study, or of several, a task each."""

    table: Table
    studies: Mapping[str, StudyFolder]
    """By task of GLUE; of a table of one study, that one under any name."""

    def open_runs(self) -> Sequence[Run]:
        """Runs that can be begun now."""
        setups = self._setups()
        runs = [run for study in self.studies.values() for run in study.open_runs(setups)]
        return runs + [run for run in self._at_both_rates() if not run.is_done]

    def count(self) -> tuple[int, int]:
        """(done, all) runs."""
        setups = self._setups()
        counts = [study.count(setups) for study in self.studies.values()]
        further = self._at_both_rates()
        done = sum(done for done, _ in counts) + sum(run.is_done for run in further)
        return done, sum(every for _, every in counts) + len(further)

    def result(self) -> SideBySide | Noise | Cost | Curves:
        """The table or figure from what the runs' folders hold."""
        title = f"{self.table.name}: {self.table.title}"
        differs = tuple(f"here: {study.study.title}; {study.study.differs}" for study in self.studies.values())
        runs = {name: self._planned(study) for name, study in self.studies.items()}
        first = next(iter(runs.values()))
        match self.table.kind:
            case "noise":
                noisy, calm = self.table.columns
                return Noise(title, noisy, calm, first, differs, self._by_rate(), self._chosen())
            case "inference-flops":
                return Cost(title, "forward", first, differs)
            case "training-flops":
                return Cost(title, "training", first, differs)
            case "curves":
                return Curves(title, runs, differs)
            case _:
                return self._side_by_side(title, differs)

    def _planned(self, study: StudyFolder) -> tuple[PlannedRun, ...]:
        """The runs of a study whose rate is known."""
        return tuple(
            PlannedRun(cell.recipe_text, cell.targets_text, run.config.seed, run.folder.path)
            for cell in self._setups()
            for run in study.runs(cell) or ()
        )

    # -- noise ---------------------------------------------------------------------------------------------------

    def _chosen(self) -> dict[str, float]:
        """Recipe -> the learning rate that it chose, of a table of one study."""
        [study] = self.studies.values()
        rates = {cell.recipe_text: study.rate(cell) for cell in self._sparse()}
        return {recipe: rate for recipe, rate in rates.items() if rate is not None}

    def _by_rate(self) -> dict[float, tuple[PlannedRun, ...]]:
        """Learning rate -> the runs of every sparse cell at it, done or not. Raises as `Run.result` does."""
        [study] = self.studies.values()
        found, seeds = {}, range(study.study.seeds)
        for rate in study.study.rates:
            places = [(cell, study.run(cell, rate, seed)) for cell in self._sparse() for seed in seeds]
            for _, run in places:
                run.result()  # refuses what was done with other settings
            found[rate] = tuple(
                PlannedRun(cell.recipe_text, cell.targets_text, run.config.seed, run.folder.path)
                for cell, run in places
            )
        return found

    def _at_both_rates(self) -> list[Run]:
        """What a table of noise asks beyond its cells: noise depends on the learning rate, so each recipe is probed at
        the other one's too, every seed.
        """
        if self.table.kind != "noise" or len(self._chosen()) < len(self._sparse()):
            return []
        [study] = self.studies.values()
        cells = self._sparse()
        planned = {run.folder.path for cell in cells for run in [*study.tries(cell), *(study.runs(cell) or ())]}
        runs = [
            study.run(cell, rate, seed)
            for seed in range(study.study.seeds)
            for cell in cells
            for rate in dict.fromkeys(self._chosen().values())
        ]
        return [run for run in runs if run.folder.path not in planned]

    def _sparse(self) -> list[Setup]:
        return [cell for cell in self._setups() if cell.targets]

    # -- cells ---------------------------------------------------------------------------------------------------

    def _side_by_side(self, title: str, differs: tuple[str, ...]) -> SideBySide:
        paper = self.table.paper
        cells, dense = self._by_task() if self.table.kind == "glue" else self._of_one_study()
        entries = tuple(
            Entry(row, column, cell, None if paper is None else paper.value(row, column))
            for (row, column), cell in cells.items()
        )
        return SideBySide(
            title,
            entries,
            dense=dense,
            paper_dense=None if paper is None else paper.dense,
            paper_measure=None if paper is None else paper.measure,
            differs=(*differs, *([paper.note] if paper is not None and paper.note else ())),
        )

    def _setups(self) -> list[Setup]:
        return list(dict.fromkeys([_DENSE, *self.table.setups().values()]))

    def _of_one_study(self) -> tuple[dict[tuple[str, str], Cell], Cell | None]:
        [study] = self.studies.values()
        places = self.table.setups()
        dense, *cells = study.results([_DENSE, *places.values()])
        return dict(zip(places, cells, strict=True)), dense

    # -- GLUE ----------------------------------------------------------------------------------------------------

    def _by_task(self) -> tuple[dict[tuple[str, str], Cell], Cell | None]:
        """A mean over the tasks that there are, or in a table with a column a task what that column names."""
        places = self.table.setups()
        rows = {each: self._glue_row(each) for each in self._setups()}
        if "overall" not in self.table.columns:
            means = {each: row.averages["overall"] for each, row in rows.items()}
            return {place: means[each] for place, each in places.items()}, means[_DENSE]
        return {(row, column): _cell(rows[each], column) for (row, column), each in places.items()}, None

    def _glue_row(self, cell: Setup) -> GlueRow:
        seeds = range(min(study.study.seeds for study in self.studies.values()))
        runs = []
        for task, study in self.studies.items():
            done = study.runs(cell)
            folders = {run.config.seed: run.folder.path for run in done or ()}
            missing = study.path / "not planned yet"
            runs += [
                (task, PlannedRun(cell.recipe_text, cell.targets_text, seed, folders.get(seed, missing)))
                for seed in seeds
            ]
        average: Average = tuple((name,) for name, column in COLUMNS.items() if column.task in self.studies)
        every: Average = tuple((name,) for name in COLUMNS if name != "WNLI")
        return glue_rows(runs, {"overall": average, "": every})[0]


def _cell(row: GlueRow, column: str) -> Cell:
    """What a column of table 12 names: overall, a task, or one of a task's two measures."""
    if column == "overall":
        return row.averages["overall"]
    task, _, measure = column.partition(" ")
    return row.measures[task][_MEASURES[measure]] if measure else row.columns[task]
