"""The dtypes and the backend of a call, or why PEFT's own code has to run for their sake."""

from __future__ import annotations

import torch
from torch import Tensor

from ....backends import BACKENDS, DEVICE_ORDER, forced_backend
from ....backends.contract import Request
from ... import bitsandbytes as bnb
from ..names import SHORT_DTYPES, named
from .call import Casts, Parts
from .plain import dtype_reason


def casts(
    parts: Parts, x_dtype: torch.dtype, device: torch.device, autocast: torch.dtype | None
) -> Casts | str:
    """The dtypes of a call that has x in `x_dtype` on `device`, or why PEFT's own code has to run.

    PEFT's policy. Dense: x and the base weight share a dtype, which autocast replaces by its own
    for all operands, the weight's in a copy made at each call. 4-bit: the base product is done in
    `compute_dtype` and y comes back in x's dtype, under autocast too, which takes the place of an
    fp32 `compute_dtype`. Adapters are read in their own dtype, or in autocast's. Where that is
    neither x's nor fp32, they are read in fp32: PEFT rounds x to the adapter's dtype instead, which
    costs a copy of x and is no more exact.

    Args:
        autocast: the dtype of the autocast region around the call, None outside.
    """
    if (reason := dtype_reason("x", x_dtype)) is not None:
        return reason
    weight, bias = parts.weight, parts.bias
    dtypes = {adapter.lora_A.dtype for adapter in parts.adapters} or {x_dtype}
    for dtype in dtypes:
        if (reason := dtype_reason("the adapter", dtype)) is not None:
            return reason
    compute = None
    if parts.quant_state is None:
        x_cast = autocast or x_dtype
        if weight.dtype != x_cast:
            if autocast is None:
                return f"x is in {named(x_dtype)} and the base weight in {named(weight.dtype)}"
            if weight.dtype not in SHORT_DTYPES:
                return f"the base weight is in {named(weight.dtype)}"
            compute = autocast
        if bias is not None and bias.dtype != x_cast and autocast is None:
            return f"x is in {named(x_dtype)} and the bias in {named(bias.dtype)}"
        narrow = autocast
    else:
        x_cast = x_dtype
        compute = bnb.compute_dtype(parts.base, x_dtype)
        if compute not in SHORT_DTYPES:
            return f"compute_dtype is {named(compute)}; fastlora takes fp32, bf16 and fp16"
        if autocast is not None and compute == torch.float32:
            compute = autocast
        if autocast is not None and compute != autocast:
            return (
                f"compute_dtype is {named(compute)} under autocast to {named(autocast)}; set "
                "bnb_4bit_compute_dtype to autocast's dtype"
            )
        if autocast is not None and x_dtype not in (autocast, torch.float32):
            return f"x is in {named(x_dtype)} under autocast to {named(autocast)}"
        narrow = autocast if autocast == x_dtype else None
    adapter = narrow or (x_cast if dtypes == {x_cast} else torch.float32)

    tensors: list[Tensor | None] = [weight, bias]
    for one in parts.adapters:
        tensors += [one.lora_A, one.lora_B, one.bias, one.magnitude]
    if parts.quant_state is not None:
        tensors.append(parts.quant_state.absmax)
    for tensor in tensors:
        if tensor is not None and tensor.device != device:
            return f"x is on {device} and the layer, or a part of it, on {tensor.device}"
    found = Casts(x_cast, adapter, compute)
    return backend_reason(linear_request(parts, found, device)) or found


def linear_request(parts: Parts, dtypes: Casts, device: torch.device) -> Request:
    """What a layer asks a backend for."""
    four_bit = parts.quant_state is not None
    return Request("lora_linear_fwd", device.type, device.index, *dtypes, four_bit)


def backend_reason(request: Request) -> str | None:
    """Why no backend is worth taking. One that the user asked for runs, or says why it can't."""
    return None if forced_backend() is not None else no_backend_reason(request)


def no_backend_reason(request: Request) -> str | None:
    """Why no backend is worth taking when the user has not asked for one, or None."""
    reasons = []
    for name in DEVICE_ORDER.get(request.device, ()):
        # The reference defines the ops; PEFT's own code is faster.
        if name == "reference":
            continue
        reason = BACKENDS[name].unsupported(request)
        if reason is None:
            return None
        reasons.append(f"{name}: {reason}")
    return " ".join([f"no fast backend for {request.device}.", *reasons])
