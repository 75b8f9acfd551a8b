"""The CUDA kernels on a CPU: builds and loads them, and makes a backend of them.

`torch.ops.fastlora_emulated` are the ops of csrc/bindings/cuda_ops.cpp, compiled for CPU tensors
with the kernels' own sources over tests/csrc/simt. The library implements them; they are defined
here, from the table of backends/schemas.py.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlora import backends
from fastlora.backends import schemas
from fastlora.backends.native import cuda
from tests.building import BUILD, build_lock

ROOT = Path(__file__).resolve().parents[1]
NAME = "cuda emulated"
# As on an sm_80. The emulation has no compute capability.
FUSED_TOKENS = cuda.FUSED_TOKENS[8, 0]


def run_cmake(target: str) -> None:
    """Brings a target of CMakeLists.txt up to date, or skips the test that wants it."""
    if not (BUILD / "build.ninja").exists():
        pytest.skip("there is no build/ with CMake's targets: FASTLORA_NATIVE=0 leaves it out")
    command = [str(Path(sys.executable).parent / "cmake"), "--build", str(BUILD)]
    with build_lock():
        done = subprocess.run([*command, "--target", target], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]


def build(target: str = "fastlora_emulated") -> Path:
    """The emulated library, compiled."""
    if platform.machine() != "x86_64":
        pytest.skip("the emulation switches fibers with instructions of x86-64")
    run_cmake(target)
    return BUILD / f"{target}.so"


@functools.cache
def define_ops() -> torch.library.Library:
    """`torch.ops.fastlora_emulated`, without implementations."""
    return schemas.define("fastlora_emulated", schemas.CUDA_OPS)


def load_library(path: Path) -> ctypes.CDLL:
    """Registers the ops and returns the library's C functions."""
    define_ops()
    torch.ops.load_library(str(path))
    library = ctypes.CDLL(str(path))
    library.simt_to_float.restype = ctypes.c_float
    library.simt_counters.restype = Counters
    return library


class Counters(ctypes.Structure):
    """What the emulation has counted: simt::Counters in tests/csrc/simt/simt.h."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            "blocks",
            "matrix_products",
            "matrix_loads",
            "bank_conflicts",
            "async_copies",
            "plain_turns",
            "plain_conflicts",
        )
    ]


@functools.cache
def load() -> ctypes.CDLL:
    """The library, compiled and loaded once."""
    return load_library(build())


# Names of the ops that `as_backend` has called, in order: a test that means a kernel can see to it.
called: list[str] = []


class Recorded:
    """`torch.ops.fastlora_emulated`, which adds to `called`."""

    def __getattr__(self, op: str) -> Any:
        called.append(op)
        return getattr(torch.ops.fastlora_emulated, op)


@contextmanager
def as_backend() -> Iterator[str]:
    """Inside, `backend="cuda emulated"` runs the ops' CUDA side on CPU tensors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "ops", Recorded())
        patch.setattr(cuda, "_reason", None)
        patch.setattr(cuda, "unsupported_gpu", lambda index: None)
        patch.setattr(cuda, "_fault", lambda index: None)
        patch.setattr(cuda, "fused_tokens", lambda device: FUSED_TOKENS)
        # Triton's interpreter would take most of the time, and has tests of its own: the reference.
        patch.setattr(cuda, "skinny", lambda device: None)
        patch.setitem(backends.BACKENDS, NAME, cuda.Cuda())
        yield NAME
