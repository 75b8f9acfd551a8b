"""Which backend, and which of its kernels, `fastlora tune` found the fastest for an op on a GPU."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import tuning

# Tokens above this share what was kept for the last class.
_MOST_TOKENS = 2**24


def key(op: str) -> str:
    """How the cache names the choice of a backend, beside the op's own choice of a tile."""
    return f"{op}, backend"


class Kept(NamedTuple):
    """What was kept for an op and a class of sizes.

    Args:
        backend: the fastest one.
        kernel: the fastest of the native backend's, as `native_cuda.kernels` names them; None where
            all were slower than addmm, or where none was measured by its name.
    """

    backend: str
    kernel: str | None


def preferred(op: str, x: Tensor, dtype: torch.dtype, N: int, R: int) -> str | None:
    """The backend that was kept for an op on x's device, or None.

    Args:
        op: of a 4-bit base, the only ones that two backends have kernels for.
        x: [M, K].
        dtype: of the base product.
        N, R: out_features and rank.
    """
    kept = _kept(op, x, dtype, N, R)
    return None if kept is None else kept.backend


def native_kernel(op: str, x: Tensor, dtype: torch.dtype, N: int, R: int) -> str | None:
    """The native backend's kernel that was kept for an op on x's device, or None.

    Args: as in `preferred`.
    """
    kept = _kept(op, x, dtype, N, R)
    return None if kept is None else kept.kernel


def _kept(op: str, x: Tensor, dtype: torch.dtype, N: int, R: int) -> Kept | None:
    if x.device.type != "cuda":
        return None
    index = torch.cuda.current_device() if x.device.index is None else x.device.index
    M, K = x.shape
    if not torch.compiler.is_compiling():
        return _lookup(op, index, dtype, (M, N, K, R))
    for tokens, kept in _by_tokens(op, index, dtype, (N, K, R)):
        if tokens // 2 < M <= tokens:
            return kept
    return None


def _lookup(op: str, index: int, dtype: torch.dtype, sizes: tuple[int, ...]) -> Kept | None:
    from .. import triton

    # Without Triton nothing was measured.
    if triton.unavailable_reason() is not None:
        return None
    from ..triton.launch import cuda_launcher, shape_key

    M, N, K, R = sizes
    choice = tuning.lookup(cuda_launcher(index).key, key(op), shape_key(dtype, (M, N, K, R)))
    if choice is None:
        return None
    return Kept(str(choice["backend"]), str(choice["kernel"]) if "kernel" in choice else None)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _by_tokens(
    op: str, index: int, dtype: torch.dtype, sizes: tuple[int, ...]
) -> tuple[tuple[int, Kept], ...]:
    """What was kept by class of M: a compiled graph compares its M, which may be a symbol."""
    found, tokens = [], 1
    while tokens <= _MOST_TOKENS:
        if kept := _lookup(op, index, dtype, (tokens, *sizes)):
            found.append((tokens, kept))
        tokens *= 2
    return tuple(found)
