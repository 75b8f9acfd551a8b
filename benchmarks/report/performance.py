"""Writes the tables of docs/performance.md and of README.md from a file of results.

python -m benchmarks.report.performance                 both documents, from the file of the project
python -m benchmarks.report.performance my.csv --print  the tables of a file of yours
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from fastlora.cli.bench import table
from fastlora.cli.bench.case import PASSES
from fastlora.cli.bench.rows import Row, ratio, read, together
from fastlora.cli.bench.table import Cell, short

from .document import markdown, rewrite

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "epyc-zen4-2core.csv"
DOCS = ROOT / "docs" / "performance.md"
README = ROOT / "README.md"
README_SHAPES = ((2048, 2048), (4096, 4096))
README_TOKENS = (1, 16, 128, 512, 2048)

# Two cores of the machine of RESULTS, GFLOP/s: loops of vdpbf16ps and of fp32 FMA in registers.
PEAK_BF16, PEAK_FP32 = 455.0, 230.0
# Reading memory on them, GB/s: the best of the rows of provider `read`.
BANDWIDTH = 64.0

Group = Mapping[str, Row]


def limit_ms(row: Row) -> float:
    """A lower bound for the time of a fastlora row, in ms: arithmetic or memory at its peak rate.

        base   2 M N K a product at PEAK_BF16, two of them in a step
        LoRA   2 M R (N + K) for its two products at PEAK_FP32, three times that in a step
        memory the weight once a product, at BANDWIDTH

    LoRA's products count at the fp32 rate: bf16 operands would lose the adapters' precision.
    """
    M, N, K, R = (int(row[name]) for name in "MNKR")
    products, lora = (2, 3) if row["mode"] == "step" else (1, 1)
    base_peak = PEAK_FP32 if row["dtype"] == "fp32" else PEAK_BF16
    flop_ms = products * 2 * M * N * K / base_peak * 1e-6
    flop_ms += lora * 2 * M * R * (N + K) / PEAK_FP32 * 1e-6
    # 4 bits and, for each 64 weights, 8 bits of nested absmax or 32 of a plain one.
    bits = {"nf4 nested": 4 + 8 / 64, "nf4": 4.5, "none": 32 if row["dtype"] == "fp32" else 16}
    memory_ms = products * N * K * bits[row["quant"]] / 8 / BANDWIDTH * 1e-6
    return max(flop_ms, memory_ms)


def _ratio_to(baseline: str, invert: bool = False) -> Callable[[Group], Cell]:
    """Time of `baseline` / time of fastlora, or the inverse, with its 20th to 80th percentile."""

    def cell(group: Group) -> Cell:
        low, middle, high = ratio(group["fastlora"], group[baseline])
        if invert:
            low, middle, high = 1 / high, 1 / middle, 1 / low
        return Cell(short(middle), f"{short(low)}-{short(high)}")

    return cell


def _shape_pass(row: Row) -> str:
    return f"{row['N']} x {row['K']}, {PASSES[row['mode']]}, {row['allocator']}"


def _training(quant: str, passes: Sequence[str] = ("forward", "step")) -> Callable[[Row], bool]:
    def keep(row: Row) -> bool:
        setting = row["quant"], row["dtype"], row["dropout"], row["R"]
        return row["mode"] in passes and setting == (quant, "bf16", "0.05", "16")

    return keep


def _share(group: Group) -> Cell:
    row = group["fastlora"]
    return Cell(f"{limit_ms(row) / float(row['ms_p50']):.0%}", f"{float(row['ms_p50']):.3g} ms")


def tables(rows: list[Row]) -> dict[str, str]:
    """Every table of docs/performance.md, by its mark."""
    groups = [g for g in together(rows) if "fastlora" in g and not table.is_model(g["fastlora"])]

    def grid(
        title: str,
        baseline: str,
        keep: Callable[[Row], bool],
        cell: Callable[[Group], Cell],
        label: Callable[[Row], str] = _shape_pass,
    ) -> str:
        """A figure for each label and number of tokens, of rows measured with `baseline`."""
        found = table.Tables()
        for group in groups:
            row = group["fastlora"]
            if baseline in group and keep(row):
                found.put(title, label(row), row, cell(group))
        grids = found.grids(lambda row: (int(row["N"]) * int(row["K"]), label(row)))
        return "".join(made.markdown() for made in grids)

    def versus(baseline: str, quant: str, title: str) -> str:
        return grid(title, baseline, _training(quant), _ratio_to(baseline))

    def cost_over(other: str, title: str) -> str:
        return grid(title, other, _training(nf4, ["step"]), _ratio_to(other, invert=True))

    nf4, dense = "nf4 nested", "none"
    compared = {"peft": "PEFT", "addmm": "addmm", "compile": "compiled PEFT"}
    on_dense = (
        versus(baseline, dense, f"time of {name} / time of fastlora, bf16 base")
        for baseline, name in compared.items()
    )
    of_limit = "share of the limit that fastlora reaches, "
    return {
        "nf4": versus("peft", nf4, "time of PEFT + bitsandbytes / time of fastlora, NF4 nested"),
        "dense": "\n".join(filter(None, on_dense)),
        "limit": "\n".join(
            grid(of_limit + name, "fastlora", _training(quant), _share)
            for quant, name in ((nf4, "NF4 nested"), (dense, "bf16 base"))
        ),
        "adapter": cost_over(
            "fastlora-frozen",
            "time of a LoRA layer / time of fastlora's own frozen layer, NF4 nested",
        ),
        "quant": cost_over("fastlora-dense", "time on NF4 / time on the dense bf16 weight"),
        "decode": grid(
            "time of PEFT on bitsandbytes' repacked weights / time of fastlora, inference",
            "bnb-packed",
            lambda row: row["mode"] == "inference" and row["quant"] == nf4,
            _ratio_to("bnb-packed"),
            lambda row: f"{row['N']} x {row['K']}, {row['allocator']}",
        ),
        "read": grid(
            "share of the time that is needed to read the weight, inference",
            "read",
            lambda row: row["mode"] == "inference",
            lambda group: Cell(f"{ratio(group['fastlora'], group['read'])[1]:.0%}"),
            lambda row: f"{row['N']} x {row['K']}, {row['quant']}, {row['allocator']}",
        ),
        "memory": "\n".join(made.markdown() for made in table.memory(rows)),
        "models": "\n".join(made.markdown() for made in table.models(rows)),
    }


def dirty(rows: Iterable[Row]) -> str | None:
    """A sentence about rows that were measured on uncommitted changes; None without any."""
    rows = list(rows)
    commits = Counter(row["commit"] for row in rows if row["commit"].endswith("-dirty"))
    if not commits:
        return None
    return (
        f"{commits.total()} of {len(rows)} rows were measured on uncommitted changes, and nobody "
        f"can measure them again: {', '.join(sorted(commits))}"
    )


def readme_tables(rows: list[Row]) -> dict[str, str]:
    """The table of README.md: time of PEFT / time of fastlora, under tcmalloc and under glibc."""
    cells: dict[tuple[str, int, int, str, int], dict[str, str]] = {}
    for group in together(rows):
        row = group.get("fastlora")
        if row is None or "peft" not in group or table.is_model(row):
            continue
        if _training("nf4 nested")(row) or _training("none")(row):
            key = (row["quant"], int(row["N"]), int(row["K"]), row["mode"], int(row["M"]))
            middle = ratio(row, group["peft"])[1]
            cells.setdefault(key, {})[row["allocator"]] = f"{middle:.2f}"
    lines = []
    for quant, name in (("nf4 nested", "NF4 nested"), ("none", "dense bf16")):
        for N, K in README_SHAPES:
            for mode in ("forward", "step"):
                found = [cells.get((quant, N, K, mode, M), {}) for M in README_TOKENS]
                pairs = (f"{c.get('tcmalloc', '-')} / {c.get('glibc', '-')}" for c in found)
                lines.append((f"{name}, {N} x {K}", PASSES[mode], *pairs))
    header = ("base, size", "pass", *(f"M = {M}" for M in README_TOKENS))
    return {"measured": markdown(header, lines)}


def main(argv: list[str] | None = None) -> int:
    assert __doc__
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report.performance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("csv", type=Path, nargs="?", default=RESULTS)
    parser.add_argument("--print", action="store_true", help="print the tables, write nothing")
    args = parser.parse_args(argv)
    rows = read(args.csv)
    if (warning := dirty(rows)) is not None:
        print(f"warning: {warning}", file=sys.stderr)
    made = tables(rows)
    if args.print:
        print("\n".join(made.values()))
    else:
        rewrite(DOCS, made)
        rewrite(README, readme_tables(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
