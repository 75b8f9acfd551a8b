"""The compiled libraries: fastlora._C with the CPU's kernels, fastlora/_CUDA.so with a GPU's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .. import schemas
from ..machine import cpu

CUDA_LIBRARY = Path(__file__).parents[2] / "_CUDA.so"

# The ops exist even without a library; then no device has an implementation of them.
LIBRARY = schemas.define("fastlora", schemas.NATIVE_OPS)

_build: dict[str, Any] | None
_reason: str | None = None
try:
    from ... import _C

    _build = _C.build_info()
except ImportError as error:
    _build = None
    _reason = (
        f"the compiled library fastlora._C can't be loaded ({error}); "
        "in fastlora's source folder, `FASTLORA_NATIVE=1 pip install --no-build-isolation .` "
        "builds it."
    )
else:
    cpu.use_tuned(_C)


def build_info() -> dict[str, Any] | None:
    """Compiler, version, instruction sets compiled and chosen; None without the library."""
    return _build


def unavailable_reason() -> str | None:
    """One sentence: why fastlora._C is missing and how to get it; None when it is there."""
    return _reason


def load_cuda() -> str | None:
    """Loads fastlora/_CUDA.so; one sentence that says why it can't, or None."""
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is built without CUDA."
    if not CUDA_LIBRARY.exists():
        return (
            "the library fastlora/_CUDA.so has not been built; in fastlora's source folder, "
            "`CMAKE_ARGS=-DFASTLORA_CUDA=ON pip install --no-build-isolation .` builds it, with "
            "nvcc."
        )
    try:
        torch.ops.load_library(str(CUDA_LIBRARY))
    except OSError as error:
        return f"the library {CUDA_LIBRARY} can't be loaded: {error}"
    return None
