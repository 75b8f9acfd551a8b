"""What the compiler makes of every Triton kernel on every class of GPU, without a GPU.

    python -m benchmarks.report.static_report            compile and print the table
    python -m benchmarks.report.static_report --check    compare with the gates; 1 on a breach
    python -m benchmarks.report.static_report --write    write this Triton's rows of the gate file
    python -m benchmarks.report.static_report --docs     write the tables of docs/gpu.md

The gate file has rows for each version of Triton that is tested. To check another version than the
installed one, put it beside: `pip install --no-deps --target DIR triton==3.6.0`, then
`PYTHONPATH=DIR python -m benchmarks.report.static_report --check`.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .document import fill, markdown

GATES = Path(__file__).parents[1] / "gates" / "triton.csv"
DOCS = Path(__file__).parents[2] / "docs" / "gpu.md"
# A main loop may grow by this much, registers by that much, before it is a regression.
LOOP_SLACK, REGISTER_SLACK = 1.05, 8
# A 4-bit main loop takes no more than so many times the dense one's instructions for a weight:
# where bytes are permuted, and where each code is looked up.
DECODE_FACTOR, LOOK_UP_FACTOR = 5.0, 8.0


@dataclass(frozen=True)
class Row:
    """One compiled kernel.

    `registers` are per thread, `spilled` is stack in bytes (0 wanted), `shared` bytes per program,
    `loop` instructions of the innermost loop that holds a matrix instruction, `mma` the name of
    that instruction and `count` their number in the whole kernel.
    """

    triton: str
    arch: str
    kernel: str
    dtypes: str
    tile: str
    registers: int
    spilled: int
    shared: int
    loop: int
    mma: str
    count: int

    @property
    def cell(self) -> str:
        """Registers, spilled bytes, KiB shared, loop and matrix instructions, for a table."""
        figures = (self.registers, self.spilled, self.shared // 1024, self.loop, self.count)
        return " / ".join(str(figure) for figure in figures)

    @property
    def per_weight(self) -> float:
        """Warp instructions of the main loop for each weight of its tile."""
        sides, warps, _ = self.tile.split(" ")
        _, BN, BK = map(int, sides.split("x"))
        return self.loop * int(warps[1:]) / (BN * BK)

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What identifies a row in the gate file."""
        return self.triton, self.arch, self.kernel, self.dtypes


def loop_length(instructions: list[str], labels: dict[str, int], mma: str) -> int:
    """Instructions of the shortest loop with a matrix instruction in it; 0 without one.

    Args:
        instructions: in program order.
        labels: label -> index of the instruction behind it.
    """
    best = 0
    for end, text in enumerate(instructions):
        jump = re.match(r"(?:@!?U?P\w+ )?(?:BRA|s_cbranch_\w+|s_branch)\b.*?(\.?L\w+)", text)
        if jump is None or labels.get(jump[1], end + 1) > end:
            continue
        body = instructions[labels[jump[1]] : end + 1]
        if any(mma in line for line in body) and (best == 0 or len(body) < best):
            best = len(body)
    return best


def parse_assembly(text: str) -> tuple[list[str], dict[str, int]]:
    """Instructions and labels of nvdisasm's or LLVM's listing."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        label = re.match(r"\s*(\.?L\w+):", line)
        sass = re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line)
        gcn = re.match(r"\t([a-z]\w*_\w+\b[^;]*)", line)
        if label:
            labels[label[1]] = len(instructions)
        elif sass or gcn:
            instructions.append(re.sub(r"\s+", " ", (sass or gcn)[1]))  # type: ignore[index]
    return instructions, labels


def inspect_cubin(cubin: bytes) -> tuple[str, int, int]:
    """Listing, registers and stack bytes, with the tools of the Triton wheel."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

    def tool(name: str, *args: str) -> str:
        done = subprocess.run([tools / name, *args], capture_output=True, text=True, check=True)
        return done.stdout + done.stderr

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = tool("cuobjdump", "-res-usage", file.name)
        listing = tool("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return listing, int(found[1]), int(found[2])


# What tiles below wgmma's and tcgen05's least height of 64 take.
SMALL_MMA = "HMMA"


def measure(compiled: Any, own: str) -> tuple[int, int, int, int, str, int]:
    """Registers, spilled bytes, shared bytes, loop length, matrix instruction and their number.

    Args:
        own: the matrix instruction of the class of GPUs.
    """
    if "cubin" in compiled.asm:
        listing, registers, spilled = inspect_cubin(compiled.asm["cubin"])
    else:
        listing = compiled.asm["amdgcn"]
        registers = _metadata(listing, "vgpr_count")
        spilled = 4 * _metadata(listing, "vgpr_spill_count")
    instructions, labels = parse_assembly(listing)
    mma = next((name for name in (own, SMALL_MMA) if any(name in i for i in instructions)), "")
    count = sum(mma in line for line in instructions) if mma else 0
    loop = loop_length(instructions, labels, mma) if mma else 0
    return registers, spilled, compiled.metadata.shared, loop, mma, count


def _metadata(listing: str, name: str) -> int:
    found = re.search(rf"\.{name}:\s*(\d+)", listing)
    assert found, f"no .{name} in the listing"
    return int(found[1])


def compile_all(archs: list[str], kernels: str = "") -> Iterator[Row]:
    """A row for each kernel whose name matches, as soon as it is compiled."""
    import torch
    import triton

    from fastlora.backends.triton import aot, tiles

    combinations = (
        ("bf16, fp32 adapter", torch.bfloat16, torch.float32),
        ("bf16", torch.bfloat16, torch.bfloat16),
        ("fp16, fp32 adapter", torch.float16, torch.float32),
        ("fp32", torch.float32, torch.float32),
    )
    for arch in archs:
        limits = tiles.ARCHS[arch]
        for name, dtype, adapter in combinations:
            for kernel, launch in aot.launches(arch, dtype, adapter).items():
                # The usual combination everywhere; what another changes, on one class.
                if name != combinations[0][0] and (arch != "sm_90" or kernel not in VARYING):
                    continue
                if kernel.endswith("R = 64") and arch in MMA_SYNC_LIKE_SM_86:
                    continue
                if re.search(kernels, kernel) is None:
                    continue
                compiled = aot.compile_launch(launch, arch)
                tile = launch.tile
                shape = (
                    f"{tile.BM}x{tile.BN}x{tile.BK} w{tile.warps} s{tile.stages}" if tile else ""
                )
                figures = measure(compiled, limits.mma)
                yield Row(triton.__version__, arch, kernel, name, shape, *figures)


# Large ranks are compiled for sm_86, which has their instructions and the least shared memory.
MMA_SYNC_LIKE_SM_86 = ("sm_80", "sm_120")
# Kernels that another dtype changes, beyond the type of a load.
VARYING = ("shrink", "base_product fwd", "base_product dx", "grad_b", "base_product_4bit fwd")


def faults(row: Row, gate: Row | None, dense: Row | None) -> list[str]:
    """What is wrong with a compiled kernel: its GPU's limits, its row of the gate file, and for a
    4-bit product the dense one of the same GPU.
    """
    from fastlora.backends.triton import tiles

    limits = tiles.ARCHS[row.arch]
    where = f"{row.arch} {row.kernel} ({row.dtypes}, triton {row.triton})"
    found = []
    if row.spilled:
        found.append(f"{where}: {row.spilled} bytes spilled")
    if row.shared > limits.shared:
        found.append(f"{where}: {row.shared} bytes of shared memory, {limits.shared} allowed")
    multiplies = not row.kernel.startswith(("sum_partials", "dequantize"))
    tall = row.tile and int(row.tile.split("x")[0]) >= 64
    allowed = (limits.mma,) if tall else (limits.mma, SMALL_MMA)
    if multiplies and row.dtypes != "fp32" and row.mma not in allowed:
        found.append(f"{where}: no {limits.mma}, got {row.mma or 'none'}")
    if dense is not None and row.kernel.startswith("base_product_4bit"):
        ratio = row.per_weight / dense.per_weight
        if ratio > (DECODE_FACTOR if row.arch.startswith("sm_") else LOOK_UP_FACTOR):
            found.append(f"{where}: {ratio:.1f} times the dense loop's instructions")
    if gate is None:
        found.append(f"{where}: no row in {GATES.name}")
    else:
        if row.registers > gate.registers + REGISTER_SLACK:
            found.append(f"{where}: {row.registers} registers, {gate.registers} before")
        if row.loop > gate.loop * LOOP_SLACK:
            found.append(f"{where}: {row.loop} instructions a loop, {gate.loop} before")
        if row.shared > gate.shared:
            found.append(f"{where}: {row.shared} bytes of shared memory, {gate.shared} before")
    return found


def read_gates() -> list[Row]:
    """The rows of the gate file."""
    if not GATES.exists():
        return []
    kinds = {field.name: int if field.type == "int" else str for field in fields(Row)}
    with GATES.open() as file:
        return [
            Row(**{name: kinds[name](value) for name, value in line.items()})
            for line in csv.DictReader(file)
        ]


def vanished(rows: list[Row], gates: list[Row], archs: list[str], kernels: str) -> list[Row]:
    """Rows of the gate file that should have been compiled with `rows` and were not.

    Args:
        archs, kernels: what was asked for.
    """
    versions, found = {row.triton for row in rows}, {row.key for row in rows}
    return [
        gate
        for gate in gates
        if gate.triton in versions
        and gate.arch in archs
        and re.search(kernels, gate.kernel)
        and gate.key not in found
    ]


def write_gates(rows: list[Row], archs: list[str], kernels: str) -> None:
    """Puts `rows` in place of those that were asked for; all others stay.

    Args:
        archs, kernels: what was asked for.
    """
    gates = read_gates()
    gone = {row.key for row in vanished(rows, gates, archs, kernels)}
    new = {row.key: row for row in rows}
    # Rows keep their places; new ones come after the others of their Triton.
    written = [new.pop(row.key, row) for row in gates if row.key not in gone] + [*new.values()]
    with GATES.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in sorted(written, key=lambda row: row.triton))


def table(rows: list[Row]) -> str:
    """Markdown: a line for each kernel, a column for each class of GPU."""
    archs = list(dict.fromkeys(row.arch for row in rows))
    cells = {(row.kernel, row.dtypes, row.arch): row.cell for row in rows}
    names = dict.fromkeys((row.kernel, row.dtypes) for row in rows)
    return markdown(
        ("kernel, dtypes", *archs),
        ((", ".join(name), *(cells.get((*name, arch), "") for arch in archs)) for name in names),
    )


def docs_text(text: str) -> str:
    """docs/gpu.md with the tables of the gate file's newest Triton and of the roofline in it."""
    from . import roofline

    gates = read_gates()
    newest = max((row.triton for row in gates), key=lambda v: tuple(map(int, v.split("."))))
    static = f"Triton {newest}.\n\n{table([row for row in gates if row.triton == newest])}"
    return fill(text, {"static": static, "roofline": roofline.markdown()})


def main(argv: list[str] | None = None) -> int:
    """Compiles, prints and, where asked to, compares or writes."""
    assert __doc__
    parser = argparse.ArgumentParser(prog="benchmarks.report.static_report", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--arch", action="append", help="a class of GPUs; all when left out")
    parser.add_argument("--kernels", default="", help="regular expression for their names")
    parser.add_argument("--check", action="store_true", help="fail on a breach of the gate file")
    parser.add_argument("--write", action="store_true", help="write the gate file")
    parser.add_argument("--docs", action="store_true", help="write docs/gpu.md from the gate file")
    args = parser.parse_args(argv)
    if args.docs:
        DOCS.write_text(docs_text(DOCS.read_text()))
        return 0
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        parser.error("TRITON_INTERPRET must be 0: an interpreted kernel can't be compiled")
    from fastlora.backends.triton import tiles

    archs = args.arch or [arch for arch, limits in tiles.ARCHS.items() if limits.mma]
    gates = {row.key: row for row in read_gates()}
    rows: list[Row] = []
    broken: list[str] = []
    for row in compile_all(archs, args.kernels):
        rows.append(row)
        print(*asdict(row).values(), sep=", ", flush=True)
        dense = [r for r in rows if (r.arch, r.kernel) == (row.arch, "base_product fwd")]
        broken += faults(row, gates.get(row.key), dense[0] if dense else None)
    if not rows:
        parser.error(f"--kernels: expected a pattern that a kernel has, got {args.kernels!r}")
    for row in vanished(rows, list(gates.values()), archs, args.kernels):
        broken.append(f"{row.arch} {row.kernel} ({row.dtypes}, triton {row.triton}): is gone")
    if args.write:
        write_gates(rows, archs, args.kernels)
    if args.check:
        print(*broken, sep="\n", file=sys.stderr)
        return 1 if broken else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
