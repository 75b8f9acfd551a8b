"""Generated tables in documents, between marks that name them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from fastlora.cli.bench.rows import Row, quantiles_in


def fill(text: str, tables: Mapping[str, str]) -> str:
    """`text` with each table between `<!-- name -->` and `<!-- /name -->`, replacing the old one.

    Raises:
        ValueError: a mark is missing.
    """
    for name, table in tables.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        if begin not in text or end not in text:
            raise ValueError(f"the document lacks {begin} or {end}")
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"
    return text


def rewrite(page: Path, tables: Mapping[str, str]) -> None:
    """Puts the tables into a file."""
    page.write_text(fill(page.read_text(), tables))


def quantiles_text(row: Row, what: str) -> str:
    """Median (20th percentile-80th percentile) of a ratio in a row."""
    low, middle, high = quantiles_in(row, what)
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]], numbers: bool = False) -> str:
    """A Markdown table.

    Args:
        header, lines: cells.
        numbers: align all columns but the first to the right.
    """
    rules = ["---"] + ["---:" if numbers else "---"] * (len(header) - 1)
    first, *rows = (f"| {' | '.join(cells)} |" for cells in (header, *lines))
    return "\n".join([first, f"|{'|'.join(rules)}|", *rows])
