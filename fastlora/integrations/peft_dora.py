"""DoRA without W + scaling * B A: the norms of its rows by their expansion, and the magnitude.

Source: DoRA, arXiv:2402.09353; its section 4.3 says why the norms get no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..quant import QuantState

# Where a quant state of bitsandbytes keeps |W|^2 of the weight that it belongs to.
_SQUARES = "_fastlora_squared_norms"
# Elements of a matrix that are widened to fp32 at a time: they stay in a cache, and are never many.
_BLOCK = 2**19


@torch.no_grad()
def weight_norms(
    weight: Tensor,
    owner: Any,
    state: QuantState | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
) -> Tensor:
    """`|W_n + scaling * (B A)_n|` for each row n, from

        |W_n|^2 + 2 scaling <(W A^T)_n, B_n> + scaling^2 <B_n A A^T, B_n>

    so that nothing of W's size is made: W is read in its own dtype, or decoded on the way.

    Args:
        weight: [N, K], or the packed bytes when state is given.
        owner: bitsandbytes' quant state, which keeps |W|^2 for later calls. A dense weight is
            summed anew each time: PEFT's merge writes to it without a trace.
        state: the same as fastlora's, or None.
        lora_A, lora_B: [R, K] and [N, R], fp32 or x's dtype.
        scaling: factor of the LoRA term.

    Returns:
        fp32 [N], without a gradient.
    """
    A, B = lora_A.float(), lora_B.float()
    if state is None:
        squares, WA = _dense(weight, A)
    else:
        squares = _squares_4bit(weight, owner, state)
        WA = _packed_times_A(weight, state, A)
    cross = (WA * B).sum(1)
    lora = ((B @ (A @ A.T)) * B).sum(1)
    return (squares + 2 * scaling * cross + scaling**2 * lora).clamp(min=0).sqrt()


def _dense(weight: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """`|W|^2` [N] and `W A^T` [N, R] in fp32, in one pass over W."""
    norms, WA = A.new_empty(weight.shape[0]), A.new_empty(weight.shape[0], A.shape[0])
    rows = _rows(weight)
    for block, norm, product in zip(*(t.split(rows) for t in (weight, norms, WA)), strict=True):
        wide = block.float()
        torch.linalg.vector_norm(wide, dim=1, out=norm)
        torch.mm(wide, A.T, out=product)
    return norms.square(), WA


def _rows(matrix: Tensor) -> int:
    return max(1, _BLOCK // max(1, matrix.shape[1]))


def _packed_times_A(weight: Tensor, state: QuantState, A: Tensor) -> Tensor:
    """`W A^T` [N, R] in fp32: the base product of a layer whose input is A.

    It takes A in W's dtype. Two such parts add up to A in all but its last bits.
    """
    high = A.to(state.dtype).float()
    x = A if state.dtype == torch.float32 else torch.cat([high, A - high])
    zeros = A.new_zeros(1, A.shape[1]), A.new_zeros(state.shape[0], 1)
    y, _ = ops.qlora_linear_fwd(x, weight, state, None, *zeros, 0.0, compute_dtype=state.dtype)
    return y.view(-1, *A.shape[:1], state.shape[0]).sum(0).T


def _squares_4bit(weight: Tensor, owner: Any, state: QuantState) -> Tensor:
    key = (weight.data_ptr(), weight._version)
    kept = owner.__dict__.get(_SQUARES)
    if kept is not None and kept[0] == key and kept[1].device == weight.device:
        return kept[1]
    dense = ops.dequantize_4bit(weight, state, state.dtype)
    squares = torch.linalg.vector_norm(dense, dim=1, dtype=torch.float32).square()
    owner.__dict__[_SQUARES] = (key, squares)
    return squares


class MagnitudeFunction(torch.autograd.Function):
    """`y = factor * z + rest`, with gradients

        dz = factor * dy,   dfactor = sum over m of dy * z,   drest = dy, or its sum over m.

    Saves z, which nothing else keeps. Products and sums are taken in fp32.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, factor: Tensor, rest: Tensor | None) -> Tensor:
        ctx.save_for_backward(z, factor)
        ctx.rest = None if rest is None else (rest.dim(), rest.dtype)
        y, rows = torch.empty_like(z), _rows(z)
        rests = None if rest is None or rest.dim() == 1 else rest.split(rows)
        for i, (z_rows, out) in enumerate(zip(z.split(rows), y.split(rows), strict=True)):
            wide = z_rows * factor
            if rest is not None:
                wide += rest if rests is None else rests[i]
            out.copy_(wide)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        z, factor = ctx.saved_tensors
        need_z, need_factor, need_rest = ctx.needs_input_grad
        dz = dfactor = drest = None
        if torch.is_grad_enabled():  # create_graph: without writing in place
            wide = dy.to(factor.dtype)
            dz, dfactor = (wide * factor).to(z.dtype), (wide * z).sum(0)
        elif need_z or need_factor:
            dz, dfactor = torch.empty_like(z), torch.zeros_like(factor)
            rows = _rows(z)
            for dy_rows, z_rows, out in zip(*(t.split(rows) for t in (dy, z, dz)), strict=True):
                wide = dy_rows.to(factor.dtype)
                if need_factor:
                    dfactor += (wide * z_rows).sum(0)
                if need_z:
                    out.copy_(wide * factor)
        if need_rest:
            dim, dtype = ctx.rest
            drest = (dy if dim == dy.dim() else dy.sum(0, dtype=factor.dtype)).to(dtype)
        return dz if need_z else None, dfactor if need_factor else None, drest


def apply_magnitude(z: Tensor, factor: Tensor, rest: Tensor | None) -> Tensor:
    """`y = factor * z + rest`, differentiable in all three.

    Args:
        z: [..., N], fp32, bf16 or fp16.
        factor: [N], fp32 (fp64 for checks).
        rest: [N], z's shape, or None.

    Returns:
        y [..., N] in z's dtype, rounded once.
    """
    if rest is not None and rest.dim() > 1:
        rest = rest.reshape(-1, rest.shape[-1])
    y: Tensor = MagnitudeFunction.apply(z.reshape(-1, z.shape[-1]), factor, rest)
    return y.view(z.shape)
