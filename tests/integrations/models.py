"""Tiny PEFT models, in threes: PEFT's own, the same in float64, and the same on fastlora."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import bitsandbytes
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fastlora.integrations.peft.plan.reasons import LAST_REASON
from fastlora.quant import as_quant_state
from fastlora.reference import dequantize_4bit, dropout_mask, dropout_threshold
from tests.tolerance import assert_close_to_exact

VOCAB = 61


class MLP(nn.Module):
    """Two biased linears with a nonlinearity between them; odd sizes."""

    def __init__(self, K: int = 37, H: int = 53, N: int = 29) -> None:
        super().__init__()
        self.up = nn.Linear(K, H)
        self.down = nn.Linear(H, N)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.nn.functional.silu(self.up(x)))


def llama(tied: bool = False) -> LlamaForCausalLM:
    """A Llama with two decoder layers and 14 linears."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def linear4bit(
    K: int,
    N: int,
    *,
    quant_type: str = "nf4",
    nested: bool = False,
    compute_dtype: torch.dtype | None = torch.float32,
    storage: torch.dtype = torch.uint8,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
) -> bitsandbytes.nn.Linear4bit:
    """bitsandbytes' layer, quantised from random weights in `dtype`; its CPU repacking is off."""
    layer = bitsandbytes.nn.Linear4bit(
        K,
        N,
        bias=bias,
        compute_dtype=compute_dtype,
        compress_statistics=nested,
        quant_type=quant_type,
        quant_storage=storage,
    )
    layer.weight = bitsandbytes.nn.Params4bit(
        torch.randn(N, K).div(K**0.5).to(dtype),
        requires_grad=False,
        compress_statistics=nested,
        quant_type=quant_type,
        quant_storage=storage,
        module=layer,
    )
    layer.support_avx512bf16_for_cpu = False
    return layer.to("cpu")


class MLP4bit(nn.Module):
    """`MLP` with 4-bit weights, marked as Transformers marks a model loaded in 4 bits."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.up = linear4bit(64, 128, **options)  # type: ignore[arg-type]
        self.down = linear4bit(128, 32, **options)  # type: ignore[arg-type]
        self.is_loaded_in_4bit = True

    forward = MLP.forward


def peft_model(model: nn.Module, **options: object) -> nn.Module:
    """`model` with a LoRA adapter on every linear, B not zero."""
    targets = ["up", "down"] if not isinstance(model, LlamaForCausalLM) else "all-linear"
    settings: dict[str, object] = {"r": 3, "lora_alpha": 5, "target_modules": targets, **options}
    return fill_adapters(get_peft_model(model, LoraConfig(**settings)))  # type: ignore[arg-type]


def fill_adapters(model: nn.Module) -> nn.Module:
    """Random values for every lora_B, which PEFT starts at zero."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    return model


def lora_layers(model: nn.Module) -> list[LoraLayer]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


# ---- what a result is compared with ------------------------------------------------------------


class ReplayDropout(nn.Module):
    """Dropout with the masks that fastlora draws from the same state of torch's generator."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return replay_dropout(x, self.p, self.training)


def replay_dropout(x: Tensor, p: float, training: bool = True, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.dropout` with fastlora's masks.

    The scale, too, is that of the rounded p.
    """
    if not training or p == 0.0:
        return x
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64)
    rows = x.reshape(-1, x.shape[-1])
    mask = dropout_mask(rows.shape[0], rows.shape[1], p, seed)
    _, scale = dropout_threshold(p)
    return (torch.where(mask, rows, 0) * scale).view(x.shape)


def replaying(model: nn.Module) -> nn.Module:
    """A copy of a PEFT model whose dropout masks are fastlora's."""
    model = copy.deepcopy(model)
    for layer in lora_layers(model):
        for name, dropout in layer.lora_dropout.items():
            layer.lora_dropout[name] = ReplayDropout(getattr(dropout, "p", 0.0)).train(
                dropout.training
            )
    return model


def exact(model: nn.Module) -> nn.Module:
    """A copy of a PEFT model in float64, 4-bit weights decoded, with fastlora's dropout masks."""
    model = replaying(model)
    for layer in lora_layers(model):
        if isinstance(layer.base_layer, bitsandbytes.nn.Linear4bit):
            layer.base_layer = _decoded(layer.base_layer)
    return model.double()


def _decoded(layer: bitsandbytes.nn.Linear4bit) -> nn.Linear:
    bias = layer.bias
    dense = nn.Linear(layer.in_features, layer.out_features, bias=bias is not None)
    state = as_quant_state(layer.weight.quant_state)
    weight = dequantize_4bit(layer.weight.data, state, torch.float64)
    dense.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        dense.bias = nn.Parameter(bias.detach().double(), requires_grad=bias.requires_grad)
    return dense.train(layer.training)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


Results = Mapping[str, Tensor]


def assert_all_close(fast: Results, exact: Results, stock: Results) -> None:
    """`assert_close_to_exact` for every entry; names, shapes and dtypes are PEFT's."""
    __tracebackhide__ = True
    _assert_alike(fast, exact, stock)
    for name, out in fast.items():
        assert_close_to_exact(out, exact[name], stock[name], what=name)


def assert_network_close(fast: Results, exact: Results, stock: Results) -> None:
    """`assert_close_to_exact` over all entries at once, each divided by its largest exact value.

    In a network, the rounding of one layer passes through all others, so that the largest error of
    one small tensor is a matter of luck, on both sides. That of all tensors together is not.
    """
    __tracebackhide__ = True
    _assert_alike(fast, exact, stock)
    scales = {name: t.abs().max().clamp(min=1e-30) for name, t in exact.items()}
    out, reference, base = (
        torch.cat([(t.double() / scales[name]).flatten() for name, t in results.items()])
        for results in (fast, exact, stock)
    )
    widest = max((t.dtype for t in fast.values()), key=lambda dtype: torch.finfo(dtype).eps)
    assert_close_to_exact(out.to(widest), reference, base, what="network")


def _assert_alike(fast: Results, exact: Results, stock: Results) -> None:
    __tracebackhide__ = True
    assert fast.keys() == stock.keys() == exact.keys()
    for name, out in fast.items():
        assert out.shape == stock[name].shape, name
        # bitsandbytes' forward rounds an fp32 bias to compute_dtype for good; fastlora leaves it.
        assert out.dtype == stock[name].dtype or name.endswith("base_layer.bias"), name
        assert stock[name].any(), f"{name} is zero: the comparison would show nothing"


def train_step(model: nn.Module, inputs: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """One forward and backward: the output (a language model's logits), and every gradient."""
    torch.manual_seed(seed)
    model.zero_grad()
    if inputs.is_floating_point():
        first = next(p for p in model.parameters() if p.requires_grad)
        dtype = torch.float64 if first.dtype == torch.float64 else inputs.dtype
        x = inputs.detach().to(dtype).requires_grad_()
        y = model(x)
        weights = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape)
        (y * weights.to(y.dtype)).sum().backward()
        assert x.grad is not None
        return {"y": y.detach(), "dx": x.grad, **gradients(model)}
    out = model(input_ids=inputs, labels=inputs)
    out.loss.backward()
    return {"logits": out.logits.detach(), **gradients(model)}


def last_reasons(model: nn.Module) -> set[str | None]:
    """Why the latest call of each LoRA layer ran PEFT's code: {""} when all ran on fastlora."""
    return {layer.__dict__.get(LAST_REASON) for layer in lora_layers(model)}
