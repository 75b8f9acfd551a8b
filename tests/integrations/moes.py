"""Transformers' mixtures of experts, tiny and with random weights, under LoRA."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import fastlora
from fastlora.integrations.peft.layers import FastParamWrapper
from tests.integrations.models import (
    VOCAB,
    assert_network_close,
    exact,
    fill_adapters,
    last_reasons,
    lora_layers,
    train_step,
)

IDS = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def mixtral() -> nn.Module:
    return MixtralForCausalLM(MixtralConfig(**_small(), num_local_experts=5, num_experts_per_tok=2))


def qwen3_moe() -> nn.Module:
    sizes = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**_small(), **sizes))


def gpt_oss() -> nn.Module:
    sizes = {"num_local_experts": 5, "num_experts_per_tok": 2, "head_dim": 8}
    return GptOssForCausalLM(GptOssConfig(**_small(), **sizes, rope_parameters=ROPE))


ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MODELS = {"Mixtral": mixtral, "Qwen3-MoE": qwen3_moe, "gpt-oss": gpt_oss}
ROUTERS = {"Mixtral": "gate.weight", "Qwen3-MoE": "gate.weight", "gpt-oss": "router.weight"}


def _small() -> dict[str, int]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }


def moe(name: str, implementation: str = "grouped_mm", **options: Any) -> nn.Module:
    """A PEFT model with LoRA on all experts and routers, nothing zero."""
    torch.manual_seed(0)
    model = MODELS[name]()
    model.set_experts_implementation(implementation)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    settings = {
        "r": 3,
        "lora_alpha": 5,
        "target_modules": [],
        "target_parameters": [*EXPERTS, ROUTERS[name]],
        **options,
    }
    return fill_adapters(get_peft_model(model, LoraConfig(**settings)))


def double(model: nn.Module) -> nn.Module:
    """The model in float64, which torch's grouped_mm does not take."""
    model = exact(model)
    base = model.get_base_model()
    if hasattr(base, "set_experts_implementation"):
        base.set_experts_implementation("eager")
    return model


def trio(stock: nn.Module) -> tuple[nn.Module, nn.Module, nn.Module]:
    fast = fastlora.accelerate(copy.deepcopy(stock), verbose=False)
    assert all(type(layer) is FastParamWrapper for layer in lora_layers(fast))
    return fast, double(stock), stock


def compare(stock: nn.Module, step: Callable[[nn.Module], Any], reasons: set[str]) -> nn.Module:
    models = trio(stock)
    assert_network_close(*(step(model) for model in models))
    assert last_reasons(models[0]) == reasons
    return models[0]


def train(model: nn.Module) -> dict[str, Tensor]:
    return train_step(model.train(), IDS)


def evaluate(model: nn.Module) -> dict[str, Tensor]:
    with torch.no_grad():
        return {"logits": model.eval()(input_ids=IDS).logits}
