"""The baselines: PEFT's and bitsandbytes' own modules, and plain torch. No copy of their code."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .case import SCALING
from .inputs import Built, Setup, no_modes


def base_module(setup: Setup, index: int, repack: bool = False) -> nn.Module:
    """The frozen layer: nn.Linear, or bitsandbytes' Linear4bit on the same bytes.

    Args:
        repack: let bitsandbytes rewrite a copy of the weight in eval mode, as it does by default.
            This drops gradients in training, so it is off elsewhere.
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
    """A model of one layer, for PEFT's adapter."""

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
    """Wraps a module; its trainable parameters are its adapter."""
    adapter = tuple(p for p in module.parameters() if p.requires_grad)
    return Built(module, adapter, module.train)


def frozen(setup: Setup, index: int) -> Built:
    return built(base_module(setup, index))


def frozen_dense(setup: Setup, index: int) -> Built:
    weight = setup.dense[index % len(setup.dense)]
    return Built(lambda x: linear(x, weight), (), no_modes)


def peft(cast: bool = False, repack: bool = False) -> Callable[[Setup, int], Built]:
    """PEFT's layer, its adapter in x's dtype if `cast`; `repack` as in `base_module`."""

    def build(setup: Setup, index: int) -> Built:
        dtype = setup.dtype if cast else torch.float32
        return built(peft_layer(setup, index, dtype, repack))

    return build


def compile(setup: Setup, index: int) -> Built:
    # "backward" mode runs the same graph's backward more than once.
    torch._functorch.config.donated_buffer = False
    # Earlier compilations count towards a limit above which torch gives up.
    torch._dynamo.reset()
    module = peft_layer(setup, index, torch.float32)
    compiled = torch.compile(module, dynamic=False)
    return replace(built(module), call=compiled)


def addmm(setup: Setup, index: int) -> Built:
    base = base_module(setup, index)
    A, B = setup.adapter(setup.layer.dtype)
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
