"""Tables of results, for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.table import Table

from .case import MODES
from .rows import Row, ratio, together

_PASSES = {
    "forward": "forward",
    "backward": "backward",
    "step": "forward + backward",
    "inference": "inference",
}
# Order of the rows of a table.
_MODE_ORDER = list(MODES)


@dataclass(frozen=True)
class Grid:
    """A table whose cells are text: a line a label, a column a number of tokens."""

    title: str
    columns: list[str]
    lines: list[tuple[str, list[str]]]

    def markdown(self) -> str:
        """As a Markdown table."""
        head = [self.title, *self.columns]
        out = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * len(self.columns)]
        out += ["| " + " | ".join([label, *cells]) + " |" for label, cells in self.lines]
        return "\n".join(out)

    def rich(self) -> Table:
        """For a terminal."""
        table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
        table.add_column(self.title)
        for column in self.columns:
            table.add_column(column, justify="right", no_wrap=True)
        for label, cells in self.lines:
            table.add_row(label, *cells)
        return table


def ratios(
    rows: Iterable[Row],
    provider: str = "fastlora",
    baseline: str = "peft",
    spread: bool = True,
) -> list[Grid]:
    """One table a layer: time of `baseline` / time of `provider`; allocator x pass against M.

    Args:
        rows: of one or more runs; where a cell was measured more than once, the newest counts.
        provider: above 1 it is the faster one.
        baseline: what it is compared with.
        spread: adds the 20th and 80th percentile over the rounds.
    """
    cells: dict[str, dict[str, dict[int, str]]] = {}
    order: dict[str, tuple[int, int]] = {}
    for group in sorted(together(rows), key=lambda g: next(iter(g.values()))["date"]):
        if provider not in group or baseline not in group:
            continue
        row = group[provider]
        low, middle, high = ratio(row, group[baseline])
        text = _short(middle) + (f" ({_short(low)}-{_short(high)})" if spread else "")
        label = f"{row['allocator']}, {_PASSES[row['mode']]}"
        order.setdefault(
            label, (0 if row["allocator"] == "glibc" else 1, _MODE_ORDER.index(row["mode"]))
        )
        cells.setdefault(layer_title(row), {}).setdefault(label, {})[int(row["M"])] = text
    return [_grid(title, lines, order) for title, lines in cells.items()]


def times(rows: Iterable[Row]) -> list[Grid]:
    """One table a layer, allocator and pass: milliseconds and ratio to PEFT of every provider."""
    cells: dict[str, dict[str, dict[int, str]]] = {}
    for row in sorted(rows, key=lambda row: row["date"]):
        if not row["ms_p50"]:
            continue
        text = f"{float(row['ms_p50']):.3g} ms"
        if row["ratio_p50"] and row["provider"] != "peft":
            text += f" {_short(float(row['ratio_p50']))}x"
        title = f"{layer_title(row)}, {_PASSES[row['mode']]}, {row['allocator']}"
        cells.setdefault(title, {}).setdefault(row["provider"], {})[int(row["M"])] = text
    return [_grid(title, lines, {}) for title, lines in cells.items()]


def layer_title(row: Row) -> str:
    """`4096 x 4096, nf4 nested, r = 16, dropout 0.05`."""
    base = row["dtype"] if row["quant"] == "none" else f"{row['quant']} in {row['dtype']}"
    dropout = f", dropout {row['dropout']}" if row["dropout"] != "0" else ""
    return f"{row['N']} x {row['K']}, {base}, r = {row['R']}{dropout}"


def _grid(title: str, lines: dict[str, dict[int, str]], order: dict[str, tuple[int, int]]) -> Grid:
    tokens = sorted({M for line in lines.values() for M in line})
    labels: Sequence[str] = sorted(lines, key=lambda label: order.get(label, (0, 0)))
    return Grid(
        title,
        [f"M = {M}" for M in tokens],
        [(label, [lines[label].get(M, "-") for M in tokens]) for label in labels],
    )


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 20 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
