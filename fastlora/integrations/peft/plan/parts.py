"""The tensors that the fast path reads from a PEFT layer around a linear one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners.lora.layer import Conv1D
from torch import Tensor, nn

from ....quant import NESTED_BLOCKSIZE, QUANT_TYPES, as_quant_state
from ... import bitsandbytes as bnb
from ..names import named
from .adapters import plain_adapter, svd_adapter
from .call import Adapter, Parts
from .plain import NONE_ACTIVE, hidden_reason, modules_reason, state_reason, tensors_reason


def layer_parts(layer: Any, names: Iterable[str] | None = None) -> Parts | str:
    """The tensors that the fast path reads, or why PEFT's code has to run whatever the input.

    Without adapters where none is at work: all are disabled, merged, or not active.

    Args:
        layer: one of PEFT's LoRA layers.
        names: the adapters of a mixed batch; the active ones when None.
    """
    state, idle = layer.__dict__, state_reason(layer)
    if idle is not None and names is not None:
        return idle
    if not state.get("cast_input_dtype_enabled", True) or "_cast_input_dtype" in state:
        return "PEFT's cast of the input to the adapter's dtype is switched off"

    children: dict[str, Any] = layer._modules
    by_svd = isinstance(children["lora_A"], nn.ParameterDict)
    if by_svd and names is not None:
        return "the call passes adapter_names, which AdaLoRA's layers do not take"
    As = children["lora_A"] if by_svd else children["lora_A"]._modules
    chosen = layer.active_adapters if names is None else dict.fromkeys(names)
    present = [name for name in chosen if name in As and idle is None]
    if not present and names is None:
        idle = idle or NONE_ACTIVE
    adapters: list[Adapter] = []
    roles: list[tuple[str, nn.Module]] = [("the base layer", children["base_layer"])]
    for name in present:
        adapter = (svd_adapter if by_svd else plain_adapter)(layer, name, roles)
        if isinstance(adapter, str):
            return adapter
        adapters.append(adapter)
    if len(present) > 1 and any(adapter.magnitude is not None for adapter in adapters):
        return "DoRA is active together with other adapters"
    base = children["base_layer"]

    four_bit, turned = bnb.is_linear4bit(base), type(base) is Conv1D
    if type(base) is not nn.Linear and not four_bit and not turned:
        return f"the base layer is a {type(base).__name__}, not nn.Linear, Linear4bit or Conv1D"
    if bool(state.get("fan_in_fan_out")) != turned:
        return "fan_in_fan_out does not say how the base weight is stored"
    if (reason := modules_reason(roles)) is not None:
        return reason
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
    if weight is None or any(a.lora_A is None or a.lora_B is None for a in adapters):
        return "a weight is no parameter of its layer (parametrised or pruned)"
    if (reason := hidden_reason(roles)) is not None:
        return reason
    quant_state = bnb.raw_quant_state(base) if four_bit else None
    checked = weight
    if four_bit and bnb.is_params4bit(weight):
        if torch.compiler.is_compiling():
            checked = None  # the compiler traces the subclass, but no cast of it
        else:
            # Every look at an attribute of this subclass costs a call of its __torch_function__.
            checked = weight = weight.as_subclass(Tensor)
    if idle is not None and not _runs_alone(layer, weight, four_bit):
        return idle
    tensors = [("base weight", checked), ("bias", bias)]
    for adapter in adapters:
        tensors += [("lora_A", adapter.lora_A), ("lora_B", adapter.lora_B)]
        tensors += [("lora_B's bias", adapter.bias), ("magnitude", adapter.magnitude)]
    if (reason := tensors_reason(tensors)) is not None:
        return reason
    if weight.requires_grad:
        return "the base weight is being trained (requires_grad); fastlora needs it frozen"
    for adapter in adapters:
        A, B = adapter.lora_A, adapter.lora_B
        if A.dtype != B.dtype:
            return f"lora_A is in {named(A.dtype)} and lora_B in {named(B.dtype)}"

    if turned and weight.dim() == 2:
        weight = weight.t()  # Conv1D stores [K, N]
    N, K = layer.out_features, layer.in_features
    if four_bit:
        if (reason := _quant_state_reason(base, weight, quant_state, (N, K))) is not None:
            return reason
    elif weight.shape != (N, K):
        return _shape_reason("base weight", weight, (N, K))
    for adapter in adapters:
        R = adapter.lora_A.shape[0]
        if adapter.lora_A.shape != (R, K):
            return _shape_reason("lora_A", adapter.lora_A, (R, K))
        if adapter.lora_B.shape != (N, R):
            return _shape_reason("lora_B", adapter.lora_B, (N, R))
    state = None if quant_state is None else as_quant_state(quant_state)
    return Parts(base, weight, state, bias, tuple(adapters), quant_state)


def _runs_alone(layer: Any, weight: Tensor, four_bit: bool) -> bool:
    """Whether the base product of a layer without adapters at work is fastlora's.

    It then has the bits of one with an adapter of zeros. A dense one on a GPU is PEFT's, as is that
    of a disabled layer whose adapter is merged, from which PEFT takes it out first.
    """
    both = layer.__dict__.get("_disable_adapters") and layer.__dict__.get("merged_adapters")
    return not both and (four_bit or weight.device.type == "cpu")


def _quant_state_reason(
    base: nn.Module, weight: Tensor, state: Any, shape: tuple[int, int]
) -> str | None:
    if state is None:
        return "the base weight is not quantised yet"
    if bnb.is_repacked(base):
        return "bitsandbytes repacked the base weight in place for CPU inference"
    if tuple(state.shape) != shape:
        return f"the base weight was quantised with shape {tuple(state.shape)}, not {shape}"
    if weight.numel() * weight.element_size() != (shape[0] * shape[1] + 1) // 2:
        return f"the base weight holds {weight.numel() * weight.element_size()} bytes (sharded?)"
    if not weight.is_contiguous():
        return "the packed base weight is not contiguous"
    if state.quant_type not in QUANT_TYPES:
        return f"the base weight is quantised as {state.quant_type}"
    inner = getattr(state, "state2", None)
    if inner is not None and inner.blocksize != NESTED_BLOCKSIZE:
        return f"the nested absmax has blocksize {inner.blocksize}, not {NESTED_BLOCKSIZE}"
    return None


def _shape_reason(role: str, tensor: Tensor, shape: tuple[int, ...]) -> str:
    return f"{role} has shape {tuple(tensor.shape)}, not {shape} (sharded?)"
