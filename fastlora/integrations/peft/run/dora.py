"""DoRA: a call of a layer, and the norms of its rows, `|W + scaling * B A|`.

Source: DoRA, arXiv:2402.09353; its section 4.3 says why the norms get no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .... import ops
from ....autograd.dora import dora_linear
from ....autograd.linear import linear
from ....layer import Layer
from ....quant import QuantState
from ..plan.call import Adapter, Plan
from .launch import base_alone, base_bias, one_layer
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
    layer = one_layer(plan, None, adapter)
    norms = weight_norms(layer, parts.raw_state)
    assert adapter.magnitude is not None
    factor = adapter.magnitude.float() / norms
    layer = layer._replace(bias=base_bias(plan))
    if not adapter.drops or x.device.type in _DORA_MASKS:
        return dora_linear(x, layer, factor)
    kept, scale = adapter.dropout(torch.ones_like(x)) != 0, 1.0 / (1.0 - layer.dropout_p)
    rest = linear(torch.where(kept, x * (1.0 - scale), x), base_alone(plan, x))
    compute = layer.compute_dtype or x.dtype
    layer = layer._replace(bias=rest, dropout_p=0.0, compute_dtype=compute)
    # In the adapter's dtype, so that the product is not rounded, and its operands still in x's.
    y = dora_linear(cast(torch.where(kept, x, 0.0), layer.lora_A.dtype), layer, scale * factor)
    return cast(y, x.dtype)


@torch.no_grad()
def weight_norms(layer: Layer, owner: Any) -> Tensor:
    """`|W_n + scaling * (B A)_n|` for each row n. Kernels need no [N, K] temporary.

    Args:
        layer: its weight, dense or in 4 bits, its adapter and its scaling.
        owner: bitsandbytes' quant state of a 4-bit weight.

    Returns:
        fp32 [N], without a gradient.
    """
    if layer.quant_state is None or layer.weight.device.type == "cpu":
        return ops.dora_norm(layer)
    return expanded_norms(layer, owner)


def expanded_norms(layer: Layer, owner: Any) -> Tensor:
    """`weight_norms` of a packed weight, for devices without a kernel for them, from

        |W_n|^2 + 2 scaling <(W A^T)_n, B_n> + scaling^2 <B_n A A^T, B_n>

    W is decoded on the way into the product with A. `owner` keeps |W|^2 for later calls.
    """
    state, scaling = layer.quant_state, layer.scaling
    assert state is not None
    A, B = layer.lora_A.float(), layer.lora_B.float()
    squares = _squares_4bit(layer.weight, owner, state)
    cross = (_packed_times_A(layer.weight, state, A) * B).sum(1)
    lora = ((B @ (A @ A.T)) * B).sum(1)
    return (squares + 2 * scaling * cross + scaling**2 * lora).clamp(min=0).sqrt()


def _packed_times_A(weight: Tensor, state: QuantState, A: Tensor) -> Tensor:
    """`W A^T` [N, R] in fp32: the base product of a layer whose input is A.

    It takes A in W's dtype. Two such parts add up to A in all but its last bits.
    """
    high = A.to(state.dtype).float()
    x = A if state.dtype == torch.float32 else torch.cat([high, A - high])
    zeros = A.new_zeros(1, A.shape[1]), A.new_zeros(state.shape[0], 1)
    base = Layer(weight, *zeros, 0.0, quant_state=state, compute_dtype=state.dtype)
    y, _ = ops.lora_linear_fwd(x, base)
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
