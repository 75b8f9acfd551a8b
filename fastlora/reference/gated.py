"""The gate of an MLP."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .precision import sum_dtype

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
# Elements that are widened to fp32 at a time: they stay in a cache, and are never many.
_BLOCK = 2**18


def activate(x: Tensor, activation: str) -> Tensor:
    """`x sigmoid(x)` for "silu"; `x Phi(x)` for "gelu", with Phi by tanh for "gelu_tanh"."""
    if activation == "silu":
        return torch.nn.functional.silu(x)
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return torch.nn.functional.gelu(x, approximate=approximate)


def gated_fwd(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """`h = act(gate) * up`, computed in fp32 and rounded once.

    Args:
        gate, up: [M, I], fp32, bf16 or fp16 (fp64 for checks).
        activation: one of `ACTIVATIONS`.

    Returns:
        h [M, I] in gate's dtype.

    Source: GLU variants, arXiv:2002.05202.
    """
    acc, h = sum_dtype(gate), torch.empty_like(gate)
    for g, u, out in _blocks(gate, up, h):
        out.copy_(activate(g.to(acc), activation) * u)
    return h


def gated_bwd(dh: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Gradients of `gated_fwd`: `dgate = dh * up * act'(gate)`, `dup = dh * act(gate)`.

    Args:
        dh: [M, I] in gate's dtype.
        gate, up, activation: as given to the forward.

    Returns:
        dgate and dup, [M, I] in gate's dtype.
    """
    acc, dgate, dup = sum_dtype(gate), torch.empty_like(gate), torch.empty_like(up)
    for d, g, u, dg, du in _blocks(dh, gate, up, dgate, dup):
        wide, d_wide = g.to(acc), d.to(acc)
        du.copy_(d_wide * activate(wide, activation))
        da = d_wide * u
        if activation == "silu":
            dg.copy_(torch.ops.aten.silu_backward(da, wide))
        else:
            approximate = "tanh" if activation == "gelu_tanh" else "none"
            dg.copy_(torch.ops.aten.gelu_backward(da, wide, approximate=approximate))
    return dgate, dup


def _blocks(*matrices: Tensor) -> Iterator[tuple[Tensor, ...]]:
    rows = max(1, _BLOCK // max(1, matrices[0].shape[1]))
    return zip(*(matrix.split(rows) for matrix in matrices), strict=True)
