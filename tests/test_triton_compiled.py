"""The Triton kernels compiled ahead of time for every class of GPU, against the gate file."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.report import roofline, static_report
from benchmarks.report.static_report import Row
from fastlora.backends import native

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)

GOOD = Row(
    "3.9.0", "sm_90", "base_product_4bit fwd", "bf16", "128x128x64 w8 s3", 120, 0, 65536, 270,
    "HGMMA", 7,
)  # fmt: skip


DTYPES = "bf16, fp32 adapter"
# Half as deep a tile, and half the instructions of a loop of 100.
DENSE = Row(**{**vars(GOOD), "kernel": "base_product fwd", "tile": "128x128x32 w8 s3", "loop": 50})


@pytest.mark.slow
def test_every_kernel_passes_its_gates() -> None:
    """In a process of its own: here kernels are interpreted."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.report.static_report", "--check"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    archs = {line.split(", ")[1] for line in done.stdout.splitlines()}
    assert archs == {row.arch for row in static_report.read_gates()}


def test_the_gate_file_holds_both_tritons() -> None:
    gates = static_report.read_gates()
    requirements = (ROOT / "requirements" / "dev.txt").read_text()
    versions = {row.triton for row in gates}
    assert len(versions) == 2 and "3.6.0" in versions
    assert any(f"triton=={version}\n" in requirements for version in versions)
    keys = {
        version: {row.key[1:] for row in gates if row.triton == version} for version in versions
    }
    first, second = keys.values()
    assert first == second and len(first) > 60
    for row in gates:
        dense = next(
            r for r in gates if r.key == (row.triton, row.arch, "base_product fwd", DTYPES)
        )
        assert static_report.faults(row, row, dense) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"spilled": 8}, "8 bytes spilled"),
        ({"shared": 240 * 1024}, "of shared memory, 232448 allowed"),
        ({"mma": "HMMA"}, "no HGMMA, got HMMA"),
        ({"mma": ""}, "no HGMMA, got none"),
        ({"registers": 129}, "129 registers, 120 before"),
        ({"loop": 300}, "300 instructions a loop, 270 before"),
        ({"loop": 600}, "6.0 times the dense loop's instructions"),
    ],
)
def test_a_worse_kernel_is_a_fault(change: dict, says: str) -> None:
    assert static_report.faults(GOOD, GOOD, DENSE) == []
    worse = Row(**{**vars(GOOD), **change})
    assert any(says in line for line in static_report.faults(worse, GOOD, DENSE))
    assert any("no row" in line for line in static_report.faults(GOOD, None, DENSE))


def test_a_part_of_the_gates_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gates = static_report.read_gates()
    path = tmp_path / "triton.csv"
    path.write_text(static_report.GATES.read_text())
    monkeypatch.setattr(static_report, "GATES", path)
    asked = [row for row in gates if row.key[:2] == (gates[-1].triton, "sm_90")]
    static_report.write_gates(asked, ["sm_90"], "")
    assert static_report.read_gates() == gates
    *others, changed = [Row(**{**vars(row), "registers": 9}) for row in asked]
    gone = asked[0]
    assert static_report.vanished(asked[1:], gates, ["sm_90"], "") == [gone]
    assert static_report.vanished(asked[1:], gates, ["sm_90"], changed.kernel + "$") == []
    static_report.write_gates([*others[1:], changed], ["sm_90"], "")
    after = static_report.read_gates()
    assert len(after) == len(gates) - 1 and gone.key not in {row.key for row in after}
    assert all((row.registers == 9) == (row.key in {r.key for r in asked}) for row in after)


def test_loops_are_found_in_both_assemblers() -> None:
    sass = """
.L_x_1:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_2:
        /*0010*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0020*/                   IADD3 R0, R0, 0x1, RZ ;
        /*0030*/               @P0 BRA `(.L_x_2) ;
        /*0040*/                   BRA `(.L_x_1) ;
"""
    gcn = (
        ".LBB0_1:\n\tv_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]\n"
        "\ts_add_i32 s0, s0, 1\n\ts_branch .LBB0_1\n\ts_endpgm\n"
    )
    for text, mma, length in ((sass, "HMMA", 3), (gcn, "v_mfma", 3)):
        instructions, labels = static_report.parse_assembly(text)
        assert static_report.loop_length(instructions, labels, mma) == length
        assert static_report.loop_length(instructions, labels, "HGMMA") == 0


def test_the_model_that_prunes_fits_the_compiled_kernels() -> None:
    """It must never take a tile for too large that was compiled, nor be far below."""
    from fastlora.backends.triton.tiles import (
        ARCHS,
        TILES,
        candidates,
        default_tile,
        registers,
        shared_bytes,
    )

    by_text = {
        f"{t.BM}x{t.BN}x{t.BK} w{t.warps} s{t.stages}": t
        for rows in TILES.values()
        for row in rows.values()
        for _, t in row
    }
    compared = 0
    for row in static_report.read_gates():
        if not row.kernel.startswith("base_product") or row.dtypes == "fp32":
            continue
        tile, packed = by_text[row.tile], "4bit" in row.kernel
        predicted = shared_bytes(tile, 2, row.arch, packed)
        assert predicted <= ARCHS[row.arch].shared, row
        # The most for sm_100's small tiles, whose decoded weight goes to tensor memory.
        assert 0.5 * row.shared <= predicted <= 2.5 * row.shared, (row, predicted)
        # AMD counts vector and accumulator registers together, up to 512.
        if row.arch.startswith("sm_"):
            needed = registers(tile, 2, row.arch, packed)
            assert 0.5 * row.registers <= needed <= 255, (row, needed)
        compared += 1
    assert compared > 60
    for arch, limits in ARCHS.items():
        for kernel in ("base_product", "base_product_4bit"):
            found = candidates(kernel, arch, torch.bfloat16, 4096, 16)
            assert found[0] == default_tile(kernel, arch, torch.bfloat16, 4096, 16)
            assert len(set(found)) == len(found) > 1
            for tile in found:
                assert shared_bytes(tile, 2, arch, "4bit" in kernel) <= limits.shared


def test_docs_have_the_tables_of_the_gate_file() -> None:
    text = static_report.DOCS.read_text()
    assert static_report.docs_text(text) == text, (
        "run python -m benchmarks.report.static_report --docs"
    )


def test_roofline_counts_the_launches_of_the_ops() -> None:
    size = roofline.Size(4096, 4096, 4096, 16)
    kernels = roofline.ours(size, "sm_90", 132)
    names = [kernel.what for kernel in kernels]
    assert names.count("base_product") == 2 and names.count("grad_b") == 1
    assert {"shrink", "grad_a", "sum_partials"} <= set(names)
    # Each pass reads its tokens once: x for S, for y and for dA, dy for dS and dB, and for dx.
    read = sum(kernel.bytes for kernel in kernels)
    assert read > 2 * (3 * size.x + 2 * size.y + 2 * size.weight)
    gpu = roofline.GPUS["H100"]
    frozen, ours, peft = (
        roofline.seconds(make(size, gpu), gpu)
        for make in (roofline.PROVIDERS[name] for name in ("frozen", "fastlora", "PEFT"))
    )
    assert frozen < ours < peft


def test_gpu_suite_runs_end_to_end(tmp_path: Path) -> None:
    from benchmarks.measure import gpu

    out = tmp_path / "results"
    command = [sys.executable, "-m", "benchmarks.measure.gpu", "--out", str(out), "--dry-run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in out.glob("*.*")} == {
        "verify.csv", "tune.csv", "layers.csv", "summary.json",
    }  # fmt: skip
    layers = (out / "layers.csv").read_text()
    for provider in ("frozen", "addmm", "fastlora-triton"):
        assert f",{provider}," in layers
    if native.unavailable_reason() is None:
        assert ",fastlora," in layers
        assert ",native,qlora_linear_bwd,nf4" in (out / "verify.csv").read_text()
        assert ",native backend," in (out / "tune.csv").read_text()
    assert "Triton's interpreter" in layers
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(out), "--dry-run"])  # a folder with results in it
