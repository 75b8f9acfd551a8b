"""The answer of `plan`, kept on a layer for its next call.

Asking all that `plan` asks costs more than the call of a small layer, and the answer is nearly
always that of the call before. A layer keeps it under `KEPT`, together with the facts that it
depends on: types, dtypes, devices, shapes and a few settings. A later call reads every module and
tensor anew, by its name, and takes the answer if all facts are equal. So what is kept holds no
tensor and no module: it keeps no memory alive, and a weight that was exchanged, moved or sharded
shows in its facts, or is simply the weight that this call reads.

Only one kind of answer is kept: yes, for one adapter of plain LoRA with a backend that serves it
unasked. `_look` returns None for all others, and `plan` asks as ever. Why a change can't be missed:

    what `plan` asks of the surroundings   `plan` asks it at each call
    hooks, replaced forwards, switches     `_look` asks at each call, and declines
    dtypes, shapes, devices, classes, ...  facts; in-place changes and `.data = ` change them, too
    values: scaling, dropout, A, B, W      no answer depends on them; each call reads them
    the backend                            serves an op on a device in given dtypes for good, once
                                           it does; `use_backend` only adds to what is served
    patches of a class, modes of torch     `plan` does not ask for them
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Conv1D
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from ....quant import QuantState
from ... import bitsandbytes as bnb
from .call import Adapter, Casts, Parts, Plan
from .casts import linear_request, no_backend_reason
from .plain import PLAIN, is_plain

# Under this name a layer keeps its `Kept`.
KEPT = "_fastlora_kept"
_Facts = tuple[Any, ...]
# Facts, base layer, weight, bias, adapter, bitsandbytes' quant state, and whether autocast is on: a
# bare tuple, which costs a third of a named one.
_Look = tuple[_Facts, nn.Module, Tensor, Tensor | None, Adapter, Any, bool]


class Kept:
    """A `Plan` without its tensors and modules, and the facts that it depends on.

    A copy or a pickle of a layer has None in its place.
    """

    __slots__ = ("casts", "facts", "state")

    def __init__(self, facts: _Facts, casts: Casts, state: QuantState | None) -> None:
        self.facts = facts
        self.casts = casts
        self.state = state

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def kept_plan(layer: nn.Module, x: Tensor) -> Plan | None:
    """The plan of `layer(x)` if its kept answer still holds, else None."""
    kept: Kept | None = layer.__dict__.get(KEPT)
    if kept is None or (look := _look(layer, x)) is None or look[0] != kept.facts:
        return None
    _, base, weight, bias, adapter, raw, autocast = look
    state = kept.state
    if state is not None:
        inner, offset = raw.state2 if state.state2 is not None else None, raw.offset
        if inner is None:
            state = state.with_tensors(raw.absmax, raw.code, offset=offset)
        else:
            state = state.with_tensors(raw.absmax, raw.code, inner.absmax, inner.code, offset)
    elif type(base) is Conv1D:
        weight = weight.t()  # Conv1D stores [K, N]
    parts = Parts(base, weight, state, bias, (adapter,), raw)
    return Plan(parts, kept.casts, autocast=autocast)


def keep(layer: nn.Module, x: Tensor, found: Plan) -> None:
    """Keeps `found`, the plan of `layer(x)`, if it is of the kind that is kept."""
    if (look := _look(layer, x)) is None:
        return
    if no_backend_reason(linear_request(found.parts, found.casts, x.device)) is None:
        state = found.parts.quant_state
        hollow = None if state is None else state.without_tensors()
        layer.__dict__[KEPT] = Kept(look[0], found.casts, hollow)


def _look(layer: nn.Module, x: Tensor) -> _Look | None:
    """What `layer` is in a call with x; None if it is not of the kind whose answers are kept."""
    own = layer.__dict__
    try:
        children, active = own["_modules"], own["_active_adapter"]
        name = active[0] if type(active) is list and len(active) == 1 else active
        if (
            type(name) is not str
            or own["_disable_adapters"]
            or own["merged_adapters"]
            or not own["cast_input_dtype_enabled"]
            or "_cast_input_dtype" in own
            or name in own["lora_variant"]
            or own["use_dora"].get(name)
        ):
            return None
        base = children["base_layer"]
        lora_A = children["lora_A"]._modules[name]
        lora_B = children["lora_B"]._modules[name]
        dropout = children["lora_dropout"]._modules[name]
        if type(lora_A) is not nn.Linear or type(lora_B) is not nn.Linear:
            return None
        own_base, own_A, own_B = base.__dict__, lora_A.__dict__, lora_B.__dict__
        own_dropout = dropout.__dict__
        if not (
            is_plain(base, own_base)
            and is_plain(lora_A, own_A)
            and is_plain(lora_B, own_B)
            and is_plain(dropout, own_dropout)
        ):
            return None
        if nn_module._has_any_global_hook():
            return None
        if (
            "weight" in own_base
            or "bias" in own_base
            or "weight" in own_A
            or "weight" in own_B
            or "bias" in own_B
        ):
            return None
        of_base, of_A, of_B = own_base["_parameters"], own_A["_parameters"], own_B["_parameters"]
        weight, bias = of_base["weight"], of_base["bias"]
        A, bias_A = of_A["weight"], of_A["bias"]
        B, bias_B = of_B["weight"], of_B["bias"]
        scaling = own["scaling"][name]
        N, K = own["out_features"], own["in_features"]
        fan_in_fan_out = own["fan_in_fan_out"]
    except KeyError:  # AdaLoRA's layers, an adapter of other layers, layers of an older PEFT
        return None

    if type(x) not in PLAIN or x.layout is not torch.strided or x.is_nested:
        return None
    shape = x.shape
    if not shape or shape[-1] != K or bias_A is not None:
        return None
    raw, four_bit = None, None
    if type(base) is not nn.Linear and bnb.is_linear4bit(base):
        raw = bnb.raw_quant_state(base)
        if raw is None or weight is None:
            return None
        if bnb.is_params4bit(weight):
            # Every look at an attribute of this subclass costs a call of its __torch_function__.
            weight = weight.as_subclass(Tensor)
        four_bit = _four_bit_facts(base, weight, raw)
    if type(weight) not in PLAIN or type(A) not in PLAIN or type(B) not in PLAIN:
        return None
    if weight.requires_grad:
        return None
    if bias is not None and type(bias) not in PLAIN:
        return None
    if bias_B is not None and type(bias_B) not in PLAIN:
        return None
    device = x.device
    kind = device.type
    if kind == "meta":  # has no autocast to ask about
        return None
    autocast = torch.is_autocast_enabled(kind)
    facts = (
        x.dtype,
        device,
        torch.get_autocast_dtype(kind) if autocast else None,
        type(base),
        type(dropout),
        own_dropout.get("inplace"),
        type(scaling),
        fan_in_fan_out,
        N,
        K,
        weight.dtype,
        weight.device,
        weight.shape,
        A.dtype,
        A.device,
        A.shape,
        B.dtype,
        B.device,
        B.shape,
        None if bias is None else (bias.dtype, bias.device),
        None if bias_B is None else bias_B.device,
        four_bit,
    )
    adapter = Adapter(name, A, B, bias_B, dropout, scaling, None)
    return facts, base, weight, bias, adapter, raw, autocast


def _four_bit_facts(base: Any, weight: Tensor, raw: Any) -> tuple[Any, ...]:
    """What the answer for a 4-bit layer depends on, beside the facts of every layer."""
    absmax, inner = raw.absmax, getattr(raw, "state2", None)
    return (
        base.compute_dtype,
        base.compute_type_is_set,
        weight.is_contiguous(),
        raw.shape,
        raw.dtype,
        raw.quant_type,
        raw.blocksize,
        # Not getattr: bitsandbytes' state takes most of a microsecond to say that it has none.
        raw.__dict__.get("packing_format_for_cpu"),
        getattr(raw, "offset", None) is None,
        absmax.dtype,
        absmax.device,
        absmax.shape,
        None if inner is None else (inner.dtype, inner.blocksize, inner.quant_type),
    )
