"""LoRA layers that are called one after the other with the same x, run as one autograd node.

The first call computes what all layers of the group return, the next ones take their results. Each
is taken only by a call that would have computed it: the same layer, x, version of x, grad mode,
backend and plan. Any other call runs alone, as if there were no group, so that hooks, branches,
checkpointing, exceptions between the calls or a switch of adapters never change a result. Writes
through `.data` count no version, and are not seen between the calls.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ....backends import forced_backend
from ..plan.call import Plan
from ..plan.plan import plan
from ..plan.reasons import SHARED
from ..run.linear import run, run_together
from ..swap import bypass_reason, not_linear_reason


class _Held(NamedTuple):
    """Results that wait for the calls of their layers."""

    group: SharedInput
    x: Tensor
    mode: tuple[Any, ...]
    results: dict[int, tuple[tuple[Any, ...], Tensor]]  # place -> signature of its plan, y


class Slot(threading.local):
    """Where a model keeps results that wait: those of one group at a time, in each thread.

    So a result that nobody takes lives until any group of the model is called again.
    """

    held: _Held | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Slot, ()  # a copy or a pickle begins empty

    def __deepcopy__(self, memo: dict[int, Any]) -> Slot:
        return memo.setdefault(id(self), Slot())


class SharedInput:
    """Layers that are called with one x, in this order; each holds it under `SHARED`.

    Args:
        layers: two fast layers or more.
        slot: the model's.
    """

    def __init__(self, layers: Sequence[nn.Module], slot: Slot) -> None:
        self.layers = list(layers)
        self.slot = slot
        # Why the latest first call did not run the group as one; None before any, "" when it did.
        self.last: str | None = None
        self.untaken = 0  # results of the call before that nobody took
        for layer in self.layers:
            layer.__dict__[SHARED] = self

    def dissolve(self) -> None:
        """Lets each layer run alone again."""
        self.slot.held = None
        for layer in self.layers:
            layer.__dict__.pop(SHARED, None)

    def run(self, layer: nn.Module, found: Plan, x: Tensor) -> Tensor:
        """`run(found, x)`, a call of `layer`, together with the others' or from theirs."""
        place = self._place(layer)
        if place is None or x.is_inference():
            return run(found, x)
        held, self.slot.held = self.slot.held, None
        if place > 0:
            return self._taken(held, place, found, x)
        if held is not None:
            held.group.untaken = len(held.results)
        return self._first(found, x)

    def _place(self, layer: nn.Module) -> int | None:
        """The place of `layer` in the group; None for a replica made by DataParallel."""
        for place, member in enumerate(self.layers):
            if member is layer:
                return place
        return None

    def _first(self, found: Plan, x: Tensor) -> Tensor:
        plans, left_out = [found], []
        places = [0]
        reason = _alone_reason(self.layers[0], found)
        if reason is None:
            for place, other in enumerate(self.layers[1:], start=1):
                theirs = _join(other, found, x)
                if isinstance(theirs, str):
                    left_out.append(theirs)
                else:
                    plans.append(theirs)
                    places.append(place)
            reason = left_out[0] if left_out else ""
        self.last = reason
        if len(plans) == 1:
            return run(found, x)
        first, *others = run_together(plans, x)
        results = {
            place: (_signature(their), y)
            for place, their, y in zip(places[1:], plans[1:], others, strict=True)
        }
        self.slot.held = _Held(self, x, _mode(x), results)
        return first

    def _taken(self, held: _Held | None, place: int, found: Plan, x: Tensor) -> Tensor:
        """The result that waits for this call; computed alone where there is none."""
        if held is None or held.group is not self or held.x is not x or held.mode != _mode(x):
            if held is not None:
                held.group.untaken = len(held.results)
            return run(found, x)
        signature, y = held.results.pop(place, (None, None))
        if held.results:
            self.slot.held = held
        else:
            self.untaken = 0
        if y is None or signature != _signature(found):
            return run(found, x)
        return y


def _alone_reason(layer: nn.Module, found: Plan) -> str | None:
    """Why a layer's call can't be one of several in a node."""
    if (reason := found.apart_reason) is not None:
        return reason
    if any(adapter.made for adapter in found.parts.adapters):
        # `_signature` would take the A of two calls for two adapters.
        return "its A or B is made anew at each call"
    if (reason := bypass_reason(layer)) is not None:
        return reason
    if layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return "it has hooks that may hand it another x"
    return None


def _join(other: nn.Module, first: Plan, x: Tensor) -> Plan | str:
    """The plan of a later call with the same x, or why it can't join that of the first layer."""
    if (reason := not_linear_reason(other)) is not None:
        return reason
    found = plan(other, x, (), {})
    if isinstance(found, str):
        return found
    if (reason := _alone_reason(other, found)) is not None:
        return reason
    if (found.parts.quant_state is None) != (first.parts.quant_state is None):
        return "one base weight is dense and one in 4 bits"
    if found.casts != first.casts:
        return "its dtypes are not those of the first layer"
    return found


def _mode(x: Tensor) -> tuple[Any, ...]:
    """What else a result depends on. Hooks on saved tensors are those of a checkpointed region."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    stream = torch.cuda.current_stream(x.device) if x.is_cuda else None
    modes = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), x.requires_grad)
    return x._version, *modes, forced_backend(), hooks, stream


def _signature(found: Plan) -> tuple[Any, ...]:
    """All that the result of a plan depends on, but x: equal for calls that compute the same."""
    parts = found.parts
    tensors = [parts.weight, parts.bias]
    numbers: list[Any] = []
    for adapter in parts.adapters:
        tensors += [adapter.lora_A, adapter.lora_B, adapter.bias]
        dropout = adapter.dropout
        numbers += [adapter.scaling, dropout.training, getattr(dropout, "p", 0.0)]
    identity = [
        None
        if t is None
        else (t.data_ptr(), None if t.is_inference() else t._version, t.requires_grad)
        for t in tensors
    ]
    call = (found.casts, found.rows, found.invoked)
    return *call, id(parts.raw_state), *identity, *numbers
