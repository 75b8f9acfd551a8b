"""PEFT's LoRA on a parameter (`target_parameters`): when a call can run on an adapted weight."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from ....backends.contract import Request
from .casts import backend_reason
from .plain import (
    NONE_ACTIVE,
    dtype_reason,
    scaling_reason,
    state_reason,
    tensors_reason,
    variant_of,
)
from .reasons import Unserved, call_reason


class ParamParts(NamedTuple):
    """A parameter `[N, K]` or `[E, rows, columns]` of `owner`, and what the adapters add to it.

    `factors` has, for each adapter, left `[..., rows, R]`, right `[..., R, columns]` and scaling.
    """

    owner: nn.Module
    name: str
    weight: Tensor
    factors: tuple[tuple[Tensor, Tensor, float], ...]

    @property
    def request(self) -> Request:
        """What the layer asks a backend for."""
        op = "lora_linear_fwd" if self.weight.dim() == 2 else "grouped_lora_linear_fwd"
        device = self.weight.device
        return Request(op, device.type, device.index, self.weight.dtype)


def param_parts(layer: Any) -> ParamParts | str:
    """The tensors that the fast path reads, or why PEFT's code has to run whatever the input."""
    if (reason := state_reason(layer)) is not None:
        return reason
    As, Bs = layer._modules["lora_A"]._modules, layer._modules["lora_B"]._modules
    names = [name for name in layer.active_adapters if name in As]
    if not names:
        return NONE_ACTIVE
    owner, name = layer.get_base_layer(), layer.parameter_name
    weight = owner._parameters.get(name)
    if weight is None or name in owner.__dict__:
        return f"{name} is no parameter of its module (parametrised or pruned)"
    inner = layer._modules["base_layer"]
    while isinstance(inner, ParamWrapper):
        if inner.parameter_name == name:
            return f"another wrapper adapts the parameter {name}, too"
        inner = inner._modules["base_layer"]
    tensors = [(f"parameter {name}", weight)]
    for adapter in names:
        if variant_of(layer, adapter):
            return "the adapter is a LoRA variant"
        if (reason := scaling_reason(layer.scaling[adapter])) is not None:
            return reason
        for role, module in (("lora_A", As[adapter]), ("lora_B", Bs[adapter])):
            if type(module) is not nn.Linear:
                return f"{role} is a {type(module).__name__}, not a plain nn.Linear"
            if module._parameters.get("weight") is None:
                return f"{role}'s weight is no parameter of its layer (parametrised or pruned)"
            tensors.append((role, module._parameters["weight"]))
    if (reason := _tensor_reason(tensors)) is not None:
        return reason
    if weight.requires_grad:
        return f"the parameter {name} is being trained (requires_grad); fastlora needs it frozen"
    if weight.dim() not in (2, 3) or (weight.dim() == 3 and layer.num_experts == 1):
        return f"the parameter {name} has shape {tuple(weight.shape)}"
    factors = []
    for adapter in names:
        found = _adapter_factors(layer, weight, As[adapter].weight, Bs[adapter].weight)
        if found is None:
            return f"lora_A or lora_B does not fit the parameter {name} (sharded?)"
        factors.append((*found, float(layer.scaling[adapter])))
    parts = ParamParts(owner, name, weight, tuple(factors))
    reason = backend_reason(parts.request)
    return parts if reason is None else Unserved(reason)


def _tensor_reason(tensors: list[tuple[str, Tensor]]) -> str | None:
    """Why the fast path can't read one of the tensors, of which the first is the parameter."""
    if (reason := tensors_reason(tensors)) is not None:
        return reason
    device = tensors[0][1].device
    for role, tensor in tensors:
        if (reason := dtype_reason(f"the {role}", tensor.dtype)) is not None:
            return reason
        if tensor.device != device:
            return f"the {role} is on {tensor.device} and the parameter on {device}"
    return None


def _adapter_factors(
    layer: Any, weight: Tensor, lora_A: Tensor, lora_B: Tensor
) -> tuple[Tensor, Tensor] | None:
    """left and right with `delta = scaling * left right`, as PEFT's `get_delta_weight` has it.

    lora_A holds the experts' A one below the other, `[E R, columns of A]`; lora_B interleaves them,
    column `r E + e` of `[rows of B, R E]` being column r of expert e.
    """
    rows, columns = weight.shape[-2:]
    if weight.dim() == 2:
        left, right = lora_B, lora_A
    else:
        E = layer.num_experts
        if len(lora_A) % E or lora_B.shape[1] != len(lora_A):
            return None
        A = lora_A.reshape(E, -1, lora_A.shape[1])
        B = lora_B.reshape(len(lora_B), -1, E).permute(2, 0, 1).contiguous()
        # PEFT before 0.19 had one of the two layouts only.
        swapped = getattr(layer, "_did_swap_in_out_features", False)
        left, right = (B, A) if swapped else (A.mT, B.mT)
    R, lead = left.shape[-1], weight.shape[:-2]
    fits = left.shape == (*lead, rows, R) and right.shape == (*lead, R, columns)
    return (left, right) if fits else None


def param_plan(layer: nn.Module, kwargs: dict[str, Any]) -> ParamParts | str:
    """How to run a call with `kwargs` on fastlora, or why PEFT's own code has to run."""
    if kwargs.get("adapter_names") is not None:
        return "the call passes adapter_names, which PEFT refuses on parameters"
    if torch.compiler.is_compiling():
        return "torch.compile does not trace fastlora's adapted weight"
    if (reason := call_reason()) is not None:
        return reason
    return param_parts(layer)
