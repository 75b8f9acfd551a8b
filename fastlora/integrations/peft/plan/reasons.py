"""Why a call runs PEFT's own code: what surrounds it, and what the layer remembers of it."""

from __future__ import annotations

import warnings

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.jit._trace import is_tracing

from ....backends import forced_backend

# Why the latest call of a layer ran PEFT's own code; empty when it did not.
LAST_REASON = "_fastlora_reason"


class Unserved(str):
    """A reason that lies in dtypes, autocast, devices or backends, not in what the user asked for.

    Users want to hear of such a reason, so the layer warns of it.
    """

    __slots__ = ()


def call_reason() -> str | None:
    """Why PEFT's code has to run in what surrounds the call (tracing, transforms), or None."""
    if torch.compiler.is_exporting() or is_tracing():
        return "torch.export or torch.jit.trace is recording a graph"
    if torch.compiler.is_compiling() and forced_backend() == "reference":
        return "torch.compile does not trace the reference"
    if torch._C._are_functorch_transforms_active():
        return "the call is inside a torch.func transform (vmap, grad, jvp)"
    if forward_ad._current_level >= 0:
        return "forward-mode AD is active"
    return None


def record(layer: nn.Module, reason: str) -> None:
    """Keeps why the latest call ran PEFT's code, and warns of an `Unserved` reason."""
    if torch.compiler.is_compiling():
        return
    if isinstance(reason, Unserved) and layer.__dict__.get(LAST_REASON) != reason:
        # Python shows the same warning once, however many layers give it.
        warnings.warn(f"LoRA layers run on PEFT's own code: {reason}", stacklevel=1)
    layer.__dict__[LAST_REASON] = str(reason)
