"""Models to be merged, and what PEFT makes of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from fastlora import ops
from fastlora.integrations import bitsandbytes as bnb
from tests.integrations.models import (
    MLP,
    MLP4bit,
    linear4bit,
    lora_layers,
    peft_model,
)
from tests.integrations.peft_acts import add
from tests.integrations.peft_table import CASES

DENSE = [
    "LoRA",
    "LoRA, bf16 base, fp32 adapters",
    "use_rslora",
    "rank_pattern, alpha_pattern",
    "lora_bias",
    "PiSSA",
    "DoRA",
    "DoRA, bf16 base, fp32 adapters",
    "MiCA",
    "KaSA",
    "VeLoRA",
    "BD-LoRA",
    "embedding",
    "Conv1d",
    "GPT-2's Conv1D (fan_in_fan_out)",
    "target_parameters, a linear layer's weight",
    "AdaLoRA",
]
FOUR_BIT = ["LoRA on NF4", "lora_bias on NF4", "DoRA on NF4"]


def base_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Weights and biases under the adapters, in fp32 or better, 4-bit ones decoded."""
    found = {}
    for name, layer in model.named_modules():
        if not hasattr(layer, "merged_adapters"):
            continue
        base = layer.get_base_layer()
        for key, parameter in base.named_parameters(recurse=False):
            found[f"{name}.{key}"] = parameter.detach().clone()
        if bnb.is_linear4bit(base):
            found[f"{name}.weight"] = bnb.dense_weight(base, torch.float32)
    return found


def as_dense(model: nn.Module) -> nn.Module:
    """PEFT's dense layer class around decoded 4-bit weights, whose merge is the plain one."""
    for layer in lora_layers(model):
        if type(layer).__name__.endswith("Linear4bit"):
            layer.__class__ = Linear
    return model


def pair(name: str, several: bool = False) -> tuple[Any, Any, Any]:
    """PEFT's model, the same in float64 and the same in fp32, both with decoded weights."""
    _, double, stock = CASES[name].trio()
    if several:
        for model in (double, stock):
            add(model)
            model.base_model.set_adapter(["default", "other"])
    double = as_dense(double)
    plain = copy.deepcopy(stock) if name in DENSE else copy.deepcopy(double).float()
    return stock, double, plain


def merged_by_peft(model: Any) -> Any:
    model.merge_adapter()
    return model


def weights_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((k, v) for k, v in base_parameters(model).items() if k.endswith("weight"))


def quantised(dense: MLP) -> Any:
    """A PEFT model whose 4-bit weights were made from those of `dense`."""
    four_bit = MLP4bit()
    for name in ("up", "down"):
        source = getattr(dense, name)
        linear = linear4bit(source.in_features, source.out_features)
        packed, state = ops.quantize_4bit(source.weight.detach(), 64, "nf4")
        bnb.store(linear, packed, state)
        linear.bias.data.copy_(source.bias.data)
        setattr(four_bit, name, linear)
    return peft_model(four_bit)
