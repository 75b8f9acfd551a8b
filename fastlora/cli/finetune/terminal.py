"""Shows a run in a terminal or in a log file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

# Without a terminal, a run prints about this many lines of steps.
_LOG_LINES = 20


def gib(megabytes: float) -> str:
    """Formats MiB: 1234.5 as 1.21 GiB, less than 0.1 GiB in MiB."""
    return f"{megabytes:.0f} MiB" if megabytes < 102.4 else f"{megabytes / 1024:.2f} GiB"


def plain_table() -> Table:
    """A table without lines."""
    return Table(box=None, header_style="bold", padding=(0, 2, 0, 0))


class TerminalObserver:
    """Shows a progress line for each backend, or plain lines if the output is no terminal.

    Use it as a context manager, around the run.

    Args:
        console: where to print.
        backends: the runs that will report.
    """

    def __init__(self, console: Console, backends: Sequence[str]) -> None:
        self.console = console
        self.backends = backends
        self.facts: dict[str, dict[str, Any]] = {}
        self._steps: dict[str, int] = {}
        width = max(map(len, backends))
        self._progress = Progress(
            TextColumn("{task.description}", table_column=Column(width=width, no_wrap=True)),
            BarColumn(bar_width=None, table_column=Column(min_width=8, ratio=1)),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            # Loading, or the figures of the last step.
            TextColumn(
                "{task.fields[status]}",
                markup=False,
                table_column=Column(no_wrap=True, width=38),
            ),
            TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
            console=console,
            expand=True,
            disable=not console.is_terminal,
        )
        self._tasks = {
            backend: self._progress.add_task(backend, total=None, status="starting")
            for backend in backends
        }

    def __enter__(self) -> TerminalObserver:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def gate(self, name: str, step: int) -> None:
        """Does nothing: a single run need not wait."""

    def emit(self, event: str, backend: str | None = None, **fields: Any) -> None:
        """Shows one event of `training.train`."""
        backend = backend or self.backends[0]
        match event:
            case "status":
                self._status(backend, fields["text"])
                if not self.console.is_terminal:
                    self.console.print(f"{backend}: {fields['text']}", highlight=False)
            case "facts":
                if not self.facts:
                    self._show_facts(fields)
                if fields["resumed"]:
                    self.console.print(f"{backend}: resuming from step {fields['resumed']}")
                self.facts[backend] = fields
            case "begin":
                self._steps[backend] = fields["steps"]
                self._progress.update(
                    self._tasks[backend], total=fields["steps"], completed=fields["step"]
                )
                self._status(backend, "")
            case "step":
                self._step(backend, fields)

    def _status(self, backend: str, text: str) -> None:
        self._progress.update(self._tasks[backend], status=text)

    def _step(self, backend: str, entry: dict[str, Any]) -> None:
        figures = (
            f"loss {entry['loss']:.3f}  {entry['tokens_per_second']:,.0f} tok/s  "
            f"{gib(entry['peak_memory_mb'])}"
        )
        self._progress.update(self._tasks[backend], completed=entry["step"], status=figures)
        if self.console.is_terminal:
            return
        steps, step = self._steps[backend], entry["step"]
        if step in (1, steps) or step % max(1, steps // _LOG_LINES) == 0:
            self.console.print(f"{backend}: step {step}/{steps}  {figures}", highlight=False)

    def _show_facts(self, facts: dict[str, Any]) -> None:
        threads = "1 thread" if facts["threads"] == 1 else f"{facts['threads']} threads"
        self.console.print(
            f"adapter  {facts['adapted']} layers, {facts['trainable']:,} parameters\n"
            f"device   {facts['device']}, {threads}",
            highlight=False,
        )
