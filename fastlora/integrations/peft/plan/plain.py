"""What has to be plain, modules and tensors, so that fastlora may read around PEFT's own code."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from ..names import SHORT_DTYPES, named

PLAIN = (Tensor, nn.Parameter)
# ms-swift's forward of lora_A and lora_B, which moves the input to the weight's device.
_SWIFT_FORWARD = ("swift.tuners.peft", "keep_device_forward")
NONE_ACTIVE = "no adapters are active on this layer"


def dtype_reason(role: str, dtype: torch.dtype) -> str | None:
    """Why fastlora does not take a tensor of this role, or None."""
    if dtype in SHORT_DTYPES:
        return None
    return f"{role} is in {named(dtype)}; fastlora takes fp32, bf16 and fp16"


def scaling_reason(scaling: object) -> str | None:
    """Why PEFT's factor of an adapter can't be read without waiting for a device, or None."""
    if type(scaling) in (float, int):
        return None
    return f"scaling is a {type(scaling).__name__}, not a number"


def variant_of(layer: Any, name: str) -> str:
    """The class of PEFT's variant that an adapter is; "" for plain LoRA."""
    state = layer.__dict__
    if name in state.get("lora_variant", ()):
        return type(state["lora_variant"][name]).__name__
    # Layers pickled by a PEFT that had no variants know DoRA by this alone.
    return "DoRA" if state.get("use_dora", {}).get(name) else ""


def state_reason(layer: Any) -> str | None:
    """Why the adapters of a layer take no part in its forward, or None."""
    if layer.__dict__.get("_disable_adapters"):
        return "the adapters are disabled"
    if layer.__dict__.get("merged_adapters"):
        return "the adapter is merged into the base weight"
    return None


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks around its forward or backward."""
    inner = module.__dict__
    return bool(
        inner["_forward_hooks"]
        or inner["_forward_pre_hooks"]
        or inner["_backward_hooks"]
        or inner["_backward_pre_hooks"]
    )


def is_plain(module: nn.Module, inner: dict[str, Any]) -> bool:
    """Whether a module, `inner` its `__dict__`, has no hooks, and no forward but its class's."""
    return not (
        inner["_forward_hooks"]
        or inner["_forward_pre_hooks"]
        or inner["_backward_hooks"]
        or inner["_backward_pre_hooks"]
        or (("forward" in inner or "_hf_hook" in inner) and not _forward_is_plain(module))
    )


def modules_reason(roles: Iterable[tuple[str, nn.Module]]) -> str | None:
    """Why modules, each with its role, can't be bypassed, or None."""
    for role, module in roles:
        if is_plain(module, module.__dict__):
            continue
        if has_hooks(module):
            return f"{role} has hooks, which fastlora would not call"
        return f"{role} has a forward of its own (accelerate's offloading, or another patch)"
    if nn_module._has_any_global_hook():
        return "global module hooks are registered, which fastlora would not call"
    return None


def hidden_reason(roles: Iterable[tuple[str, nn.Module]]) -> str | None:
    """Why modules, each with its role, compute with something else than their parameters, or None.

    An attribute of the instance comes before a parameter of that name.
    """
    for role, module in roles:
        for name in ("weight", "bias"):
            if name in module.__dict__:
                return f"{role} has a {name} that is an attribute, not a parameter"
    return None


def tensors_reason(tensors: Iterable[tuple[str, Tensor | None]]) -> str | None:
    """Why tensors, each with its role, can't be read as plain memory, or None."""
    for role, tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in PLAIN:
            kind = type(tensor).__name__
            if kind == "DTensor":
                return f"the {role} is sharded (a DTensor; FSDP2 gathers it during the forward)"
            return f"the {role} is a {kind}, a tensor subclass"
        if tensor.is_meta:
            return f"the {role} is on the meta device (offloaded or not loaded)"
    return None


def _forward_is_plain(module: nn.Module) -> bool:
    """True when the forward in the module's `__dict__` computes what that of its class computes.

    Accelerate puts one there for each module of a model that is spread over devices. Unless it
    offloads, all that it does is to move the input to the weight's device, where `casts` wants it.
    Taking the hooks off leaves the class's own forward there. ms-swift gives each lora_A and lora_B
    one that does the same.
    """
    inner = module.__dict__
    forward, hook = inner.get("forward"), inner.get("_hf_hook")
    function = getattr(forward, "__func__", None)
    if function is not None and (function.__module__, function.__name__) == _SWIFT_FORWARD:
        forward = inner.get("forward_origin")
    if hook is not None:
        kind = type(hook)
        if (kind.__module__, kind.__name__) != ("accelerate.hooks", "AlignDevicesHook"):
            return False
        if hook.offload or hook.no_grad or not isinstance(forward, functools.partial):
            return False
        if forward.func.__module__ != "accelerate.hooks":
            return False
        forward = inner.get("_old_forward")
    return getattr(forward, "__func__", None) is type(module).forward
