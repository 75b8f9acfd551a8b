"""Compares two files of results; exits with 1 if something became slower.

A row is compared by its ratio to the baseline of its rounds if it has one, because the machine may
be slower today, and by its time otherwise. It is slower if it differs by more than the threshold
and the middle 60 % of the two measurements don't overlap.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from fastlora.cli.bench.rows import CASE_COLUMNS, Row, quantiles_in, read
from fastlora.cli.console import wide_console

# Rows of the same key are measurements of the same thing.
_KEY = ("device", "cpu_isa", "threads", "allocator", *CASE_COLUMNS, "provider", "adapter_dtype")


@dataclass(frozen=True)
class Change:
    """One thing measured before and after; `slowdown` is 1.1 when it now takes 10 % longer."""

    before: Row
    after: Row
    slowdown: float
    overlap: bool

    def slower(self, threshold: float) -> bool:
        return self.slowdown > threshold and not self.overlap


def changes(before: Iterable[Row], after: Iterable[Row], by: str = "ratio") -> list[Change]:
    """Changes of rows in both, the largest slow-down first; the newest of repeated rows counts.

    Args:
        before, after: rows of two files.
        by: "ratio" (if there is one) or "time".
    """
    old, new = _newest(before), _newest(after)
    found = [_change(old[key], new[key], by) for key in old.keys() & new.keys()]
    return sorted(found, key=lambda change: change.slowdown, reverse=True)


def missing(before: Iterable[Row], after: Iterable[Row]) -> list[Row]:
    """Rows of `before` that `after` does not have."""
    old, new = _newest(before), _newest(after)
    return [old[key] for key in sorted(old.keys() - new.keys())]


def _newest(rows: Iterable[Row]) -> dict[tuple[str, ...], Row]:
    timed = sorted((row for row in rows if row["ms_p50"]), key=lambda row: row["date"])
    return {tuple(row[name] for name in _KEY): row for row in timed}


def _change(before: Row, after: Row, by: str) -> Change:
    if by == "ratio" and _has_ratio(before) and _has_ratio(after):
        # A ratio is baseline / time: it falls when the row becomes slower.
        (low, old, _), (_, new, high) = quantiles_in(before, "ratio"), quantiles_in(after, "ratio")
        return Change(before, after, old / new, high >= low)
    (_, old, high), (low, new, _) = quantiles_in(before, "ms"), quantiles_in(after, "ms")
    return Change(before, after, new / old, low <= high)


def _has_ratio(row: Row) -> bool:
    """The baseline's own ratio is 1 and says nothing."""
    return bool(row["ratio_p50"]) and (row["ratio_p20"], row["ratio_p80"]) != ("1", "1")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report.compare", description=__doc__
    )
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--threshold", type=float, default=1.1, help="slow-down allowed (1.1)")
    parser.add_argument("--by", choices=("ratio", "time"), default="ratio")
    parser.add_argument("--provider", default="fastlora", help="prefix of their names (fastlora)")
    parser.add_argument("--all", action="store_true", help="show unchanged rows too")
    args = parser.parse_args(argv)
    before, after = read(args.before), read(args.after)
    found = [
        change
        for change in changes(before, after, args.by)
        if change.after["provider"].startswith(args.provider)
    ]
    if not found:
        parser.error(f"nothing of {args.provider} was measured in both files on the same machine")
    slower = [change for change in found if change.slower(args.threshold)]
    console = wide_console()
    shown = [
        change
        for change in found
        if args.all or change in slower or change.slowdown < 1 / args.threshold
    ]
    if shown:
        console.print(_table(shown, args.threshold))
    console.print(
        f"{len(found)} compared, {len(slower)} slower by more than {args.threshold - 1:.0%}."
    )
    gone = [row for row in missing(before, after) if row["provider"].startswith(args.provider)]
    if gone:
        console.print(f"{len(gone)} rows of {args.before} have no counterpart in {args.after}.")
    return 1 if slower else 0


def _table(shown: list[Change], threshold: float) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for name in ("provider", "mode", "layer", "base"):
        table.add_column(name)
    for name in ("M", "ms before", "ms after", "change"):
        table.add_column(name, justify="right")
    for change in shown:
        row = change.after
        worse = change.slower(threshold)
        # Changes within the noise have no colour.
        colour = "red" if worse else "green" if change.slowdown < 1 / threshold else ""
        table.add_row(
            row["provider"],
            row["mode"],
            f"{row['N']} x {row['K']}, r = {row['R']}, {row['allocator']}",
            row["dtype"] if row["quant"] == "none" else row["quant"],
            row["M"],
            f"{float(change.before['ms_p50']):.3g}",
            f"{float(row['ms_p50']):.3g}",
            f"{change.slowdown - 1:+.0%}",
            style=colour,
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
