"""When the fast path holds for one call of a PEFT layer, and when PEFT's own code has to run.

`plan` is the only place where this is decided for a layer around a linear one. Its conditions come
in three groups, so that `explain` can ask the first two of a layer that nobody has called yet:

    parts    what the layer is: its state, the exact types and hooks of everything bypassed
    casts    dtypes, devices, autocast and the backend, for a given dtype of x
    plan     the call itself: arguments, tracing, transforms, x
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .call import Parts, Plan
from .casts import casts
from .kept import keep, kept_plan
from .parts import layer_parts
from .plain import PLAIN
from .reasons import Unserved, call_reason

# Arguments that PEFT's layers take out of the call themselves; as None they mean nothing.
_MIXED, _OFFSETS = "adapter_names", "alora_offsets"
_PEFT_KWARGS = (_MIXED, _OFFSETS)


def plan(layer: nn.Module, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Plan | str:
    """How to run `layer(x, *args, **kwargs)` on fastlora, or why PEFT's own code has to run."""
    if args:
        return "the call has further positional arguments"
    for key in kwargs:
        if key not in _PEFT_KWARGS:
            return f"the call passes {key}"
    if (reason := call_reason()) is not None:
        return reason
    keeps = not kwargs and not torch.compiler.is_compiling()
    if keeps and (kept := kept_plan(layer, x)) is not None:
        return kept
    found = _plan(layer, x, kwargs)
    if keeps and not isinstance(found, str):
        keep(layer, x, found)
    return found


def _plan(layer: nn.Module, x: Tensor, kwargs: dict[str, Any]) -> Plan | str:
    """`plan`, as far as it depends on the layer and on x."""
    rows = kwargs.get(_MIXED)
    parts = layer_parts(layer, rows)
    if isinstance(parts, str):
        return parts
    if type(x) not in PLAIN:
        return f"x is a {type(x).__name__}, a tensor subclass"
    if x.layout is not torch.strided or x.is_nested:
        return "x is not a plain strided tensor"
    _, K = parts.shape
    if x.dim() == 0 or x.shape[-1] != K:
        return f"x has shape {tuple(x.shape)}, the layer takes [..., {K}]"
    if rows is not None and (reason := _mixed_reason(parts, x, rows)) is not None:
        return reason
    invoked: tuple[int, ...] = ()
    if any(adapter.invoked for adapter in parts.adapters):
        found = _invoked_tokens(parts, x, kwargs.get(_OFFSETS))
        if isinstance(found, str):
            return found
        if found is not None:
            invoked = found
        else:
            everywhere = tuple(adapter._replace(invoked=False) for adapter in parts.adapters)
            parts = parts._replace(adapters=everywhere)
    device = x.device
    if device.type == "meta":
        return "x is on the meta device"
    enabled = torch.is_autocast_enabled(device.type)
    autocast = torch.get_autocast_dtype(device.type) if enabled else None
    dtypes = casts(parts, x.dtype, device, autocast)
    if isinstance(dtypes, str):
        return Unserved(dtypes)
    return Plan(parts, dtypes, rows, invoked, enabled)


def _invoked_tokens(parts: Parts, x: Tensor, offsets: Any) -> tuple[int, ...] | str | None:
    """How many tokens at the end of each row of x aLoRA's adapters serve; None when all of them.

    An offset of None or less than 1 invokes none of a row, and one beyond its length all of it. A
    call without offsets invokes nothing.
    """
    if x.dim() not in (2, 3):
        return f"aLoRA takes x [rows, tokens, {parts.shape[1]}], got {tuple(x.shape)}"
    if torch.compiler.is_compiling():
        return "torch.compile does not trace which tokens aLoRA serves"
    rows, length = x.shape[0], x.shape[1:-1].numel()
    if offsets is None:
        return (0,) * rows
    if not isinstance(offsets, list | tuple) or not all(
        o is None or type(o) is int for o in offsets
    ):
        return "alora_offsets is no list of ints and None"
    if len(offsets) != rows:
        return f"alora_offsets has {len(offsets)} entries for an x of shape {tuple(x.shape)}"
    invoked = tuple(0 if o is None else max(0, min(o, length)) for o in offsets)
    return None if all(count == length for count in invoked) else invoked


def _mixed_reason(parts: Parts, x: Tensor, rows: Sequence[str]) -> str | None:
    """Why a batch with an adapter for each row has to run PEFT's code, or fail there."""
    if x.dim() < 2 or len(x) != len(rows):
        return f"adapter_names has {len(rows)} names for an x of shape {tuple(x.shape)}"
    if any(adapter.magnitude is not None for adapter in parts.adapters):
        return "the call passes adapter_names for a DoRA adapter, which PEFT refuses"
    if any(adapter.drops for adapter in parts.adapters):
        return "the call passes adapter_names with dropout in training"
    return None
