"""The CUDA kernels' own checks: planted faults, sanitizers, and the library for GPUs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import cuda_checks, emulated

backend = cuda_checks.backend


def test_every_asm_stands_in_ptx() -> None:
    """The emulation replaces ptx.cuh, launch.cuh and cuda_stream.h: nothing else may need CUDA."""
    replaced = {"ptx.cuh", "launch.cuh", "cuda_stream.h"}
    for folder in ("cuda", "bindings"):
        for path in (emulated.ROOT / "csrc" / folder).iterdir():
            if path.name in replaced:
                continue
            found = re.findall(
                r"\basm\b|threadIdx|blockIdx|__sync\w+|__shfl\w+|__shared__|<<<|cuda_runtime",
                path.read_text(),
            )
            assert not found, f"{path}: {found}"


# ---- planted faults ----------------------------------------------------------------------------


@pytest.mark.slow
def test_every_planted_fault_is_noticed() -> None:
    command = [sys.executable, "-m", "tests.cuda_mutants"]
    done = subprocess.run(command, cwd=emulated.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.count("\nok ") >= 30 and "MISSED" not in done.stdout


def test_the_tables_of_the_document_are_those_of_the_gates_and_the_faults() -> None:
    from benchmarks.report import cuda_report
    from benchmarks.report.document import fill

    text = cuda_report.DOCS.read_text()
    assert fill(text, cuda_report.tables()) == text


# ---- the library for GPUs ----------------------------------------------------------------------


LOADS = """
import ctypes, torch, fastlora
torch.ops.load_library({library!r})
for op in (
    "quantize_4bit", "quantize_absmax", "dequantize_4bit_out",
    "qlora_gemm_fwd", "qlora_gemm_dx", "qlora_decode",
):
    assert torch._C._dispatch_has_kernel_for_dispatch_key("fastlora::" + op, "CUDA"), op
library = ctypes.CDLL({library!r})
library.fastlora_cuda_fault.restype = ctypes.c_char_p
fault = library.fastlora_cuda_fault(0)
assert (fault == b"this torch has no CUDA") == (torch.version.cuda is None), fault
"""


@pytest.mark.slow
def test_the_gpu_library_loads_without_a_gpu() -> None:
    emulated.run_cmake("cuda-build")
    library = emulated.ROOT / "fastlora" / "_CUDA.so"
    if not library.exists():
        pytest.skip("no nvcc: fastlora/_CUDA.so has not been built")
    command = [sys.executable, "-c", LOADS.format(library=str(library))]
    done = subprocess.run(command, cwd=emulated.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


# ---- sanitizers --------------------------------------------------------------------------------


SANITIZED = """
import torch
from tests import cuda_checks, emulated
from tests.cases import BASES, DTYPES

emulated.load_library({library!r})
torch.manual_seed(0)
with emulated.as_backend() as name:
    for i, case in enumerate(cuda_checks.EDGES):
        cuda_checks.check_against_definition(case, cuda_checks.NESTED, "bf16, fp32 adapter", name)
        base = BASES[2 + i % (len(BASES) - 2)]
        for dtypes in ("fp16", "fp32 computed in bf16"):
            cuda_checks.check_against_definition(case, base, dtypes, name)
    for blocksize, dtype in ((32, torch.float32), (64, torch.bfloat16), (4096, torch.float16)):
        cuda_checks.check_quantize_and_dequantize(blocksize, "nf4", dtype, name)
    cuda_checks.check_nested_absmax(257)
print("clean")
"""


@pytest.mark.slow
def test_under_address_and_undefined_behaviour_sanitizers() -> None:
    """Tensors come from malloc, so a read past the end of any of them is seen."""
    library = emulated.build("fastlora_emulated_sanitized")
    runtime = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout
        for name in ("libasan.so", "libubsan.so")
    ]
    assert all(Path(path.strip()).is_absolute() for path in runtime), runtime
    done = subprocess.run(
        [sys.executable, "-c", SANITIZED.format(library=str(library))],
        cwd=emulated.ROOT,
        env={
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": str(emulated.ROOT),
            "LD_PRELOAD": " ".join(path.strip() for path in runtime),
            "ASAN_OPTIONS": "detect_leaks=0",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout == "clean\n", done.stderr[-4000:]
