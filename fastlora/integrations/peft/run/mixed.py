"""Calls in which an adapter serves some rows, or some tokens of a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ....autograd.linear import linear
from ..plan.call import Adapter, Plan
from .launch import base_alone
from .several import term
from .tensors import cast, on_device


def mixed(plan: Plan, x: Tensor, rows: Sequence[str]) -> Tensor:
    """`y[i] = x[i] W^T + bias + s_a (x[i] A_a^T B_a^T + bias_a)`, `a` the adapter of row i.

    One base product for all rows, and two batched products with each row's own A and B, ranks
    padded by zeros: their work does not grow with the number of adapters.
    """
    adapters, dtype = plan.parts.adapters, plan.casts.adapter
    y = linear(x, base_alone(plan, x))
    if not adapters:
        return y
    place = {adapter.name: i for i, adapter in enumerate(adapters)}
    # A row without an adapter takes the first one, times zero.
    index = on_device(_on_cpu([place.get(name, 0) for name in rows]), x.device)
    scalings = [adapters[place[name]].scaling if name in place else 0.0 for name in rows]
    scale = _on_cpu(scalings, dtype)[:, None, None]
    if plan.invoked:
        everywhere = [name not in place or not adapters[place[name]].invoked for name in rows]
        scale = scale * (_is_invoked(plan, x) | _on_cpu(everywhere)[:, None])[..., None]
    scale = on_device(scale, x.device)
    R = max(adapter.lora_A.shape[0] for adapter in adapters)
    As = [pad(cast(a.lora_A, dtype), (0, 0, 0, R - a.lora_A.shape[0])) for a in adapters]
    Bs = [pad(cast(a.lora_B, dtype), (0, R - a.lora_B.shape[1])) for a in adapters]
    x_rows = cast(x, dtype).reshape(len(rows), x.shape[1:-1].numel(), x.shape[-1])
    S = x_rows @ torch.stack(As)[index].mT
    update = (S * scale) @ torch.stack(Bs)[index].mT
    if any(adapter.bias is not None for adapter in adapters):
        none = update.new_zeros(update.shape[-1])
        biases = [none if a.bias is None else cast(a.bias, dtype) for a in adapters]
        update = update + torch.stack(biases)[index][:, None] * scale
    return y + update.to(y.dtype).view(y.shape)


def invoke(plan: Plan, y: Tensor, x: Tensor, adapter: Adapter) -> Tensor:
    """`y[m] += scaling * drop(x[m]) A^T B^T` for the invoked tokens m alone, into y itself.

    Without any, A and B get gradients of zeros, as in PEFT's code.
    """
    index = on_device(_is_invoked(plan, x).view(-1).nonzero().view(-1), x.device)
    rows = x.reshape(-1, x.shape[-1]).index_select(0, index)
    flat = y.view(-1, y.shape[-1])
    sums = flat.index_select(0, index) + term(plan, rows, adapter)
    flat.index_copy_(0, index, sums.to(y.dtype))
    return y


def _is_invoked(plan: Plan, x: Tensor) -> Tensor:
    """bool [rows, tokens] on the CPU: whether a token is an invoked one."""
    tokens = x.shape[1:-1].numel()
    places = torch.arange(tokens, device="cpu")
    return places >= tokens - _on_cpu(plan.invoked)[:, None]


def _on_cpu(values: Sequence[Any], dtype: torch.dtype | None = None) -> Tensor:
    """Numbers as a tensor on the CPU, whatever the default device is."""
    return torch.tensor(values, dtype=dtype, device="cpu")
