"""The table of the results of `check`."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from .case import DTYPES
from .check import Cell, Results

_FAILURES_SHOWN = 8


def show(console: Console, title: str, results: Results) -> int:
    """Prints the table; returns how many results failed."""
    table = Table(
        title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0)
    )
    table.add_column("op", no_wrap=True)
    table.add_column("weight", no_wrap=True)
    for column in DTYPES:
        table.add_column(column, justify="right", no_wrap=True)
    # By op, and within an op as checked: sorted() keeps that order.
    for (op, base), cells in sorted(results.items(), key=lambda item: item[0][0]):
        bitwise = not op.endswith(("_fwd", "_bwd"))
        table.add_row(op, base, *(_cell(cells.get(column), bitwise) for column in DTYPES))
    console.print(table)
    cases = sum(cell.cases for cells in results.values() for cell in cells.values())
    failures = [f for cells in results.values() for cell in cells.values() for f in cell.failures]
    console.print(
        f"{cases} results. A figure is the worst error over the largest allowed.\n",
        highlight=False,
    )
    for failure in failures[:_FAILURES_SHOWN]:
        console.print(f"[red]failed[/]  {failure}", highlight=False, soft_wrap=True)
    if len(failures) > _FAILURES_SHOWN:
        console.print(f"[red]failed[/]  and {len(failures) - _FAILURES_SHOWN} more")
    return len(failures)


def _cell(cell: Cell | None, bitwise: bool) -> str:
    if cell is None:
        return ""
    colour = "red" if cell.failures else "green"
    text = ("differs" if cell.failures else "exact") if bitwise else f"{cell.worst:.2f}"
    return f"[{colour}]{text}[/]"
