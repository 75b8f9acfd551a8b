"""The baselines: PEFT's and bitsandbytes' own modules, and plain torch. No copy of their code."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .case import SCALING
from .inputs import Built, Setup, no_modes


def base_module(setup: Setup, index: int, repack: bool = False) -> nn.Module:
    """The frozen layer: nn.Linear, or bitsandbytes' Linear4bit on the same bytes.

    Args:
        repack: lets bitsandbytes rewrite the weight in eval mode, as it does by default. It then
            gets bytes of its own. In training this drops gradients, so it is off elsewhere.
    """
    layer = setup.layer
    weight, state = setup.weights[index]
    if state is None:
        module = nn.Linear(layer.K, layer.N, bias=False, device="meta")
        module.weight = nn.Parameter(weight, requires_grad=False)
        return module
    from bitsandbytes.nn import Linear4bit, Params4bit

    if repack:
        weight, state = weight.clone(), copy.deepcopy(state)
    module = Linear4bit(layer.K, layer.N, bias=False, compute_dtype=setup.dtype, device="meta")
    module.weight = Params4bit.from_prequantized(
        weight, state.as_dict(), device=weight.device, module=module
    )
    if not repack:
        module.support_avx512bf16_for_cpu = False
    return module


class _OneLayer(nn.Module):
    """What PEFT puts its adapter into."""

    def __init__(self, linear: nn.Module, quantized: bool) -> None:
        super().__init__()
        self.linear = linear
        self.is_loaded_in_4bit = quantized


def peft_layer(setup: Setup, index: int, dtype: torch.dtype, repack: bool = False) -> nn.Module:
    """PEFT's layer around the frozen one, with the Setup's adapter in `dtype`."""
    from peft import LoraConfig, get_peft_model

    layer = setup.layer
    model = _OneLayer(base_module(setup, index, repack), layer.quant != "none")
    config = LoraConfig(
        r=layer.R,
        lora_alpha=SCALING * layer.R,
        lora_dropout=layer.dropout,
        target_modules=["linear"],
    )
    get_peft_model(model, config)
    tuned: Any = model.linear
    for own, given in ((tuned.lora_A, setup.lora_A), (tuned.lora_B, setup.lora_B)):
        own["default"].weight.data = given.to(dtype, copy=True)
    return tuned


def built(module: nn.Module) -> Built:
    """A module as what is timed; its adapter is what trains in it."""
    adapter = tuple(p for p in module.parameters() if p.requires_grad)
    return Built(module, adapter, module.train)


def frozen(setup: Setup, index: int) -> Built:
    return built(base_module(setup, index))


def frozen_dense(setup: Setup, index: int) -> Built:
    weight = setup.dense[index % len(setup.dense)]
    return Built(lambda x: linear(x, weight), (), no_modes)


def peft(setup: Setup, index: int) -> Built:
    return built(peft_layer(setup, index, torch.float32))


def peft_cast(setup: Setup, index: int) -> Built:
    return built(peft_layer(setup, index, setup.dtype))


def bnb_packed(setup: Setup, index: int) -> Built:
    return built(peft_layer(setup, index, torch.float32, repack=True))


def compile(setup: Setup, index: int) -> Built:
    # Timing the backward alone runs it more than once on the same graph.
    torch._functorch.config.donated_buffer = False
    # What was compiled for other sizes counts against a limit, above which torch gives up.
    torch._dynamo.reset()
    module = peft_layer(setup, index, torch.float32)
    compiled = torch.compile(module, dynamic=False)
    return Built(compiled, tuple(p for p in module.parameters() if p.requires_grad), module.train)


def addmm(setup: Setup, index: int) -> Built:
    base = base_module(setup, index)
    A, B = setup.adapter(setup.dtype)
    dropout = nn.Dropout(setup.layer.dropout)

    def call(x: Tensor) -> Tensor:
        return torch.addmm(base(x), dropout(x) @ A.T, B.T, alpha=SCALING)

    def train(training: bool) -> None:
        base.train(training)
        dropout.train(training)

    return Built(call, (A, B), train)


def bitsandbytes_dequantize(setup: Setup, index: int) -> Built:
    from bitsandbytes.functional import dequantize_4bit

    weight: Any = base_module(setup, index).weight
    return Built(lambda x: dequantize_4bit(weight.data, weight.quant_state), (), no_modes)


def read(setup: Setup, index: int) -> Built:
    """Reads as many bytes as the weight has, and nothing else: the memory's limit."""
    buffer = torch.ones(setup.layer.weight_bytes // 4, device=setup.device)
    return Built(lambda x: buffer.sum(), (), no_modes)


def write(setup: Setup, index: int) -> Built:
    """Writes as many bytes as the dense weight has, and nothing else."""
    out = setup.output
    return Built(lambda x: out.zero_(), (), no_modes)
