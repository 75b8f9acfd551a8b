"""What fastlora leaves to PEFT's own merge, and what it refuses with nothing changed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from peft import IA3Config, LNTuningConfig, LoKrConfig, LoraConfig, get_peft_model
from torch import Tensor, nn

import fastlora
from tests.integrations.merging import (
    merged_by_peft,
)
from tests.integrations.models import (
    MLP,
    MLP4bit,
    lora_layers,
    peft_model,
)
from tests.integrations.peft_case import IDS, Net
from tests.integrations.peft_table import CASES

pytestmark = pytest.mark.filterwarnings("ignore")


# ---- what PEFT's own code merges ----------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.linear = nn.MultiheadAttention(16, 2), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.attention(x, x, x)[0])


class EightBit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        linear = bitsandbytes.nn.Linear8bitLt(64, 32, has_fp16_weights=False)
        linear.weight = bitsandbytes.nn.Int8Params(
            torch.randn(32, 64) / 8, requires_grad=False, has_fp16_weights=False
        )
        self.linear, self.is_loaded_in_8bit = linear.to("cpu"), True

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


OTHERS: dict[str, tuple[Any, Any, Any]] = {
    "MultiheadAttention": (
        Attention,
        LoraConfig(r=3, target_modules=["attention", "linear"]),
        torch.randn(5, 3, 16),
    ),
    "8-bit": (EightBit, LoraConfig(r=3, target_modules=["linear"]), torch.randn(4, 64)),
    "trainable tokens": (
        Net,
        LoraConfig(r=3, target_modules=["up"], trainable_token_indices={"embed": [1, 2]}),
        IDS,
    ),
    "IA3": (Net, IA3Config(target_modules=["up"], feedforward_modules=[]), IDS),
    "LoKr": (Net, LoKrConfig(r=3, target_modules=["up", "down"]), IDS),
    "LNTuning": (Net, LNTuningConfig(target_modules=["up"]), IDS),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_layers_are_merged_by_peft(name: str) -> None:
    make, config, x = OTHERS[name]
    torch.manual_seed(0)
    model = get_peft_model(make(), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.eval()
    with torch.no_grad():
        before = model(x)
        peft = merged_by_peft(copy.deepcopy(model))(x)
        rows = fastlora.merge_adapter(model).rows
        torch.testing.assert_close(model(x), peft, atol=1e-6, rtol=1e-5)
        # Layers of LoRA in the same model are merged and measured as ever.
        assert any(row.error is None for row in rows)
        fastlora.unmerge_adapter(model)
        torch.testing.assert_close(model(x), before, atol=0.05 if name == "8-bit" else 1e-5, rtol=0)


# ---- what is refused, with nothing changed ------------------------------------------------------


def no_bias(model: Any) -> Any:
    model.base_model.model.down.base_layer.bias = None
    return model


def broken(model: Any) -> Any:
    lora_layers(model)[-1].lora_B["default"].weight.data[0, 0] = float("nan")
    return model


def merged_already(model: Any) -> Any:
    fastlora.merge_adapter(model)
    return model


def alora() -> Any:
    return CASES["aLoRA"].trio()[2]


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "into": (lambda: peft_model(MLP()), {"into": "8bit"}, "into must be one of"),
    "no layers": (lambda: MLP(), {}, "model must have PEFT's layers"),
    "unknown adapter": (
        lambda: peft_model(MLP()),
        {"adapter_names": ["default", "x"]},
        "no layer has x",
    ),
    "merged": (lambda: merged_already(peft_model(MLP())), {}, "merged already"),
    "lora_bias": (lambda: no_bias(peft_model(MLP(), lora_bias=True)), {}, "lora_bias needs a bias"),
    "NaN": (lambda: broken(peft_model(MLP())), {}, "must be finite"),
    "aLoRA": (alora, {}, "aLoRA does not support merging"),
    "base without it": (
        lambda: peft_model(MLP4bit()),
        {"base": {"up.weight": torch.ones(128, 64)}},
        "one weight for layer down, got none",
    ),
    "base of another shape": (
        lambda: peft_model(MLP4bit()),
        {"base": {"up.weight": torch.ones(128, 64), "down.weight": torch.ones(31, 128)}},
        r"down.weight must be a weight in 16 bits or more of shape \(32, 128\)",
    ),
    "base in 4 bits": (
        lambda: peft_model(MLP4bit()),
        {"base": {k: torch.ones(n, dtype=torch.uint8) for k, n in (("up.weight", 1),)}},
        "in 16 bits or more",
    ),
    "base in 8 bits": (
        lambda: peft_model(MLP4bit()),
        {"base": {"up.weight": torch.ones(128, 64, dtype=torch.float8_e4m3fn)}},
        "in 16 bits or more",
    ),
    "folder without files": (
        lambda: peft_model(MLP4bit()),
        {"base": Path(__file__).parent},
        "safetensors files",
    ),
    "moments": (
        lambda: peft_model(MLP4bit()),
        {"moments": {"base_model.model.down": torch.eye(3)}},
        r"must be \[128, 128\]",
    ),
    "moments and dense": (
        lambda: peft_model(MLP4bit()),
        {"moments": {}, "into": "dense"},
        "moments must be None",
    ),
    "moments and base": (
        lambda: peft_model(MLP4bit()),
        {"moments": {}, "base": MLP(64, 128, 32)},
        "moments must be None with base",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_nothing_changed(name: str) -> None:
    make, arguments, message = REFUSED[name]
    model = make()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    merged = [list(layer.merged_adapters) for layer in lora_layers(model)]
    with pytest.raises(ValueError, match=message):
        fastlora.merge_adapter(model, **arguments)
    after = model.state_dict()
    assert all(torch.equal(after[k].nan_to_num(7), v.nan_to_num(7)) for k, v in before.items())
    assert [list(layer.merged_adapters) for layer in lora_layers(model)] == merged


def test_wrong_types() -> None:
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got int"):
        fastlora.merge_adapter(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got int"):
        fastlora.unmerge_adapter(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="adapter_names must be a list"):
        fastlora.merge_adapter(peft_model(MLP()), "default")
    with pytest.raises(TypeError, match="base must be a model, a state dict or a folder"):
        fastlora.merge_adapter(peft_model(MLP4bit()), base=3)  # type: ignore[arg-type]


def test_an_error_half_way_names_the_layer_and_keeps_its_state() -> None:
    """fp16 overflows where the adapters alone are finite."""
    model = peft_model(MLP4bit())
    layer = lora_layers(model)[0]
    layer.lora_B["default"].weight.data.fill_(3e38)
    layer.lora_A["default"].weight.data.fill_(3e38)
    with pytest.raises(ValueError, match=r"model\.up: the weight is not finite in torch\.float32"):
        fastlora.merge_adapter(model, compare=False)
    assert not any(layer.merged for layer in lora_layers(model))


@pytest.mark.parametrize("what", ["weight", "bias", "dense"])
def test_what_fp16_can_not_hold(what: str) -> None:
    """A sum of 70,000 in fp32, which fp16 rounds to infinity."""
    torch.manual_seed(0)
    if what == "dense":
        model = peft_model(MLP4bit())
    else:
        model = peft_model(MLP(), lora_bias=what == "bias").to(torch.float16)
    layer: Any = lora_layers(model)[0]
    with torch.no_grad():
        if what == "bias":
            layer.base_layer.bias.fill_(60000.0)
            layer.lora_B["default"].bias.fill_(10000.0)
        else:
            layer.lora_A["default"].weight.fill_(150.0)
            layer.lora_B["default"].weight.fill_(160.0)
        before = {name: t.clone() for name, t in model.state_dict().items()}
    named = "bias" if what == "bias" else "weight"
    with pytest.raises(
        ValueError, match=rf"the {named} is not finite in torch\.float16 after merge"
    ):
        fastlora.merge_adapter(model, into="dense", dtype=torch.float16, compare=False)
    assert not any(layer.merged for layer in lora_layers(model))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
