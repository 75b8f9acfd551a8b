"""Generated tables in documents, between marks that name them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence


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


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]], numbers: bool = False) -> str:
    """A Markdown table.

    Args:
        header, lines: cells.
        numbers: align all columns but the first to the right.
    """
    rules = ["---"] + ["---:" if numbers else "---"] * (len(header) - 1)
    first, *rows = (f"| {' | '.join(cells)} |" for cells in (header, *lines))
    return "\n".join([first, f"|{'|'.join(rules)}|", *rows])
