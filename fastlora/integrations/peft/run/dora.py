"""DoRA: a call of a layer, and the norms of its rows, `|W + scaling * B A|`.

Source: DoRA, arXiv:2402.09353; its section 4.3 says why the norms get no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .... import ops
from ....autograd.dora import dora_linear
from ....quant import QuantState
from ..plan.call import Adapter, Plan
from .launch import base_alone, base_bias, launch, one_layer
from .tensors import cast

# Devices whose kernels compute the masks of DoRA's dropout. On others the reference would, in many
# operations: torch's own dropout is faster there.
_DORA_MASKS = ("cpu",)

# Where a quant state of bitsandbytes keeps |W|^2 of the weight that it belongs to.
_SQUARES = "_fastlora_squared_norms"


def dora(plan: Plan, x: Tensor, adapter: Adapter) -> Tensor:
    """`y = x W^T + bias + (f - 1) * x' W^T + f * scaling * x' A^T B^T`, as PEFT has it, where

        x' = drop(x),   f = magnitude / norm of the rows of W + scaling * B A

    Without dropout that is one product, `f * (x W^T + scaling * x A^T B^T) + bias`; with it two,
    as in `dora_linear`; with torch's own masks its two inputs are kept for the backward.
    """
    parts = plan.parts
    A, B = cast(adapter.lora_A, plan.casts.adapter), cast(adapter.lora_B, plan.casts.adapter)
    norms = weight_norms(parts.weight, parts.raw_state, parts.quant_state, A, B, adapter.scaling)
    assert adapter.magnitude is not None
    factor = adapter.magnitude.float() / norms
    bias = base_bias(plan)
    layer = one_layer(plan, None, adapter)
    dropout_p = layer.dropout_p
    if adapter.drops and x.device.type not in _DORA_MASKS:
        kept, scale = adapter.dropout(torch.ones_like(x)) != 0, 1.0 / (1.0 - dropout_p)
        bias = launch(torch.where(kept, x * (1.0 - scale), x), base_alone(plan, x))
        x, factor, dropout_p = torch.where(kept, x, 0.0), scale * factor, 0.0
    return dora_linear(
        x,
        layer.weight,
        bias,
        layer.lora_A,
        layer.lora_B,
        layer.scaling,
        factor,
        dropout_p=dropout_p,
        quant_state=parts.quant_state,
        compute_dtype=layer.compute_dtype,
    )


@torch.no_grad()
def weight_norms(
    weight: Tensor,
    owner: Any,
    state: QuantState | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
) -> Tensor:
    """`|W_n + scaling * (B A)_n|` for each row n. Kernels need no [N, K] temporary.

    Args:
        weight: [N, K], or the packed bytes when state is given.
        owner: bitsandbytes' quant state.
        state: the same as fastlora's, or None.
        lora_A, lora_B: [R, K] and [N, R], fp32 or x's dtype.
        scaling: factor of the LoRA term.

    Returns:
        fp32 [N], without a gradient.
    """
    if state is None:
        return ops.dora_norm(weight, lora_A, lora_B, scaling)
    if weight.device.type == "cpu":
        return ops.qdora_norm(weight, state, lora_A, lora_B, scaling)
    return expanded_norms(weight, owner, state, lora_A, lora_B, scaling)


def expanded_norms(
    weight: Tensor,
    owner: Any,
    state: QuantState,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
) -> Tensor:
    """`weight_norms` of a packed weight, for devices without a kernel for them, from

        |W_n|^2 + 2 scaling <(W A^T)_n, B_n> + scaling^2 <B_n A A^T, B_n>

    W is decoded on the way into the product with A. `owner` keeps |W|^2 for later calls.
    """
    A, B = lora_A.float(), lora_B.float()
    squares = _squares_4bit(weight, owner, state)
    cross = (_packed_times_A(weight, state, A) * B).sum(1)
    lora = ((B @ (A @ A.T)) * B).sum(1)
    return (squares + 2 * scaling * cross + scaling**2 * lora).clamp(min=0).sqrt()


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
