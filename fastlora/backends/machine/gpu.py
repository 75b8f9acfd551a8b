"""A GPU as the kernels see it: whether it can run them, and how the cache of choices names it."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
from pathlib import Path

import torch

from ... import tuning

_FIRST = (8, 0)  # compute capability of the kernels' oldest target

# M, N, K, R of an op.
Sizes = tuple[int, int, int, int]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def unsupported_gpu(index: int | None) -> str | None:
    """One sentence that says why no kernel runs on a GPU, or None.

    Args:
        index: of the device; torch's current one when None.
    """
    try:
        capability = _capability(index)
    except LookupError:
        return "this torch sees no CUDA device."
    if torch.version.hip is not None:
        return None
    if capability < _FIRST:
        return f"the kernels need compute capability 8.0 or newer, this GPU has {capability}."
    return None


@functools.cache
def _capability(index: int | None) -> tuple[int, int]:
    # functools.cache doesn't cache exceptions, so a GPU that appears later is found.
    if not torch.cuda.is_available():
        raise LookupError
    return torch.cuda.get_device_capability(index)


def interpreted() -> bool:
    """True when Triton's interpreter runs the kernels, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def triton_version() -> str | None:
    """`triton.__version__`, None without Triton. It is read, not imported."""
    return _read_triton_version()


@functools.cache
def _read_triton_version() -> str | None:
    # Not by the distribution's name: a build for AMD is called pytorch-triton-rocm.
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    text = Path(spec.origin).read_text()
    found = re.search(r"^__version__ = ['\"](.+?)['\"]", text, re.MULTILINE)
    return str(importlib.import_module("triton").__version__) if found is None else found[1]


@functools.cache
def device_key(index: int) -> str:
    """How the cache of choices names a GPU: its name, its driver and Triton's version."""
    name = torch.cuda.get_device_properties(index).name
    return tuning.device_key(name, _driver(), f"triton {triton_version()}")


def _driver() -> str:
    """The kernel driver's version, or torch's toolkit if that is hidden."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text().split()
        return "driver " + next(word for word in words if word[0].isdigit() and "." in word)
    except (OSError, StopIteration):
        return f"CUDA {torch.version.cuda}, HIP {torch.version.hip}"


def shape_key(dtype: torch.dtype, sizes: Sizes) -> str:
    """How the cache names a shape: the same for all M, and for all R, of one power of two."""
    M, N, K, R = sizes
    name = str(dtype).removeprefix("torch.")
    return f"{name} M{tuning.size_class(M)} N{N} K{K} R{tuning.size_class(R)}"
