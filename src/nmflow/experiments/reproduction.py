"""`nmflow reproduce`: tables of the paper beside our own runs, done where they are missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from nmflow.atomic import replacing
from nmflow.experiments.catalogue import Table, catalogue, find_table
from nmflow.experiments.counted import Counted
from nmflow.experiments.studies import Run, StudyFolder, studies
from nmflow.experiments.timed import Timed
from nmflow.experiments.trained import Trained
from nmflow.report.columns import columns
from nmflow.train.files import write_json, write_text

_EVIDENCE = (".json", ".jsonl", ".yaml", ".md")
"""What is kept of tables and runs besides plots."""


@dataclass(frozen=True)
class Place:
    """Where runs lie and data are found, at one scale."""

    scale: str
    out: Path
    """Runs in `out/scale/runs/STUDY`, tables in `out/scale/TABLE`."""
    data: Path

    def study(self, name: str) -> StudyFolder:
        """The runs of a study here."""
        return StudyFolder(studies(self.scale)[name], self.out / self.scale / "runs" / name, self.data)

    def table(self, name: str) -> Path:
        """The folder of a table here."""
        return self.out / self.scale / name


class Result(Protocol):
    """What is told of a table."""

    def lines(self) -> list[str]:
        """For people."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""

    def draw(self, path: Path) -> bool:
        """Draw it to a PNG; False where there is nothing to draw."""


@dataclass(frozen=True)
class Reproduction:
    """One table at one scale."""

    table: Table
    place: Place

    @property
    def trained(self) -> Trained | None:
        """The runs that fill it; none where it is counted, or nothing fills it at this scale yet."""
        names = self.table.studies.get(self.place.scale)
        return Trained(self.table, {key: self.place.study(name) for key, name in names.items()}) if names else None

    @property
    def timed(self) -> Timed | None:
        """What is measured on a clock, for tables of speed: on this machine's processor or its GPU."""
        is_timed = self.table.kind == "speed" and self.place.scale in ("cpu", "gpu")
        return Timed(self.table, self.place.table(self.table.name), self.place.scale) if is_timed else None

    @property
    def is_unfilled(self) -> bool:
        """True where nothing fills it at this scale yet."""
        return self.table.kind != "flops" and self.trained is None and self.timed is None

    @property
    def state(self) -> str:
        """`counted`, `12 of 45 runs`, `2 of 6 rows`, or `to come`."""
        if self.timed is not None:
            done, every = self.timed.count()
            return f"{done} of {every} rows"
        if self.trained is None:
            return "to come" if self.is_unfilled else "counted"
        done, every = self.trained.count()
        return f"{done} of {every} runs"

    def result(self) -> Result:
        """The table as it can be told now; not of one that nothing fills."""
        source = self.trained or self.timed
        return Counted.of(self.table) if source is None else source.result()

    def write(self, result: Result) -> Path:
        """Write table.md, table.json and a plot into the table's folder; returns it."""
        folder = self.place.table(self.table.name)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "table.md", "\n".join(result.lines()) + "\n")
        write_json(folder / "table.json", {"name": self.table.name, **result.to_dict()})
        drawn = folder / "plot.new.png"
        if result.draw(drawn):
            drawn.replace(folder / "plot.png")
        return folder


@dataclass(frozen=True)
class Several:
    """Several tables as one sweep: a run that two of them want is done once."""

    parts: tuple[Trained, ...]

    def open_runs(self) -> Sequence[Run]:
        """Runs that can be begun now, table by table."""
        return list({run.folder.path: run for part in self.parts for run in part.open_runs()}.values())

    def count(self) -> tuple[int, int]:
        """(done, all) runs, those of two tables in both."""
        counts = [part.count() for part in self.parts]
        return sum(done for done, _ in counts), sum(every for _, every in counts)


def reproductions(names: Sequence[str], place: Place) -> list[Reproduction]:
    """The tables of these names at a place, all that there are for `all`. Raises `ValueError` for unknown names."""
    tables = list(catalogue().values()) if "all" in names else [find_table(name) for name in dict.fromkeys(names)]
    return [Reproduction(table, place) for table in tables]


def state_lines(parts: Sequence[Reproduction]) -> list[str]:
    """Tables with their states, for people."""
    return columns([(part.table.name, part.state, part.table.title) for part in parts])


def keep_evidence(place: Place, parts: Sequence[Reproduction], folder: Path) -> int:
    """Copy tables, and all but weights of the runs that are done, to `folder`, laid out alike; how many files."""
    wanted = [place.table(part.table.name) for part in parts]
    for part in parts:
        studies = part.trained.studies.values() if part.trained is not None else ()
        wanted += [result.parent for study in studies for result in sorted(study.path.glob("*/result.json"))]
    files = [
        file
        for source in dict.fromkeys(wanted)
        for file in sorted(source.glob("*"))
        if file.suffix in _EVIDENCE or file.name == "plot.png"
    ]
    for file in files:
        copy = folder / file.relative_to(place.out)
        copy.parent.mkdir(parents=True, exist_ok=True)
        with replacing(copy) as partial:
            partial.write_bytes(file.read_bytes())
    return len(files)
