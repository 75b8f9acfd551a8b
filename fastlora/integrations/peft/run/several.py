"""Several adapters of one layer: those that share a launch, and those that are added to y."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from ....layer import Layer
from ..plan.call import Adapter, Plan
from .launch import base_bias, one_layer
from .tensors import cast


def joined(plan: Plan, adapters: Sequence[Adapter]) -> Layer:
    """The base product, the bias and adapters with one mask, as one layer.

    Biases of lora_B join the base's in fp32: `bias + sum of scaling * bias_B`.
    """
    bias = base_bias(plan)
    for adapter in adapters:
        if adapter.bias is not None:
            own = adapter.scaling * adapter.bias.float()
            bias = own if bias is None else bias.float() + own
    one = adapters[0] if len(adapters) == 1 else _stacked(plan, adapters)
    return one_layer(plan, bias, one)


def _stacked(plan: Plan, adapters: Sequence[Adapter]) -> Adapter:
    """`sum of s_i B_i A_i = [s_1 B_1, s_2 B_2, ...] [A_1; A_2; ...]`: one adapter for all.

    Where the scalings differ they go into B, in fp32, because PEFT's code does not round there.
    """
    first = adapters[0]
    As = [cast(a.lora_A, plan.casts.adapter) for a in adapters]
    Bs = [cast(a.lora_B, plan.casts.adapter) for a in adapters]
    scaling = first.scaling
    if any(a.scaling != scaling for a in adapters):
        As = [A.float() for A in As]
        Bs = [B.float() * a.scaling for a, B in zip(adapters, Bs, strict=True)]
        scaling = 1.0
    return first._replace(lora_A=torch.cat(As), lora_B=torch.cat(Bs, dim=1), scaling=scaling)


def term(plan: Plan, x: Tensor, adapter: Adapter) -> Tensor:
    """`scaling * (drop(x) A^T B^T + bias_B)` in plain torch, as in PEFT's code."""
    dtype = plan.casts.adapter
    bias = None if adapter.bias is None else cast(adapter.bias, dtype)
    dropped = adapter.dropout(cast(x, dtype))
    S = linear(dropped, cast(adapter.lora_A, dtype))
    return linear(S, cast(adapter.lora_B, dtype), bias) * adapter.scaling
