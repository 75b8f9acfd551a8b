"""The results of a fine-tuning run: a table, a CSV file and a plot."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .compare import paired_steps
from .job import BACKENDS
from .records import LAST_STEPS, summarise, write_atomically
from .terminal import gib, plain_table

CSV_FILE = "steps.csv"
PLOT_FILE = "loss.png"
_LABELS = {"peft": "PEFT", "fastlora": "fastlora"}
_COLOURS = {"peft": "#8c8c8c", "fastlora": "#d1495b"}


def print_result(console: Console, backend: str, result: dict[str, Any]) -> None:
    """Prints the table of a single run."""
    table = _table()
    table.add_column(_LABELS[backend], justify="right")
    for label, value in _rows(result):
        table.add_row(label, value)
    console.print(table)


def print_comparison(console: Console, results: dict[str, Any]) -> None:
    """Prints the table that compares PEFT and fastlora."""
    table = _table()
    for backend in BACKENDS:
        table.add_column(_LABELS[backend], justify="right")
    table.add_column("fastlora against PEFT")
    peft, fastlora = (results[backend] for backend in BACKENDS)
    notes = _notes(peft, fastlora, results["ratio"])
    for (label, ours), (_, theirs) in zip(_rows(fastlora), _rows(peft), strict=True):
        table.add_row(label, theirs, ours, notes.get(label, ""))
    console.print(table)


def _table() -> Table:
    table = plain_table()
    table.add_column("", no_wrap=True)
    return table


def _rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("seconds a step", f"{result['seconds_per_step']:.3f}"),
        ("tokens a second", f"{result['tokens_per_second']:,.0f}"),
        ("peak memory", gib(result["peak_memory_mb"])),
        ("  above the start", gib(result["training_memory_mb"])),
        (f"loss, last {min(LAST_STEPS, result['steps'])} steps", f"{result['loss']:.4f}"),
    ]
    if result["perplexity_before"] is not None:
        rows += [
            ("perplexity before", f"{result['perplexity_before']:.3f}"),
            ("perplexity after", f"{result['perplexity_after']:.3f}"),
        ]
    return rows


def _notes(
    peft: dict[str, Any], fastlora: dict[str, Any], ratio: dict[str, float] | None
) -> dict[str, str]:
    notes = {
        label: f"{fastlora[name] / peft[name] - 1:+.0%}"
        for label, name in (
            ("peak memory", "peak_memory_mb"),
            ("  above the start", "training_memory_mb"),
        )
        if peft[name]
    }
    if ratio is not None:
        notes["seconds a step"] = f"{ratio['median']:.2f}x the speed, step by step"
        notes["tokens a second"] = f"20 to 80 %: {ratio['p20']:.2f} to {ratio['p80']:.2f}x"
    return notes


def write_csv(out: Path) -> Path:
    """Writes a row for each step: loss, seconds and their ratio, of both backends."""
    rows = [
        {
            "step": peft["step"],
            "peft_loss": peft["loss"],
            "fastlora_loss": fastlora["loss"],
            "peft_seconds": peft["seconds"],
            "fastlora_seconds": fastlora["seconds"],
            "ratio": peft["seconds"] / fastlora["seconds"],
            "warmup": int(peft["first"] or fastlora["first"]),
        }
        for peft, fastlora in paired_steps(out)
    ]

    def write(partial: Path) -> None:
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    path = out / CSV_FILE
    write_atomically(path, write)
    return path


def write_plot(path: Path, logs: dict[str, list[dict[str, Any]]], title: str) -> Path | None:
    """Plots the loss against steps and against time, a line a backend. None without matplotlib.

    Args:
        path: of the PNG.
        logs: the entries of `log.jsonl`, by backend.
        title: of the plot.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return None
    figure, (by_step, by_time) = pyplot.subplots(
        1, 2, figsize=(10, 4.2), sharey=True, layout="constrained"
    )
    for backend, entries in logs.items():
        seconds = [entry["seconds"] for entry in entries]
        style = {
            "label": f"{_LABELS[backend]}, {summarise(entries)['seconds_per_step']:.3g} s a step",
            "color": _COLOURS[backend],
            # PEFT's line is wider and below, so that both are visible where they agree.
            "linewidth": 3.5 if backend == "peft" and len(logs) > 1 else 1.5,
        }
        losses = [entry["loss"] for entry in entries]
        # The clock starts after the first step, which warms up.
        elapsed = list(itertools.accumulate(seconds[1:], initial=0.0))
        by_step.plot([entry["step"] for entry in entries], losses, **style)
        by_time.plot(elapsed, losses, **style)
        by_time.plot(elapsed[-1], losses[-1], "o", color=_COLOURS[backend])
    by_step.set(xlabel="step", ylabel="training loss")
    by_time.set(xlabel="seconds in steps, after the first")
    for axes in (by_step, by_time):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    by_step.xaxis.get_major_locator().set_params(integer=True)
    by_step.legend(frameon=False)
    figure.suptitle(title, fontsize="medium")
    write_atomically(path, lambda partial: figure.savefig(partial, dpi=150, format="png"))
    pyplot.close(figure)
    return path
