"""The differentiable layers of a stack of experts: `grouped_lora_linear`. No math stands here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..backends import forced_backend
from ..quant import QuantState, as_quant_state
from .linear import autocast_off, check_frozen, differentiable_gradients, draw_seed


class GroupedLoraLinearFunction(torch.autograd.Function):
    """`y[m] = x[m] W[e]^T + scaling * drop(x)[m] A[e]^T B[e]^T`, `e` the expert of row m, with
    gradients for x, lora_A and lora_B, each only where asked for.

    Saves x, S and the adapters. The formulas are those of `reference.grouped_lora_linear_fwd` and
    `reference.grouped_lora_linear_bwd`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        offsets: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        seed: Tensor | None,
        state: QuantState | None,
        scaling: float,
        dropout_p: float,
        compute_dtype: torch.dtype | None,
        backend: str | None,
    ) -> Tensor:
        options = (scaling, dropout_p, seed, compute_dtype, backend)
        y, S = _fwd(x, weight, state, offsets, lora_A, lora_B, *options)
        ctx.save_for_backward(x, weight, offsets, lora_A, lora_B, S, seed, *_tensors(state))
        ctx.state = None if state is None else state.without_tensors()
        ctx.options = (scaling, dropout_p, compute_dtype, backend)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, offsets, lora_A, lora_B, S, seed, *stats = ctx.saved_tensors
        scaling, dropout_p, compute_dtype, backend = ctx.options
        state = None if ctx.state is None else ctx.state.with_tensors(*stats)
        need_x, _, _, need_A, need_B = ctx.needs_input_grad[:5]
        needs = (need_x, need_A, need_B)
        layer = (weight, state, offsets)
        options = (scaling, dropout_p, seed, compute_dtype)
        with autocast_off(dy.device):
            if torch.is_grad_enabled():
                inputs = (x, lora_A, lora_B)
                dx, dA, dB = differentiable_gradients(
                    lambda x, A, B: _fwd(x, *layer, A, B, *options, "reference")[:1],
                    inputs,
                    needs,
                    (dy,),
                )
            else:
                dx, dA, dB = _bwd(dy, x, *layer, lora_A, lora_B, S, *options, needs, backend)
        return dx, None, None, dA, dB, *(None,) * 6


class TransposedLoraLinearFunction(torch.autograd.Function):
    """`y[m] = x[m] V[e] + scaling * x[m] A[e]^T B[e]^T`: the experts are stored as `V [E, K, N]`.

    The layer with V as its weight, B^T as its lora_A and A^T as its lora_B has this y as its dx. So
    the ops change places: the forward is that layer's backward for `dy = x`, and the backward is
    its forward on dy, then its dA and dB, which are the transposes of our dB and dA. Saves x alone.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        offsets: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        state: QuantState | None,
        scaling: float,
        compute_dtype: torch.dtype | None,
        backend: str | None,
    ) -> Tensor:
        y = _transposed_fwd(
            x, weight, state, offsets, lora_A, lora_B, scaling, compute_dtype, backend
        )
        ctx.save_for_backward(x, weight, offsets, lora_A, lora_B, *_tensors(state))
        ctx.state = None if state is None else state.without_tensors()
        ctx.options = (scaling, compute_dtype, backend)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, offsets, lora_A, lora_B, *stats = ctx.saved_tensors
        scaling, compute_dtype, backend = ctx.options
        state = None if ctx.state is None else ctx.state.with_tensors(*stats)
        need_x, _, _, need_A, need_B = ctx.needs_input_grad[:5]
        with autocast_off(dy.device):
            if torch.is_grad_enabled():
                layer, last = (weight, state, offsets), (scaling, compute_dtype, "reference")
                dx, *grads = differentiable_gradients(
                    lambda x, A, B: (_transposed_fwd(x, *layer, A, B, *last),),
                    (x, lora_A, lora_B),
                    (need_x, need_A, need_B),
                    (dy,),
                )
                return dx, None, None, *grads, *(None,) * 4
            A, B = lora_B.mT.contiguous(), lora_A.mT.contiguous()
            options = (scaling, 0.0, None, compute_dtype)
            dx, S = _fwd(dy, weight, state, offsets, A, B, *options, backend)
            needs = (False, need_B, need_A)
            dA = dB = None
            if any(needs):
                _, dA, dB = _bwd(x, dy, weight, state, offsets, A, B, S, *options, needs, backend)
        turned = (None if dB is None else dB.mT, None if dA is None else dA.mT)
        return dx if need_x else None, None, None, *turned, *(None,) * 4


def grouped_lora_linear(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    quant_state: Any = None,
    compute_dtype: torch.dtype | None = None,
    transposed: bool = False,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`y[m] = x[m] W[e]^T + scaling * drop(x)[m] A[e]^T B[e]^T`, `e` the expert of row m.

    `offsets[e - 1] <= m < offsets[e]`. Differentiable in x, lora_A and lora_B.

    Args:
        x: [M, K], fp32, bf16 or fp16, rows sorted by expert.
        weight: [E, N, K] in x's dtype, [E, K, N] when transposed, or the stack's packed 4-bit bytes
            when quant_state is given. Frozen.
        offsets: [E], int32 or int64: where the rows of each expert end, as torch's grouped_mm takes
            them. Rows from offsets[-1] on give zeros.
        lora_A: [E, R, K], fp32 or x's dtype. fp32 adapters get fp32 gradients.
        lora_B: [E, N, R], lora_A's dtype.
        scaling: factor of the LoRA term.
        quant_state: fastlora's or bitsandbytes' QuantState of a 4-bit stack.
        compute_dtype: of a 4-bit base product; x's dtype when None.
        transposed: the experts are stored as [E, K, N], for `x W[e]` without a transpose.
        dropout_p: probability of dropping an element of x on the LoRA path.
        training: False switches dropout off.
        seed: int64, one element, the dropout's key; drawn with torch.randint when None.
        backend: "native", "triton" or "reference"; the device's best when None.

    Under autocast x, the adapters and a dense weight are cast to autocast's dtype.

    Returns:
        y [M, N] in x's dtype (autocast's dtype under autocast).

    Raises:
        ValueError, TypeError: a shape, dtype or the offsets do not fit; weight requires a gradient;
            dropout on transposed experts, for which no kernel has a mask.
        RuntimeError: the backend asked for can't run here; the message says why.
    """
    check_frozen(weight)
    state = None if quant_state is None else as_quant_state(quant_state)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, lora_A, lora_B = x.to(dtype), lora_A.to(dtype), lora_B.to(dtype)
        if state is None:
            compute_dtype = dtype
    if not training:
        dropout_p = 0.0
    if transposed and dropout_p > 0.0:
        raise ValueError(f"dropout_p must be 0 for transposed experts, got {dropout_p}")
    seed = draw_seed(x, dropout_p, seed)
    # The backend is settled now: the backward may run outside of a `use_backend` block.
    backend = forced_backend(backend)
    tensors = (x, weight, offsets, lora_A, lora_B)
    with autocast_off(x.device):
        if transposed:
            return TransposedLoraLinearFunction.apply(
                *tensors, state, scaling, compute_dtype, backend
            )
        options = (seed, state, scaling, dropout_p, compute_dtype, backend)
        return GroupedLoraLinearFunction.apply(*tensors, *options)


def _tensors(state: QuantState | None) -> tuple[Tensor | None, ...]:
    return () if state is None else state.tensors()


def _fwd(
    x: Tensor,
    weight: Tensor,
    state: QuantState | None,
    offsets: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    compute_dtype: torch.dtype | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """The forward op of the stack's kind: y and S."""
    lora = (offsets, lora_A, lora_B, scaling, dropout_p, seed)
    if state is None:
        weight = weight.to(compute_dtype or weight.dtype)
        return ops.grouped_lora_linear_fwd(x, weight, *lora, backend=backend)
    return ops.grouped_qlora_linear_fwd(x, weight, state, *lora, compute_dtype, backend=backend)


def _transposed_fwd(
    x: Tensor,
    weight: Tensor,
    state: QuantState | None,
    offsets: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    compute_dtype: torch.dtype | None,
    backend: str | None,
) -> Tensor:
    """y of a stack that is stored transposed, by the backward op."""
    A, B = lora_B.mT.contiguous(), lora_A.mT.contiguous()
    options = (scaling, 0.0, None, compute_dtype, (True, False, False), backend)
    y, *_ = _bwd(x, None, weight, state, offsets, A, B, None, *options)
    assert y is not None
    return y


def _bwd(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    state: QuantState | None,
    offsets: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    S: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    compute_dtype: torch.dtype | None,
    needs: tuple[bool, bool, bool],
    backend: str | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The backward op of the stack's kind: dx, dA and dB."""
    lora = (offsets, lora_A, lora_B, S, scaling, dropout_p, seed)
    if state is None:
        weight = weight.to(compute_dtype or weight.dtype)
        return ops.grouped_lora_linear_bwd(dy, x, weight, *lora, needs, backend=backend)
    return ops.grouped_qlora_linear_bwd(
        dy, x, weight, state, *lora, compute_dtype, needs, backend=backend
    )
