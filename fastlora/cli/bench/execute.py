"""Carries out plans: a worker for each allocator, rows to CSV, then tables and plots."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Column

from ..console import wide_console
from ..process import Emit, run
from . import rows, table
from .allocators import environment
from .case import Case, Layer
from .plan import ModelPlan, Plan
from .rows import Row

# What a table compares when nothing is asked for: (who, with whom).
COMPARISONS = (
    ("fastlora", "peft"),
    ("fastlora-fresh", "bitsandbytes"),
    ("fastlora-out", "bitsandbytes"),
)


@dataclass
class Results:
    """What the workers sent: rows, and who was refused in which row and why."""

    rows: list[Row] = field(default_factory=list)
    refused: list[tuple[Row, str]] = field(default_factory=list)
    wrong: list[tuple[Row, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Output:
    """Where results go, beside the terminal.

    Args:
        csv: rows are appended to it.
        markdown: the tables.
        plot: folder for PNG files.
        comparisons: pairs (who, with whom), a table each.
        times: tables of milliseconds too.
    """

    csv: Path | None = None
    markdown: Path | None = None
    plot: Path | None = None
    comparisons: Sequence[tuple[str, str]] = COMPARISONS
    times: bool = False


def execute(
    plans: Sequence[Plan | ModelPlan], output: Output, console: Console | None = None
) -> int:
    """Measures, writes and prints; returns 1 when a result was wrong, else 0.

    Rows reach the CSV file after every plan and allocator, and when the run is interrupted.

    Raises:
        CliError: an allocator is not there. RuntimeError: a worker failed.
    """
    console = console or wide_console()
    for plan in plans:
        for allocator in plan.allocators:
            environment(allocator)
    results = Results()
    with _bar(console, sum(len(plan.allocators) * len(plan) for plan in plans)) as emit:
        for plan in plans:
            for allocator in plan.allocators:
                first = len(results.rows)
                try:
                    _measure(plan, allocator, results, emit)
                finally:
                    if output.csv is not None and len(results.rows) > first:
                        rows.append(output.csv, results.rows[first:])
    grids = table.models(results.rows)
    for who, whom in output.comparisons:
        grids += table.ratios(results.rows, who, whom)
    if output.times or not grids:
        grids += table.times(results.rows)
    grids += table.memory(results.rows)
    console.print()
    for grid in grids:
        grid.show(console)
    if output.markdown is not None:
        output.markdown.write_text("\n".join(grid.markdown() for grid in grids))
    if output.plot is not None:
        _plot(results.rows, output.plot, console)
    for name, reason in dict.fromkeys((row["provider"], why) for row, why in results.refused):
        console.print(f"[dim]{name} was left out: {reason}[/]", highlight=False, soft_wrap=True)
    for row, reason in results.wrong:
        console.print(
            f"[bold red]{row['provider']}[/], {row['mode']}, M = {row['M']}: {reason} No row.",
            highlight=False,
        )
    return 1 if results.wrong else 0


def _measure(plan: Plan | ModelPlan, allocator: str, results: Results, emit: Emit) -> None:
    """Measures everything under `allocator`; the rows go to `results` as they come."""

    def take(event: str, **fields: Any) -> None:
        if event == "row":
            results.rows.append(fields["row"])
        elif event == "refused":
            kind = results.wrong if fields["wrong"] else results.refused
            kind.append((fields["row"], fields["reason"]))
        emit(event, **fields)

    def work(module: str, **more: Any) -> Any:
        request = {"plan": asdict(plan), "allocator": allocator, **more}
        return run("measuring", f"{__package__}.{module}", request, take, environment(allocator))

    first = len(results.rows)
    work("measure" if isinstance(plan, Plan) else "model")
    if not plan.memory:
        return
    for row, what, module, more in list(_memory_tasks(plan, results.rows[first:])):
        emit("case", text=f"memory of {row['provider']}: {what}")
        row |= {name: f"{value:.4g}" for name, value in work(module, **more).items()}


def _memory_tasks(
    plan: Plan | ModelPlan, measured: list[Row]
) -> Iterator[tuple[Row, str, str, dict[str, Any]]]:
    """A row, a name, the worker's module and the rest of its request, for each peak to measure."""
    if isinstance(plan, ModelPlan):
        for row in measured:
            yield row, row["mode"], "model", {"memory_of": (row["mode"], row["provider"])}
        return
    for case in _largest(plan.cases):
        for row in measured:
            provider = row["provider"]
            if row == {**row, **rows.case_row(case, provider, row["adapter_dtype"])}:
                yield row, str(case), "memory", {"case": asdict(case), "provider": provider}


def _largest(cases: Sequence[Case]) -> list[Case]:
    """Of every layer and mode whose memory is measured, the case with most tokens."""
    largest: dict[tuple[Layer, str], Case] = {}
    for case in sorted(cases, key=lambda case: case.M):
        if case.mode in ("step", "inference"):
            largest[case.layer, case.mode] = case
    return list(largest.values())


def _plot(measured: list[Row], folder: Path, console: Console) -> None:
    from .plot import write_plots

    try:
        written = write_plots(measured, folder)
    except ImportError:
        console.print("No plot: matplotlib is missing (pip install matplotlib).")
        return
    for path in written:
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)


@contextmanager
def _bar(console: Console, cases: int) -> Iterator[Emit]:
    """A progress bar over the cases; plain lines if the output is no terminal.

    Yields what to call with the events of workers.
    """
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None, table_column=Column(min_width=8, ratio=1)),
        TaskProgressColumn(),
        TimeRemainingColumn(compact=True),
        console=console,
        expand=True,
        transient=True,
        disable=not console.is_terminal,
        # Each refresh takes time from what is measured.
        refresh_per_second=2,
    )
    task = progress.add_task("starting", total=cases)
    # Cases that are done, and the share of the running one that a sample is.
    done, share = 0, 0.0

    def emit(event: str, **fields: Any) -> None:
        nonlocal done, share
        match event:
            case "machine":
                console.print(
                    f"{fields['device']}, {fields['cpu_isa']}, {fields['threads']} threads, "
                    f"{fields['allocator']}; torch {fields['torch']}, PEFT {fields['peft']}, "
                    f"bitsandbytes {fields['bitsandbytes']}",
                    highlight=False,
                    soft_wrap=True,
                )
            case "case":
                progress.update(task, description=fields["text"])
                if not console.is_terminal:
                    console.print(f"  {fields['text']}", highlight=False, soft_wrap=True)
                share = 1 / fields.get("samples", 1)
            case "tick":
                progress.advance(task, share)
            case "done":
                done += 1
                progress.update(task, completed=done)

    with progress:
        yield emit
