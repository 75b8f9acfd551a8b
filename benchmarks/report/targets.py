"""`python -m benchmarks.report.targets results.csv`: what was measured beside what was aimed at."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fastlora.cli.bench.rows import Row, ratio, read, together
from fastlora.cli.bench.table import PASSES, Cell, Grid, short
from fastlora.cli.console import wide_console

from ..shapes import ATTENTION, DOWN, GATE, ONE_B, SMOL, UP


@dataclass(frozen=True)
class Target:
    """One line of a table: how much faster `provider` should be than `baseline`, by tokens.

    Args:
        label: first column.
        shape: (N, K).
        goals: M -> goal.
        mode, quant, dtype, dropout, allocator: of the rows; None stands for any.
        provider, baseline: the figure is the time of `baseline` / the time of `provider`.
        cost: the figure is the inverse, which should be at most the goal.
    """

    label: str
    shape: tuple[int, int]
    goals: Mapping[int, float]
    mode: str = "step"
    quant: str = "nf4 nested"
    dtype: str = "bf16"
    dropout: str | None = "0.05"
    allocator: str | None = None
    provider: str = "fastlora"
    baseline: str = "peft"
    cost: bool = False

    def fits(self, row: Row) -> bool:
        """Whether `row` measures it, at some number of tokens."""
        wanted = {
            "N": str(self.shape[0]),
            "K": str(self.shape[1]),
            "R": "16",
            "mode": self.mode,
            "quant": self.quant,
            "dtype": self.dtype,
            "dropout": self.dropout,
            "allocator": self.allocator,
        }
        return all(value is None or row[name] == value for name, value in wanted.items())

    def cell(self, group: Mapping[str, Row], M: int) -> Cell:
        """The figure, with the goal and whether it is reached in small print."""
        low, middle, high = ratio(group[self.provider], group[self.baseline])
        if self.cost:
            low, middle, high = 1 / high, 1 / middle, 1 / low
        goal = self.goals.get(M)
        spread = f"{short(low)}-{short(high)}"
        if goal is None:
            return Cell(short(middle), spread)
        met = middle <= goal if self.cost else middle >= goal
        return Cell(f"{short(middle)} {'✓' if met else '✗'}", f"{spread}, aim {goal:g}")


@dataclass(frozen=True)
class Table:
    """Targets that stand in one table."""

    title: str
    lines: list[Target] = field(default_factory=list)


_SPEED_UPS = {
    ("glibc", "forward"): {1: 50, 4: 32, 16: 12, 64: 4.5, 128: 2.8, 512: 1.7, 2048: 1.7},
    ("glibc", "step"): {4: 12, 16: 9, 64: 4.2, 128: 2.7, 512: 1.6, 2048: 1.6},
    ("tcmalloc", "forward"): {1: 18, 4: 10, 16: 4.5, 64: 2.5, 128: 1.9, 512: 1.65, 2048: 1.6},
    ("tcmalloc", "step"): {4: 4, 16: 4, 64: 2.2, 128: 1.75, 512: 1.5, 2048: 1.5},
}


def _speed_ups(shape: tuple[int, int]) -> list[Target]:
    return [
        Target(f"{allocator}, {PASSES[mode]}", shape, goals, mode, allocator=allocator)
        for (allocator, mode), goals in _SPEED_UPS.items()
    ]


def _name(shape: tuple[int, int]) -> str:
    return f"{shape[0]} x {shape[1]}"


def _each(allocators: Iterable[str], **options: object) -> list[Target]:
    """The same target under each allocator."""
    label, shape = options.pop("label", ""), options["shape"]
    assert isinstance(shape, tuple)
    return [
        Target(f"{_name(shape)}{label}, {allocator}", allocator=allocator, **options)  # type: ignore[arg-type]
        for allocator in allocators
    ]


_BOTH = ("glibc", "tcmalloc")
_FROM_64 = (64, 128, 512, 2048)
_SMALL_SHAPES = {
    ONE_B: {16: 3.5, 64: 2.6, 128: 2.0, 512: 1.6, 2048: 1.7},
    SMOL: {16: 4.5, 64: 4.0, 128: 4.0, 512: 3.5, 2048: 2.8},
}
_DENSE = {
    "peft": {16: 1, 64: 1.5, 128: 1, 512: 1.4, 2048: 1.4},
    "addmm": dict.fromkeys((16, *_FROM_64), 1.0),
    "compile": dict.fromkeys((16, *_FROM_64), 1.0),
}

TABLES = [
    *(
        Table(f"PEFT + bitsandbytes / fastlora, {_name(shape)}, NF4 nested", _speed_ups(shape))
        for shape in (ATTENTION, UP, DOWN, GATE)
    ),
    Table(
        "PEFT + bitsandbytes / fastlora, small layers, forward + backward",
        [
            target
            for shape, goals in _SMALL_SHAPES.items()
            for target in _each(_BOTH, shape=shape, goals=goals)
        ],
    ),
    Table(
        "dense bf16 base: peer / fastlora",
        [
            target
            for shape in (ATTENTION, UP, ONE_B, SMOL)
            for baseline, goals in _DENSE.items()
            for mode in ("forward", "step")
            for target in _each(
                _BOTH,
                shape=shape,
                goals=goals,
                mode=mode,
                quant="none",
                baseline=baseline,
                label=f", {baseline}, {mode}",
            )
        ],
    ),
    Table(
        "cost of the adapter: fastlora / its own frozen layer, forward + backward",
        [
            target
            for shape, goal in ((ATTENTION, 1.03), (UP, 1.03), (ONE_B, 1.03), (SMOL, 1.12))
            for target in _each(
                _BOTH,
                shape=shape,
                goals=dict.fromkeys(_FROM_64, goal),
                baseline="fastlora-frozen",
                cost=True,
            )
        ],
    ),
    Table(
        "cost of the 4-bit base: fastlora on NF4 / on dense bf16, forward + backward",
        [
            target
            for shape in (ATTENTION, UP, ONE_B)
            for target in _each(
                _BOTH,
                shape=shape,
                goals=dict.fromkeys((128, 512, 2048), 1.02),
                baseline="fastlora-dense",
                cost=True,
            )
        ],
    ),
    Table(
        "torch's dense bf16 linear / fastlora's frozen NF4 layer, forward + backward",
        [
            target
            for shape in (ATTENTION, UP, ONE_B)
            for target in _each(
                _BOTH,
                shape=shape,
                goals=dict.fromkeys((16, *_FROM_64), 1.0),
                provider="fastlora-frozen",
                baseline="frozen-dense",
            )
        ],
    ),
    Table(
        "bitsandbytes' repacked weights / fastlora, inference",
        [
            target
            for shape in (ATTENTION, UP, DOWN, ONE_B)
            for target in _each(
                _BOTH,
                shape=shape,
                goals={1: 3, 2: 2, 4: 2, 8: 1.5, 16: 1.5},
                mode="inference",
                dropout="0",
                baseline="bnb-packed",
            )
        ],
    ),
    Table(
        "share of the read bandwidth: reading the weight / fastlora, inference",
        [
            target
            for quant in ("nf4 nested", "none")
            for target in _each(
                _BOTH,
                shape=ATTENTION,
                goals=dict.fromkeys((1, 2, 4), 0.85),
                mode="inference",
                quant=quant,
                dropout="0",
                baseline="read",
                label=f", {quant}",
            )
        ],
    ),
]

PEAK_GOAL_MIB, SAVED_GOAL = 80.0, 2.02
FP32_GOAL = 210.0


def report(rows: list[Row]) -> list[Grid]:
    """Every table of which something was measured; of repeated measurements the newest counts."""
    groups = sorted(together(rows), key=lambda group: next(iter(group.values()))["date"])
    grids = []
    for table in TABLES:
        cells: dict[str, dict[int, Cell]] = {}
        for target in table.lines:
            for group in groups:
                row = group.get(target.provider)
                if row is not None and target.baseline in group and target.fits(row):
                    M = int(row["M"])
                    cells.setdefault(target.label, {})[M] = target.cell(group, M)
        grids += _grid(table.title, cells)
    return grids + _dequantize(groups) + _fp32(rows) + _memory(rows)


def _grid(title: str, cells: Mapping[str, Mapping[int, Cell]]) -> list[Grid]:
    tokens = sorted({M for line in cells.values() for M in line})
    if not tokens:
        return []
    lines = [(label, [line.get(M, Cell("-")) for M in tokens]) for label, line in cells.items()]
    return [Grid(title, [f"M = {M}" for M in tokens], lines)]


def _dequantize(groups: list[dict[str, Row]]) -> list[Grid]:
    """Milliseconds of a whole weight, and the share of the write bandwidth."""
    lines: dict[str, list[Cell]] = {}
    names = ("bitsandbytes", "fastlora-fresh", "fastlora-out", "write")
    for group in groups:
        if "write" in group:
            row = group["write"]
            label = f"{row['N']} x {row['K']}, {row['quant']} to {row['dtype']}, {row['allocator']}"
            lines[label] = [
                Cell(
                    f"{float(group[name]['ms_p50']):.3g} ms",
                    f"{ratio(group[name], row)[1]:.0%} of writing" if name != "write" else "",
                )
                if name in group
                else Cell("-")
                for name in names
            ]
    return [Grid("dequantise alone", list(names), list(lines.items()))] if lines else []


def _fp32(rows: list[Row]) -> list[Grid]:
    """GFLOP/s of the layer in fp32, forward; the LoRA term counted."""
    cells: dict[str, dict[int, Cell]] = {}
    for row in sorted(rows, key=lambda row: row["date"]):
        if row["dtype"] != "fp32" or row["mode"] != "forward" or not row["ms_p50"]:
            continue
        M, N, K, R = (int(row[name]) for name in "MNKR")
        rank = R if row["adapter_dtype"] else 0
        flop = 2 * M * (N * K + rank * (N + K))
        rate, goal = flop / float(row["ms_p50"]) * 1e-6, ""
        if row["provider"] == "fastlora":
            goal = f"aim {FP32_GOAL:g}" if M >= 512 else ""
        label = f"{N} x {K}, {row['quant']}, {row['provider']}, {row['allocator']}"
        cells.setdefault(label, {})[M] = Cell(f"{rate:.0f}", goal)
    return _grid("fp32 activations, GFLOP/s, forward", cells)


def _memory(rows: list[Row]) -> list[Grid]:
    """MiB over the weights, and bytes saved for each input element."""
    lines: dict[str, list[Cell]] = {}
    for row in sorted(rows, key=lambda row: row["date"]):
        if not row["peak_mb"] or row["mode"] != "step":
            continue
        ours = row["provider"] == "fastlora"
        label = (
            f"{row['N']} x {row['K']}, M = {row['M']}, {row['quant']}, {row['provider']}, "
            f"{row['allocator']}"
        )
        lines[label] = [
            Cell(row["peak_mb"], f"aim {PEAK_GOAL_MIB:g}" if ours else ""),
            Cell(row["saved_bytes"], f"aim {SAVED_GOAL:g}" if ours else ""),
        ]
    columns = ["MiB over the weights", "bytes saved an input element"]
    return [Grid("a training step over four layers", columns, list(lines.items()))] if lines else []


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report.targets", description=__doc__
    )
    parser.add_argument("csv", type=Path)
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args()
    console = wide_console()
    for grid in report(read(args.csv)):
        if args.markdown:
            print(grid.markdown())
        else:
            grid.show(console)


if __name__ == "__main__":
    main()
