"""How messages and tables name models, dtypes and base layers."""

from __future__ import annotations

import torch
from peft.tuners.lora.layer import Conv1D
from torch import nn

from .. import bitsandbytes as bnb

# The dtypes that fastlora takes, and what tables call them.
SHORT_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def check_module(model: object) -> None:
    """Raises TypeError unless `model` is an nn.Module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")


def named(dtype: torch.dtype) -> str:
    """As in `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def short(dtype: torch.dtype) -> str:
    """As in `bf16`."""
    return SHORT_DTYPES.get(dtype, named(dtype))


def base_name(base: nn.Module) -> str:
    """The kind of a base layer, as in `Row.base`: "bf16", "nf4/64 nested", or its class."""
    if bnb.is_linear4bit(base):
        state = bnb.raw_quant_state(base)
        if state is None:
            return "4-bit, not quantised"
        return f"{state.quant_type}/{state.blocksize}" + (" nested" if state.nested else "")
    weight = getattr(base, "weight", None)
    if type(base) in (nn.Linear, Conv1D) and weight is not None:
        return short(weight.dtype) + (" Conv1D" if type(base) is Conv1D else "")
    if isinstance(base, nn.Embedding) and weight is not None:
        return short(weight.dtype) + " Embedding"
    return type(base).__name__
