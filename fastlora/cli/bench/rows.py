"""Results as rows of a CSV file, and ratios between rows."""

from __future__ import annotations

import csv
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path

from ...version import __version__
from .case import Case

COLUMNS = (
    *("date", "commit", "device", "cpu_isa", "threads", "torch", "peft", "bitsandbytes"),
    *("fastlora", "allocator", "op", "mode", "provider", "M", "N", "K", "R", "dtype", "quant"),
    *("dropout", "adapter_dtype", "ms_p20", "ms_p50", "ms_p80", "ratio_p20", "ratio_p50"),
    *("ratio_p80", "peak_mb", "saved_bytes", "calls", "samples_ms"),
)
# With the provider, these identify what a row measures.
CASE_COLUMNS = ("op", "mode", "M", "N", "K", "R", "dtype", "quant", "dropout")
# Rows with the same values here were measured in the same rounds.
_ROUND_COLUMNS = ("date", "commit", "device", "cpu_isa", "threads", "allocator", *CASE_COLUMNS)
_QUANTILES = ("p20", "p50", "p80")

Row = dict[str, str]


def machine() -> dict[str, str]:
    """The columns shared by all rows of a process."""
    import torch

    from .. import info

    report = info.collect()
    native = report["fastlora"].get("instruction set chosen", "none")
    versions = {name: v.replace("not installed", "") for name, v in report["packages"].items()}
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "device": report["machine"]["cpu"],
        "cpu_isa": native,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "peft": versions["peft"],
        "bitsandbytes": versions["bitsandbytes"],
        "fastlora": __version__,
    }


def _commit() -> str:
    """The commit of the package, with "-dirty" for uncommitted changes; "" outside a checkout."""
    package = Path(__file__).resolve().parents[2]
    if not (package.parent / ".git").exists():
        return ""

    def git(*words: str) -> str:
        command = ["git", "-C", str(package.parent), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        dirty = git("status", "--porcelain", "--untracked-files=no", "--", "fastlora", "csrc")
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def case_row(case: Case, provider: str, adapter_dtype: str | None) -> Row:
    """The columns that say what was measured."""
    layer = case.layer
    return {
        "op": "lora_linear" if layer.quant == "none" else "qlora_linear",
        "mode": case.mode,
        "provider": provider,
        "M": str(case.M),
        "N": str(layer.N),
        "K": str(layer.K),
        "R": str(layer.R),
        "dtype": layer.dtype,
        "quant": layer.quant_name,
        "dropout": f"{layer.dropout:g}",
        "adapter_dtype": adapter_dtype or "",
    }


def timing_columns(seconds: Sequence[float], baseline: Sequence[float] | None) -> Row:
    """Quantiles of the time in ms and of the ratio baseline / time, round by round."""
    columns = quantile_columns("ms", [1e3 * s for s in seconds])
    if baseline is not None:
        ratios = [b / s for b, s in zip(baseline, seconds, strict=True)]
        columns |= quantile_columns("ratio", ratios)
    return columns | {"samples_ms": " ".join(f"{1e3 * s:.5g}" for s in seconds)}


def quantile_columns(what: str, values: Sequence[float], form: str = ".4g") -> Row:
    """The columns `what`_p20, `what`_p50 and `what`_p80 of some values."""
    figures = zip(_QUANTILES, quantiles(values), strict=True)
    return {f"{what}_{name}": format(value, form) for name, value in figures}


def quantiles_in(row: Row, what: str) -> tuple[float, float, float]:
    """What `quantile_columns` has written."""
    low, middle, high = (float(row[f"{what}_{name}"]) for name in _QUANTILES)
    return low, middle, high


def timed_row(
    what: Row, seconds: Sequence[float], calls: int, baseline: Sequence[float] | None
) -> Row:
    """A whole row.

    Args:
        what: the columns of the machine and of what was measured.
        seconds, calls: a call took so long, by round; calls in a sample.
        baseline: the baseline's seconds in the same rounds, if it was measured.
    """
    columns = timing_columns(seconds, baseline)
    return dict.fromkeys(COLUMNS, "") | what | columns | {"calls": str(calls)}


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """20th percentile, median, 80th percentile; between two values in proportion."""
    ordered = sorted(values)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        below = int(place)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (place - below) * (ordered[above] - ordered[below])

    return at(0.2), statistics.median(ordered), at(0.8)


def samples(row: Row) -> list[float]:
    """Milliseconds a call, by round."""
    return [float(word) for word in row["samples_ms"].split()]


def ratio(row: Row, other: Row) -> tuple[float, float, float]:
    """Quantiles of other's time / row's time, round by round.

    Raises:
        ValueError: the two were not measured in the same rounds.
    """
    if any(row[name] != other[name] for name in _ROUND_COLUMNS):
        raise ValueError(f"{row['provider']} and {other['provider']} are not of the same rounds")
    pairs = zip(samples(row), samples(other), strict=True)
    return quantiles([theirs / ours for ours, theirs in pairs])


def together(rows: Iterable[Row]) -> list[dict[str, Row]]:
    """Rows of the same rounds, by provider; the oldest rounds come first."""
    groups: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        if row["samples_ms"]:
            key = tuple(row[name] for name in _ROUND_COLUMNS)
            groups.setdefault(key, {})[row["provider"]] = row
    return sorted(groups.values(), key=lambda group: next(iter(group.values()))["date"])


def read(path: Path) -> list[Row]:
    """The rows of a CSV file.

    Raises:
        ValueError: it lacks a column.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path} is no file of `fastlora bench`: it lacks {missing[0]}")
        return list(reader)


def append(path: Path, rows: Iterable[Row], columns: Sequence[str] = COLUMNS) -> None:
    """Adds rows to a CSV file, which gets its header when it is new.

    Raises:
        ValueError: the file has other columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists() or path.stat().st_size == 0
    if not new:
        with path.open(newline="") as file:
            header = tuple(next(csv.reader(file)))
        if header != tuple(columns):
            raise ValueError(f"{path} has other columns; write to another file")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)
