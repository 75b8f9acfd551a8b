"""The backend and kernel that `fastlora tune` found fastest for an op on a GPU."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import tuning
from ...layer import Layer
from .gpu import Sizes, device_key, shape_key, triton_version

# A compiled graph has choices for up to this many tokens.
_MOST_TOKENS = 2**24


def op_key(op: str, four_bit: bool) -> str:
    """How the cache names an op: with a 4-bit base it is `qlora_linear_fwd` or `_bwd`."""
    return f"q{op}" if four_bit else op


def backend_key(op: str) -> str:
    """How the cache names the choice of a backend; the choice of a tile has the op's name."""
    return f"{op}, backend"


class Kept(NamedTuple):
    """The stored choice for an op and a class of sizes.

    Args:
        backend: the fastest one.
        kernel: the native backend's fastest, as `native.cuda.kernels` names them; None if all were
            slower than addmm, or if none was measured by its name.
    """

    backend: str
    kernel: str | None


def kept(op: str, x: Tensor, layer: Layer) -> Kept | None:
    """The stored choice for an op on x's device, or None.

    Args:
        op: `lora_linear_fwd` or `_bwd`; only for a 4-bit base do two backends have kernels.
        x: [M, K].
        layer: of a 4-bit weight.
    """
    if x.device.type != "cuda" or layer.quant_state is None:
        return None
    index = torch.cuda.current_device() if x.device.index is None else x.device.index
    (M, K), (N, R) = x.shape, layer.lora_B.shape
    dtype, key = layer.compute_dtype or x.dtype, op_key(op, four_bit=True)
    if not torch.compiler.is_compiling():
        return _lookup(key, index, dtype, (M, N, K, R))
    for tokens, found in _by_tokens(key, index, dtype, (N, K, R)):
        if tokens // 2 < M <= tokens:
            return found
    return None


def _lookup(op: str, index: int, dtype: torch.dtype, sizes: Sizes) -> Kept | None:
    # Without Triton nothing was measured.
    if triton_version() is None:
        return None
    choice = tuning.lookup(device_key(index), backend_key(op), shape_key(dtype, sizes))
    if choice is None:
        return None
    return Kept(str(choice["backend"]), str(choice["kernel"]) if "kernel" in choice else None)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _by_tokens(
    op: str, index: int, dtype: torch.dtype, sizes: tuple[int, int, int]
) -> tuple[tuple[int, Kept], ...]:
    """Stored choices by class of M: a compiled graph compares its M, which may be a symbol."""
    found, tokens = [], 1
    while tokens <= _MOST_TOKENS:
        if choice := _lookup(op, index, dtype, (tokens, *sizes)):
            found.append((tokens, choice))
        tokens *= 2
    return tuple(found)
