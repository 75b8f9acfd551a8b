"""Writes the CUDA kernels' tables of docs/gpu.md: compiled figures, and the faults of the tests.

    python -m benchmarks.report.cuda_report

The figures are those of tests/csrc/cuda_gates.csv, which `make cuda-check` compares with what nvcc
compiles; the faults are those that tests/cuda_mutants.py plants.
"""

from __future__ import annotations

from pathlib import Path

from tests.csrc import cuda_gates
from tests.cuda_faults import FAULTS

from .document import markdown, rewrite

DOCS = Path(__file__).parents[2] / "docs" / "gpu.md"


def figures() -> str:
    """A line for each kernel, a column for each architecture."""
    release, rows = cuda_gates.read_gates()
    archs = list(dict.fromkeys(row["arch"] for row in rows))
    lines = []
    cells = {(row["kernel"], row["arch"]): row for row in rows}
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        texts = []
        for arch in archs:
            row = cells[kernel, arch]
            names = ["registers", "stack", "spills", "instructions"]
            names += ["loop", "loop_per_8"] if row["loop"] else []
            texts.append(" / ".join(row[name] for name in names))
        lines.append((kernel, *texts))
    return markdown((f"nvcc {release}", *archs), lines)


def faults() -> str:
    """A line for each planted fault: its place, and the check that must notice it."""
    words = {
        "race": "the race detector",
        "deadlock": "the scheduler: lanes that never meet",
        "end": "the bound of shared memory",
        "a block asks for": "the limit of shared memory of a block",
        "ends before": "the end of a thread with copies under way",
        "banks": "the count of bank conflicts",
        "wrong": "the error policy, or bits that differ",
    }
    return markdown(
        ("kernel", "fault", "noticed by"),
        ((fault.unit, fault.name, words[fault.noticed]) for fault in FAULTS),
    )


def tables() -> dict[str, str]:
    """Every table by its mark."""
    return {"cuda": figures(), "faults": faults()}


if __name__ == "__main__":
    rewrite(DOCS, tables())
