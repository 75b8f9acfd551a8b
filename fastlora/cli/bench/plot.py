"""Plots of results, as PNG: bars against the floor, time against tokens, memory."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .case import MODES, PASSES
from .providers import PROVIDERS
from .rows import Row, ratio, together
from .table import is_model, layer_title

# fastlora in reds, others in greys and blues, limits in green.
_COLOURS = {
    "peft": "#6c757d",
    "peft-cast": "#adb5bd",
    "addmm": "#8fb3d9",
    "compile": "#4a7fb5",
    "bnb-packed": "#1d4e89",
    "frozen": "#2f2f2f",
    "frozen-dense": "#8a817c",
    "fastlora": "#d1495b",
    "fastlora-cast": "#e88d97",
    "fastlora-peft": "#a4303f",
    "fastlora-frozen": "#edae49",
    "fastlora-dense": "#f4c095",
    "reference": "#cdb4db",
    "read": "#3a9d5d",
    "bitsandbytes": "#6c757d",
    "fastlora-fresh": "#d1495b",
    "fastlora-out": "#a4303f",
    "write": "#3a9d5d",
}
_FLOOR = "frozen"
# A bar longer than this many floors is cut off; its length is written on it.
_LONGEST_BAR = 3.0


def write_plots(rows: Iterable[Row], folder: Path) -> list[Path]:
    """Writes all plots that the rows allow; returns their paths.

    Args:
        rows: of repeated measurements the newest counts.
        folder: created if it is missing.

    Raises:
        ImportError: matplotlib is missing.
    """
    import matplotlib

    matplotlib.use("Agg")
    rows = sorted((row for row in rows if not is_model(row)), key=lambda row: row["date"])
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    groups = [group for group in together(rows) if "dequantize" not in _any(group)["mode"]]
    for title, name, part in _by_title(groups):
        written += _bars(part, title, folder / f"bars-{name}")
        written += _curves(part, title, folder / f"time-{name}")
    with_memory = [{row["provider"]: row} for row in rows if row["peak_mb"]]
    for title, name, part in _by_title(with_memory):
        written += _memory(part, title, folder / f"memory-{name}")
    return written


# ---- the plots -------------------------------------------------------------------------------


def _bars(groups: list[dict[str, Row]], title: str, path: Path) -> list[Path]:
    """Time of every provider over that of the frozen layer, at each M."""
    from matplotlib import pyplot

    groups = [group for group in groups if _FLOOR in group]
    modes = _modes(groups)
    if not modes:
        return []
    figure, panels = pyplot.subplots(
        len(modes), 1, figsize=(9, 1.2 + 2.6 * len(modes)), squeeze=False, layout="constrained"
    )
    shown: dict[str, Any] = {}
    for axes, mode in zip(panels[:, 0], modes, strict=True):
        newest = {int(_any(group)["M"]): group for group in groups if _any(group)["mode"] == mode}
        names = _ordered({name for group in newest.values() for name in group} - {_FLOOR, "read"})
        width = 0.84 / max(1, len(names))
        costs = {
            (name, M): _cost(group[name], group[_FLOOR])
            for M, group in newest.items()
            for name in names
            if name in group
        }
        limit = min(_LONGEST_BAR, 1.2 * max(cost[2] for cost in costs.values()))
        order = sorted(newest)
        for index, name in enumerate(names):
            shift = (index - (len(names) - 1) / 2) * width
            places = [place for place, M in enumerate(order) if (name, M) in costs]
            found = [costs[name, order[place]] for place in places]
            shown[name] = axes.bar(
                [place + shift for place in places],
                [min(middle, limit) for _, middle, _ in found],
                0.92 * width,
                yerr=list(zip(*(_error(cost, limit) for cost in found), strict=True)),
                color=_COLOURS[name],
                error_kw={"linewidth": 0.8},
                zorder=2,
            )
            labels = [f"{middle:.2f}" for _, middle, _ in found]
            axes.bar_label(shown[name], labels, padding=3, rotation=90, fontsize=7)
        shown[_FLOOR] = axes.axhline(1.0, color="black", linewidth=1.0, linestyle="--", zorder=1)
        axes.set_xticks(range(len(order)), [f"M = {M}" for M in order])
        axes.set(ylabel=PASSES[mode], ylim=(0, 1.15 * limit))
        _clean(axes)
    figure.suptitle(f"Time of the layer; the frozen one without an adapter takes 1\n{title}")
    _legend(figure, shown)
    return _save(figure, path)


def _curves(groups: list[dict[str, Row]], title: str, path: Path) -> list[Path]:
    """Milliseconds against M, both logarithmic; bands from the 20th to the 80th percentile."""
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    groups = [group for group in groups if int(_any(group)["M"]) > 0]
    modes = [
        mode
        for mode in _modes(groups)
        if len({_any(group)["M"] for group in groups if _any(group)["mode"] == mode}) > 1
    ]
    if not modes:
        return []
    figure, panels = pyplot.subplots(
        1, len(modes), figsize=(1 + 4.6 * len(modes), 4.4), squeeze=False, layout="constrained"
    )
    shown: dict[str, Any] = {}
    for axes, mode in zip(panels[0], modes, strict=True):
        lines: dict[str, dict[int, Row]] = {}
        for group in groups:
            for name, row in group.items():
                if row["mode"] == mode:
                    lines.setdefault(name, {})[int(row["M"])] = row
        for name in _ordered(lines):
            tokens = sorted(lines[name])
            low, middle, high = (
                [float(lines[name][M][column]) for M in tokens]
                for column in ("ms_p20", "ms_p50", "ms_p80")
            )
            ours = name == "fastlora"
            (shown[name],) = axes.plot(
                tokens,
                middle,
                color=_COLOURS[name],
                linewidth=2.5 if ours else 1.5,
                linestyle="--" if name in (_FLOOR, "read") else "-",
                marker="o",
                markersize=4,
                zorder=3 if ours else 2,
            )
            if name in ("peft", "fastlora"):
                axes.fill_between(tokens, low, high, color=_COLOURS[name], alpha=0.15, linewidth=0)
        axes.set(xscale="log", yscale="log", xlabel="tokens", title=PASSES[mode])
        every = sorted({M for line in lines.values() for M in line})
        axes.set_xticks(every, [str(M) for M in every])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
        _clean(axes)
    panels[0][0].set_ylabel("milliseconds a call")
    figure.suptitle(title)
    _legend(figure, shown)
    return _save(figure, path)


def _memory(groups: list[dict[str, Row]], title: str, path: Path) -> list[Path]:
    """Peak memory of a step of four layers, a bar a provider."""
    from matplotlib import pyplot

    modes = _modes(groups)
    providers = {name for group in groups for name in group}
    figure, panels = pyplot.subplots(
        1,
        len(modes),
        figsize=(2 + 4.4 * len(modes), 1.4 + 0.3 * len(providers)),
        squeeze=False,
        layout="constrained",
    )
    for axes, mode in zip(panels[0], modes, strict=True):
        newest = {
            name: row for group in groups for name, row in group.items() if row["mode"] == mode
        }
        names = _ordered(newest)[::-1]
        peaks = [float(newest[name]["peak_mb"]) for name in names]
        labels = [PROVIDERS[name].label for name in names]
        bars = axes.barh(labels, peaks, color=[_COLOURS[name] for name in names], zorder=2)
        axes.bar_label(bars, [f" {peak:.0f}" for peak in peaks], fontsize=8)
        M = newest[names[0]]["M"]
        axes.set(xlabel=f"MiB over the weights, M = {M}", title=PASSES[mode])
        axes.margins(x=0.12)
        _clean(axes, "x")
    figure.suptitle(f"Peak memory of four layers\n{title}")
    return _save(figure, path)


# ---- helpers ---------------------------------------------------------------------------------


def _cost(row: Row, floor: Row) -> tuple[float, float, float]:
    low, middle, high = ratio(row, floor)
    return 1 / high, 1 / middle, 1 / low


def _error(cost: tuple[float, float, float], limit: float) -> tuple[float, float]:
    """Lengths of an error bar; none on a bar that is cut off."""
    low, middle, high = cost
    return (middle - low, min(high, limit) - middle) if middle < limit else (0.0, 0.0)


def _any(group: dict[str, Row]) -> Row:
    return next(iter(group.values()))


def _by_title(groups: list[dict[str, Row]]) -> Iterator[tuple[str, str, list[dict[str, Row]]]]:
    """A title, the end of a file's name, and the groups of one layer and allocator."""
    parts: dict[str, list[dict[str, Row]]] = {}
    for group in groups:
        row = _any(group)
        parts.setdefault(f"{layer_title(row)}; {row['allocator']}", []).append(group)
    for title, part in parts.items():
        name = re.sub(r"[^a-z0-9.]+", "-", title.lower().replace(" x ", "x")).strip("-")
        yield title, f"{name}.png", part


def _modes(groups: list[dict[str, Row]]) -> list[str]:
    present = {_any(group)["mode"] for group in groups}
    return [mode for mode in MODES if mode in present]


def _ordered(names: Iterable[str]) -> list[str]:
    """In the order of _COLOURS, without unknown names."""
    known = set(names)
    return [name for name in _COLOURS if name in known]


def _legend(figure: Any, shown: dict[str, Any]) -> None:
    labels = [PROVIDERS[name].label for name in shown]
    figure.legend(shown.values(), labels, loc="outside lower center", ncols=3, frameon=False)


def _clean(axes: Any, grid: str = "y") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, alpha=0.25, zorder=0)


def _save(figure: Any, path: Path) -> list[Path]:
    from matplotlib import pyplot

    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return [path]
