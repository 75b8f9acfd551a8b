"""PEFT's layer beside the one of `fastlora.nn`: both built, run and compared."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastlora import reference
from fastlora.layer import Layer, Needs
from tests.tolerance import assert_close_to_exact

peft = pytest.importorskip("peft", reason="PEFT, the measure of these layers, is not installed")
bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

N, K, R = 72, 128, 8  # bitsandbytes' AVX-512 decoder needs K to be a multiple of the blocksize

# dtype of the base and x, dtype of the adapters
DTYPES = [
    pytest.param(torch.float32, torch.float32, id="fp32"),
    pytest.param(torch.bfloat16, torch.float32, id="bf16-fp32"),
    pytest.param(torch.bfloat16, torch.bfloat16, id="bf16"),
    pytest.param(torch.float16, torch.float32, id="fp16-fp32"),
    pytest.param(torch.float16, torch.float16, id="fp16"),
]
NESTED = pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])


class Net(nn.Module):
    """The smallest model that PEFT wraps: one linear layer."""

    def __init__(self, lin: nn.Module) -> None:
        super().__init__()
        self.lin = lin


def peft_layer(
    base: nn.Module, adapter_dtype: torch.dtype = torch.float32, **options: Any
) -> nn.Module:
    """PEFT's own layer around `base`, as get_peft_model builds it."""
    config = peft.LoraConfig(target_modules=["lin"], **options)
    net = Net(base)
    net.is_loaded_in_4bit = isinstance(base, bnb.nn.Linear4bit)
    model = peft.get_peft_model(net, config)
    layer = model.base_model.model.lin
    for adapters in (layer.lora_A, layer.lora_B):
        adapters.to(adapter_dtype)
    return layer


def linear4bit(
    dense: nn.Linear,
    nested: bool = False,
    quant_type: str = "nf4",
    storage: torch.dtype = torch.uint8,
) -> Any:
    """bitsandbytes' layer with the weight of `dense`, its in-place repacking switched off."""
    layer = bnb.nn.Linear4bit(
        dense.in_features,
        dense.out_features,
        bias=dense.bias is not None,
        compress_statistics=nested,
        quant_type=quant_type,
        quant_storage=storage,
    )
    weight = dense.weight.detach().clone()
    layer.weight = bnb.nn.Params4bit(
        weight,
        requires_grad=False,
        compress_statistics=nested,
        quant_type=quant_type,
        quant_storage=storage,
        module=layer,
    )
    if dense.bias is not None:
        layer.bias = nn.Parameter(dense.bias.detach().clone())
    layer = layer.to("cpu")
    layer.support_avx512bf16_for_cpu = False
    return layer


def fill_B(layer: Any) -> None:
    """PEFT starts with B = 0, where the LoRA term and dA vanish and nothing would be tested."""
    B = layer.lora_B["default"].weight
    with torch.no_grad():
        B.copy_(torch.randn(B.shape) / math.sqrt(B.shape[1]))


def copy_adapters(source: Any, target: Any) -> None:
    with torch.no_grad():
        for name in ("lora_A", "lora_B"):
            getattr(target, name)["default"].weight.copy_(getattr(source, name)["default"].weight)


class Replay(nn.Module):
    """Dropout for PEFT's layer with the mask that ours draws."""

    def __init__(self, p: float, seed: Tensor) -> None:
        super().__init__()
        self.p, self.dropout_seed = p, seed

    def forward(self, x: Tensor) -> Tensor:
        mask = reference.dropout_mask(
            x.numel() // x.shape[-1], x.shape[-1], self.p, self.dropout_seed
        )
        return x * mask.view(x.shape) * reference.dropout_threshold(self.p)[1]


def run(
    forward: Callable[[Tensor], Tensor], layer: Any, x: Tensor, dy: Tensor
) -> dict[str, Tensor | None]:
    x = x.detach().clone().requires_grad_()
    y = forward(x)
    y.backward(dy)
    bias = layer.base_layer.bias
    result = {
        "y": y.detach(),
        "dx": x.grad,
        "dA": layer.lora_A["default"].weight.grad,
        "dB": layer.lora_B["default"].weight.grad,
        "dbias": None if bias is None else bias.grad,
    }
    layer.zero_grad()
    return result


def exact_results(
    layer: Any, weight: Tensor, x: Tensor, dy: Tensor, p: float = 0.0, seed: Tensor | None = None
) -> dict[str, Tensor | None]:
    """Results in float64 for the same rounded inputs, `weight` dense."""
    A = layer.lora_A["default"].weight.detach().double()
    B = layer.lora_B["default"].weight.detach().double()
    bias = layer.base_layer.bias
    x2, dy2 = x.double().reshape(-1, x.shape[-1]), dy.double().reshape(-1, dy.shape[-1])
    bias64 = None if bias is None else bias.detach().double()
    wide = Layer(weight.double(), A, B, layer.scaling, bias64, dropout_p=p, seed=seed)
    y, S = reference.lora_linear_fwd(x2, wide)
    needs = Needs(bias=bias is not None and bias.requires_grad)
    dx, dA, dB, dbias = reference.lora_linear_bwd(dy2, x2, wide, S, needs)
    assert dx is not None
    return {
        "y": y.view(dy.shape),
        "dx": dx.view(x.shape),
        "dA": dA,
        "dB": dB,
        "dbias": dbias,
    }


def assert_results(
    ours: dict[str, Tensor | None],
    exact: dict[str, Tensor | None],
    theirs: dict[str, Tensor | None],
) -> None:
    for name, value in ours.items():
        base, true = theirs[name], exact[name]
        if true is None:
            assert value is None and base is None, name
            continue
        assert value is not None and base is not None, name
        assert value.dtype == base.dtype and value.shape == base.shape, name
        assert value.abs().max() > 0, name
        assert_close_to_exact(value, true, base, what=name)
