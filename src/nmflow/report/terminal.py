"""How a plan and the facts of a machine look in a terminal: tables to print, and the lines below them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich import box
from rich.table import Table

from nmflow.doctor import Facts
from nmflow.schedules import Recipe, Segment, Stage

_SELDOM: dict[str, Callable[[Stage], str]] = {
    "pruned gradient": lambda stage: stage.pruned_gradient,
    "λ": lambda stage: f"{stage.sr_ste:g}",
    "outer": lambda stage: str(stage.outer),
}
"""What seldom changes within a run, and is a column only where it does."""


def plan_table(segments: Sequence[Segment]) -> Table:
    """One row a segment; what is the same in all of them goes below the table, see `plan_lines`."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    extra = [column for column in _SELDOM if _varies(segments, column)]
    for heading in ("steps", "phase", "pattern", "density", "D(j)", *extra):
        table.add_column(heading, no_wrap=True)
    for segment in segments:
        first, last = segment.first, segment.last
        decay = f"{first.decay:.3g}" + (f" → {last.decay:.3g}" if first.decay != last.decay else "")
        row = [f"{segment.start:,}-{segment.end - 1:,}", first.phase, str(first.pattern)]
        table.add_row(*row, f"{first.pattern.density:.4g}", decay, *(_SELDOM[column](first) for column in extra))
    return table


def plan_lines(segments: Sequence[Segment], recipe: Recipe) -> list[str]:
    """What holds all through the plan, and what its masks are taken from."""
    first = segments[0].first
    lines = []
    if not _varies(segments, "pruned gradient"):
        lines.append(f"gradient of pruned weights: {first.pruned_gradient}")
    if not _varies(segments, "λ") and first.sr_ste:
        lines.append(f"λ: {first.sr_ste:g}")
    if recipe.needs_gradients:
        lines.append("the mask is chosen by gradients on a few batches (Sparsifier.calibrate)")
    if recipe.mask == "frozen":
        lines.append("the mask is taken once and kept")
    if recipe.mask == "inherit":
        lines.append("each mask is chosen among the survivors of the one before")
    return lines


def doctor_tables(facts: Facts) -> list[Table]:
    """The machine, the packages, the kernels."""
    machine = Table(box=box.SIMPLE_HEAD, show_header=False)
    torch = f"{facts.torch}, {facts.threads} threads, {facts.cpu}" if facts.torch else "not installed"
    for name, value in (
        ("nmflow", facts.nmflow),
        ("python", facts.python),
        ("system", f"{facts.system}, {facts.cores} cores"),
        ("torch", torch),
        ("devices", "\n".join(facts.devices) or "none"),
        ("compiler", facts.compiler or "none"),
    ):
        machine.add_row(name, value)
    packages = Table("package", "version", "for", box=box.SIMPLE_HEAD)
    for package in facts.packages:
        purpose = "nmflow itself" if package.required else f"{package.purpose} (optional)"
        packages.add_row(package.name, package.version or "-", purpose)
    kernels = Table("kernel", "task", "here", box=box.SIMPLE_HEAD)
    for kernel in facts.kernels:
        kernels.add_row(kernel.name, kernel.task, kernel.why_not or "runs")
    return [machine, packages, kernels]


def _varies(segments: Sequence[Segment], column: str) -> bool:
    return len({_SELDOM[column](segment.first) for segment in segments}) > 1
