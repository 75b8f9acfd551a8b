"""The differentiable layer: `lora_linear` and its autograd Function. No math stands here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..backends import forced_backend
from ..quant import QuantState, as_quant_state
from ..reference.precision import sum_dtype


class LoraLinearFunction(torch.autograd.Function):
    """`y = x W^T + bias + scaling * drop(x) A^T B^T`, W dense or 4-bit, with gradients for x, bias,
    lora_A and lora_B, each only where asked for.

    Saves x, S = drop(x) A^T [M, R], the adapters and the dropout seed: no mask, no copy of x.
    The formulas are those of `reference.lora_linear_fwd` and `reference.lora_linear_bwd`. A
    backward that is differentiated itself (`create_graph=True`) runs in plain torch.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        seed: Tensor | None,
        scaling: float,
        dropout_p: float,
        quant_state: QuantState | None,
        compute_dtype: torch.dtype | None,
        backend: str | None,
    ) -> Tensor:
        options = (scaling, dropout_p, quant_state, compute_dtype, backend)
        y, S = linear_fwd(x, weight, bias, lora_A, lora_B, seed, *options)
        stats = () if quant_state is None else quant_state.tensors()
        ctx.save_for_backward(x, weight, lora_A, lora_B, S, seed, *stats)
        ctx.state = None if quant_state is None else quant_state.without_tensors()
        ctx.options = (scaling, dropout_p, compute_dtype, backend)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_A, lora_B, S, seed, *stats = ctx.saved_tensors
        scaling, dropout_p, compute_dtype, backend = ctx.options
        need_x, _, need_bias, need_A, need_B = ctx.needs_input_grad[:5]
        needs = (need_x, need_A, need_B, need_bias)
        state = None if ctx.state is None else ctx.state.with_tensors(*stats)
        dbias: Tensor | None
        with autocast_off(dy.device):
            if torch.is_grad_enabled():
                options = (scaling, dropout_p, state, compute_dtype, "reference")
                dx, dA, dB = differentiable_gradients(
                    lambda x, A, B: linear_fwd(x, weight, None, A, B, seed, *options)[:1],
                    (x, lora_A, lora_B),
                    needs[:3],
                    (dy,),
                )
                dbias = dy.sum(0, dtype=sum_dtype(dy)) if need_bias else None
            else:
                options = (scaling, dropout_p, state, compute_dtype, backend)
                dx, dA, dB, dbias = linear_bwd(
                    dy, x, weight, lora_A, lora_B, S, seed, *options, needs
                )
        dbias = None if dbias is None else dbias.to(ctx.bias_dtype)
        return dx, None, dbias, dA, dB, None, None, None, None, None, None


def differentiable_gradients(
    run: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor],
    needs: Sequence[bool],
    dys: Sequence[Tensor],
) -> list[Tensor | None]:
    """Gradients that have a graph, for a backward that is differentiated in its turn.

    Args:
        run: the forward in plain torch, on the reference backend, as a function of `inputs`.
        inputs: what to differentiate by, each where `needs` says so; the others give None.
        dys: the gradient of each result of `run`.
    """
    # Views: the graph above the inputs, where one may depend on another, and hooks on them are the
    # business of the backward that has called this one.
    aliases = [t.view_as(t) for t in inputs]
    wanted = [t for t, need in zip(aliases, needs, strict=True) if need]
    if not wanted:
        return [None] * len(inputs)
    ys = run(*aliases)
    found = iter(torch.autograd.grad(ys, wanted, dys, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needs]


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    quant_state: Any = None,
    compute_dtype: torch.dtype | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`y = x W^T + bias + scaling * drop(x) A^T B^T`, differentiable in x, bias, lora_A, lora_B.

    Args:
        x: [..., K], fp32, bf16 or fp16.
        weight: [N, K] in x's dtype, or packed 4-bit bytes when quant_state is given. Frozen.
            The transpose of a contiguous [K, N] is read as it lies.
        bias: [N] or None.
        lora_A: [R, K], fp32 or x's dtype. fp32 adapters get fp32 gradients.
        lora_B: [N, R], lora_A's dtype.
        scaling: factor of the LoRA term, lora_alpha / r in PEFT (rsLoRA: lora_alpha / sqrt(r)).
        quant_state: fastlora's or bitsandbytes' QuantState of a 4-bit weight.
        compute_dtype: of a 4-bit base product, as bitsandbytes' Linear4bit; x's dtype when None.
            A dense weight is cast to it, in the forward and again in the backward, which keeps none
            of the copies.
        dropout_p: probability of dropping an element of x on the LoRA path.
        training: False switches dropout off.
        seed: int64, one element, the dropout's key. Drawn with torch.randint when None, so that
            torch.manual_seed and activation checkpointing replay the same mask.
        backend: "native", "triton" or "reference"; the device's best when None.

    Under autocast x, the adapters, the bias and a dense weight are cast to autocast's dtype, as
    torch.nn.functional.linear does.

    Returns:
        y [..., N] in x's dtype (autocast's dtype under autocast).

    Raises:
        ValueError, TypeError: a shape or dtype does not fit; weight requires a gradient.
        RuntimeError: the backend asked for can't run here; the message says why.
    """
    check_frozen(weight)
    state = None if quant_state is None else as_quant_state(quant_state)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, lora_A, lora_B = x.to(dtype), lora_A.to(dtype), lora_B.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        if state is None:
            compute_dtype = dtype
    if not training:
        dropout_p = 0.0
    seed = draw_seed(x, dropout_p, seed)
    # The backend is settled now: the backward may run outside of a `use_backend` block.
    backend = forced_backend(backend)
    tensors = (x.reshape(x.shape[:-1].numel(), x.shape[-1]), weight, bias, lora_A, lora_B, seed)
    options = (scaling, dropout_p, state, compute_dtype, backend)
    with autocast_off(x.device):
        y = _apply(*tensors, *options)
    return y.view(*x.shape[:-1], y.shape[-1])


def check_frozen(weight: Tensor) -> None:
    """Raises a ValueError for a base weight that wants a gradient."""
    if weight.requires_grad:
        raise ValueError("weight must be frozen (requires_grad=False): fastlora never trains it")


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether a backward will be asked for a gradient of any of `tensors`."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def autocast_off(device: torch.device) -> AbstractContextManager[Any]:
    """Leaves the autocast region around a call or a backward, if there is one."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def draw_seed(x: Tensor, dropout_p: float, seed: Tensor | None = None) -> Tensor | None:
    """The key of a dropout on x: `seed`, or one that torch draws; None without dropout."""
    if dropout_p == 0.0:
        return None
    if seed is not None:
        return seed
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=x.device)


def _apply(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    seed: Tensor | None,
    *options: Any,
) -> Tensor:
    """LoraLinearFunction where a gradient is needed, its forward alone where none is."""
    if wants_gradient(x, bias, lora_A, lora_B):
        return LoraLinearFunction.apply(x, weight, bias, lora_A, lora_B, seed, *options)
    return linear_fwd(x, weight, bias, lora_A, lora_B, seed, *options)[0]


def linear_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    state: QuantState | None,
    compute_dtype: torch.dtype | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """The forward op of the base's kind: y and S."""
    lora = (bias, lora_A, lora_B, scaling, dropout_p, seed)
    if state is None:
        weight = weight.to(compute_dtype or weight.dtype)
        return ops.lora_linear_fwd(x, weight, *lora, backend=backend)
    return ops.qlora_linear_fwd(x, weight, state, *lora, compute_dtype, backend=backend)


def linear_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    S: Tensor,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    state: QuantState | None,
    compute_dtype: torch.dtype | None,
    backend: str | None,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The backward op of the base's kind: dx, dA, dB and dbias, each where `needs` says so."""
    lora = (lora_A, lora_B, S, scaling, dropout_p, seed)
    if state is None:
        weight = weight.to(compute_dtype or weight.dtype)
        return ops.lora_linear_bwd(dy, x, weight, *lora, needs, backend=backend)
    return ops.qlora_linear_bwd(dy, x, weight, state, *lora, compute_dtype, needs, backend=backend)
