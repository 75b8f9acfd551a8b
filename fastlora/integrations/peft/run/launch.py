"""A base product, a bias and one adapter as one layer, in the dtypes of a plan."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ....layer import Layer
from ..plan.call import Adapter, Plan
from .tensors import cast

# The name by which PEFT's `adapter_names` asks for no adapter.
NO_ADAPTER = "__base__"
_NO_DROPOUT = nn.Identity()


def one_layer(plan: Plan, bias: Tensor | None, adapter: Adapter) -> Layer:
    """The base weight of a plan, `bias` and `adapter` as one layer."""
    parts, (_, adapter_dtype, compute_dtype) = plan.parts, plan.casts
    return Layer(
        parts.weight,
        cast(adapter.lora_A, adapter_dtype),
        cast(adapter.lora_B, adapter_dtype),
        adapter.scaling,
        bias,
        parts.quant_state,
        compute_dtype,
        adapter.dropout_p,
    )


def base_bias(plan: Plan) -> Tensor | None:
    """The base layer's bias in the dtype of the base product."""
    bias = plan.parts.bias
    # bitsandbytes, too, rounds it to compute_dtype, but writes the result into the bias.
    return None if bias is None else cast(bias, plan.casts.compute or plan.casts.x)


def base_alone(plan: Plan, x: Tensor) -> Layer:
    """The base product and its bias: on a CPU without an adapter, elsewhere with one of zeros."""
    N, K = plan.parts.shape
    R = 0 if x.device.type == "cpu" else 1
    zeros = torch.zeros(R, K, dtype=plan.casts.adapter, device=x.device)
    column = torch.zeros(N, R, dtype=plan.casts.adapter, device=x.device)
    none = Adapter(NO_ADAPTER, zeros, column, None, _NO_DROPOUT, 0.0, None)
    return one_layer(plan, base_bias(plan), none)
