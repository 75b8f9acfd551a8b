"""Puts generated tables into a document, between marks that name them."""

from __future__ import annotations

from collections.abc import Mapping


def fill(text: str, tables: Mapping[str, str]) -> str:
    """`text` with each table between `<!-- name -->` and `<!-- /name -->`, in place of the old one.

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
