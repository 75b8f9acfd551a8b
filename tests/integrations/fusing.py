"""Networks whose layers are fused, and what counts their nodes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Phi3Config,
    Qwen3Config,
)

import fastlora
from fastlora.autograd.gated import GatedMLPFunction
from fastlora.integrations.peft.fuse.join import Fusion
from tests.integrations.models import (
    VOCAB,
    assert_all_close,
    exact,
    fill_adapters,
    linear4bit,
    replaying,
    train_step,
)

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**GROUPED),
    "qwen3": lambda: Qwen3Config(**GROUPED, head_dim=8),
    "gemma2": lambda: Gemma2Config(**GROUPED, head_dim=8, attn_implementation="eager"),
    "phi3": lambda: Phi3Config(**GROUPED, pad_token_id=0),
    "gpt_neox": lambda: GPTNeoXConfig(**SIZES),
}
MLP = ("gate_proj", "up_proj", "down_proj")


def network(name: str, four_bit: bool = False, **options: Any) -> nn.Module:
    """A tiny language model with a LoRA adapter on every linear, B not zero."""
    model = AutoModelForCausalLM.from_config(CONFIGS[name]())
    if four_bit:
        for module in list(model.base_model.modules()):
            for key, child in module.named_children():
                if type(child) is nn.Linear:
                    bias = child.bias is not None
                    packed = linear4bit(child.in_features, child.out_features, bias=bias)
                    setattr(module, key, packed)
        model.is_loaded_in_4bit = True
    settings: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": "all-linear"}
    return fill_adapters(get_peft_model(model, LoraConfig(**settings, **options))).train()


def fused(model: nn.Module) -> nn.Module:
    return fastlora.accelerate(copy.deepcopy(model), fuse="mlp", verbose=False)


def fusions(model: nn.Module) -> list[Fusion]:
    return fastlora.explain(model).fusions


def joined(model: nn.Module) -> set[tuple[str, ...]]:
    """The layers that `explain` names as fused, in their latest call, too."""
    return {each.layers for each in fusions(model) if each.fused and not each.last_call}


class Nodes:
    """Counts the calls of the joined nodes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        apply = GatedMLPFunction.apply

        def counted(*args: Any) -> Tensor:
            self.count += 1
            return apply(*args)

        monkeypatch.setattr(GatedMLPFunction, "apply", counted)

    def take(self) -> int:
        """The calls since the last time."""
        count, self.count = self.count, 0
        return count


def check(stock: nn.Module, fast: nn.Module, x: Tensor | None = None) -> None:
    x = torch.randn(4, 20) if x is None else x
    got = train_step(fast, x)
    assert_all_close(got, train_step(exact(stock), x), train_step(replaying(stock), x))


def adalora(model: nn.Module, targets: list[str]) -> nn.Module:
    config = AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=targets)
    model = fill_adapters(get_peft_model(model, config)).train()
    for name, parameter in model.named_parameters():
        if "lora_E" in name:  # zero at first, as lora_B is
            parameter.data.normal_()
    return model
