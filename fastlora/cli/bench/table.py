"""Tables of results, for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .allocators import ALLOCATORS
from .case import PASSES
from .rows import Row, ratio, together


@dataclass(frozen=True)
class Cell:
    """A figure, with a note in small print."""

    text: str
    note: str = ""

    def __str__(self) -> str:
        return f"{self.text} ({self.note})" if self.note else self.text


@dataclass(frozen=True)
class Grid:
    """A table, with labelled lines and columns."""

    title: str
    columns: list[str]
    lines: list[tuple[str, list[Cell]]]

    def markdown(self) -> str:
        """As a Markdown table under its title."""
        out = [f"**{self.title}**", ""]
        out += ["| | " + " | ".join(self.columns) + " |", "|---|" + "---:|" * len(self.columns)]
        out += [f"| {label} | " + " | ".join(map(str, cells)) + " |" for label, cells in self.lines]
        return "\n".join(out) + "\n"

    def show(self, console: Console) -> None:
        """Prints it; notes go below their figures."""
        table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
        table.add_column("")
        for column in self.columns:
            table.add_column(column, justify="right", no_wrap=True)
        for label, cells in self.lines:
            table.add_row(
                label,
                *(
                    Text.assemble(cell.text, (f"\n{cell.note}" if cell.note else "", "dim"))
                    for cell in cells
                ),
            )
        console.print(Text(self.title, style="bold"), soft_wrap=True)
        console.print(table)
        console.print()


def ratios(rows: Iterable[Row], provider: str = "fastlora", baseline: str = "peft") -> list[Grid]:
    """One table a layer: time of `baseline` / time of `provider`; allocator x pass against M.

    Median over the rounds, with the 20th and 80th percentile as small print.

    Args:
        rows: of one or more runs; of repeated measurements the newest counts.
        provider, baseline: above 1, the provider is faster.
    """
    tables = Tables()
    for group in together(rows):
        if provider in group and baseline in group and not is_model(group[provider]):
            row = group[provider]
            low, middle, high = ratio(row, group[baseline])
            cell = Cell(short(middle), f"{short(low)}-{short(high)}")
            title = f"time of {baseline} / time of {provider}: {layer_title(row)}"
            tables.put(title, f"{row['allocator']}, {PASSES[row['mode']]}", row, cell)
    return tables.grids(_by_allocator)


def times(rows: Iterable[Row]) -> list[Grid]:
    """One table a layer, allocator and pass: milliseconds of every provider, and its ratio."""
    tables = Tables()
    for row in _layer_rows(rows, "ms_p50"):
        note = f"{short(float(row['ratio_p50']))}x" if row["ratio_p50"] else ""
        cell = Cell(f"{float(row['ms_p50']):.3g} ms", "" if note == "1.00x" else note)
        tables.put(f"{_pass(row)}: {layer_title(row)}", row["provider"], row, cell)
    return tables.grids()


def memory(rows: Iterable[Row]) -> list[Grid]:
    """One table a layer: MiB that a step of four layers takes, and bytes saved for the backward."""
    tables = Tables()
    for row in _layer_rows(rows, "peak_mb"):
        saved = f"{float(row['saved_bytes']):.2f} B saved" if row["mode"] == "step" else ""
        title = f"peak memory of four layers, {_pass(row)}: {layer_title(row)}"
        tables.put(title, row["provider"], row, Cell(f"{float(row['peak_mb']):.0f} MiB", saved))
    return tables.grids()


def _layer_rows(rows: Iterable[Row], column: str) -> list[Row]:
    """Rows of layers with a value in `column`, the oldest first."""
    return [row for row in _by_date(rows) if row[column] and not is_model(row)]


def _by_date(rows: Iterable[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: row["date"])


def _pass(row: Row) -> str:
    return f"{PASSES[row['mode']]}, {row['allocator']}"


def models(rows: Iterable[Row]) -> list[Grid]:
    """One table a model and setting: time, tokens a second, ratio to PEFT and peak memory."""
    lines: dict[str, dict[str, list[Cell]]] = {}
    for row in _by_date(rows):
        if is_model(row):
            title = f"{row['op']}, {_base(row)}, r = {row['R']}, dropout {row['dropout']}"
            label = (
                f"{PASSES[row['mode']]}, {row['M']} tokens, {row['provider']}, {row['allocator']}"
            )
            milliseconds = float(row["ms_p50"])
            lines.setdefault(title, {})[label] = [
                Cell(f"{milliseconds:.4g} ms"),
                Cell(f"{1e3 * int(row['M']) / milliseconds:.4g}"),
                Cell(
                    f"{short(float(row['ratio_p50']))}x",
                    f"{short(float(row['ratio_p20']))}-{short(float(row['ratio_p80']))}",
                ),
                Cell(f"{float(row['peak_mb']):.0f} MiB" if row["peak_mb"] else "-"),
            ]
    columns = ["time", "tokens/s", "speed-up", "peak over the weights"]
    return [Grid(title, columns, list(cells.items())) for title, cells in lines.items()]


def is_model(row: Row) -> bool:
    """Whether the row measures a whole model."""
    return row["op"].startswith("model ")


def layer_title(row: Row) -> str:
    """`4096 x 4096, nf4 nested in bf16, r = 16, dropout 0.05`."""
    rank = f", r = {row['R']}" if row["R"] != "0" else ""
    dropout = f", dropout {row['dropout']}" if row["dropout"] != "0" else ""
    return f"{row['N']} x {row['K']}, {_base(row)}{rank}{dropout}"


def _base(row: Row) -> str:
    return row["dtype"] if row["quant"] == "none" else f"{row['quant']} in {row['dtype']}"


def short(value: float) -> str:
    """Three digits, or two of a large ratio."""
    return f"{value:.0f}" if value >= 20 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


class Tables:
    """Cells by table, line and number of tokens, in insertion order."""

    def __init__(self) -> None:
        self._cells: dict[str, dict[str, dict[int, Cell]]] = {}
        self._rows: dict[str, Row] = {}

    def put(self, title: str, label: str, row: Row, cell: Cell) -> None:
        self._cells.setdefault(title, {}).setdefault(label, {})[int(row["M"])] = cell
        self._rows[label] = row

    def grids(self, order: Callable[[Row], tuple[Any, ...]] | None = None) -> list[Grid]:
        grids = []
        for title, lines in self._cells.items():
            tokens = sorted({M for line in lines.values() for M in line})
            labels: Sequence[str] = list(lines)
            if order is not None:
                labels = sorted(labels, key=lambda label: order(self._rows[label]))
            columns = [f"M = {M}" if M else "" for M in tokens]
            cells = [(label, [lines[label].get(M, Cell("-")) for M in tokens]) for label in labels]
            grids.append(Grid(title, columns, cells))
        return grids


def _by_allocator(row: Row) -> tuple[int, ...]:
    known = (*ALLOCATORS, row["allocator"])
    return known.index(row["allocator"]), list(PASSES).index(row["mode"])
