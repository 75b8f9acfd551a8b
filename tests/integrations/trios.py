"""Three copies of a Llama: fast, PEFT's own in float64, and PEFT's own."""

from __future__ import annotations

import copy
import zlib
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

import fastlora
from fastlora.integrations.peft import FastLoraLinear
from tests.integrations.models import (
    VOCAB,
    exact,
    fill_adapters,
    lora_layers,
    replaying,
)

WAYS = ["accelerate", "register", "patch_peft"]
FAST = {""}
IDS = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))


class Trio(NamedTuple):
    """The same model three times."""

    fast: nn.Module
    exact: nn.Module
    stock: nn.Module


def plug(way: str, model: nn.Module, config: LoraConfig) -> nn.Module:
    """`get_peft_model` with fast layers."""
    if way == "accelerate":
        return fastlora.accelerate(get_peft_model(model, config), verbose=False)
    if way == "register":
        return get_peft_model(model, fastlora.register(config))
    fastlora.patch_peft()
    try:
        return get_peft_model(model, config)
    finally:
        fastlora.unpatch_peft()


def trio(way: str, base: nn.Module, **options: Any) -> Trio:
    settings: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": "all-linear", **options}
    stock = fill_adapters(get_peft_model(copy.deepcopy(base), LoraConfig(**settings)))
    fast = plug(way, copy.deepcopy(base), LoraConfig(**settings))
    fast.load_state_dict(stock.state_dict(), strict=True)
    assert {type(layer) for layer in lora_layers(fast)} == {FastLoraLinear}
    assert {type(layer) for layer in lora_layers(stock)} == {Linear}
    return Trio(fast, exact(stock), replaying(stock))


def logits(model: nn.Module, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, **options).logits


def add(model: nn.Module, name: str = "other", **options: Any) -> None:
    """A further adapter, with values that depend on the names of its parameters alone."""
    settings: dict[str, Any] = {"r": 3, "lora_alpha": 7, "target_modules": "all-linear", **options}
    model.add_adapter(name, LoraConfig(**settings))
    for parameter_name, parameter in model.named_parameters():
        if f".{name}." in parameter_name:
            generator = torch.Generator().manual_seed(zlib.crc32(parameter_name.encode()))
            values = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.data.copy_(values)
