"""Whether a GPU can run the compiled kernels: asked before every op, looked up once."""

from __future__ import annotations

import functools

import torch

_FIRST = (8, 0)  # compute capability of the kernels' oldest target


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
    # What raises is not cached.
    if not torch.cuda.is_available():
        raise LookupError
    return torch.cuda.get_device_capability(index)
