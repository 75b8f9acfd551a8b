"""Models that change the input of a layer in place: the layer is named, and can have a copy."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import fastlora
from fastlora.integrations.peft.explanation import explain
from tests.integrations.models import fill_adapters


class Block(nn.Module):
    """`h += f(h)`, where f is a layer whose backward needs h."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8, dtype=dtype)
        self.inner = nn.Linear(8, 8, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.first(x)
        h += self.inner(h)
        return h


def adapted(dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["first", "inner"], **options)
    model = fill_adapters(get_peft_model(nn.ModuleDict({"block": Block(dtype)}), config))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return model


def run(model: Any, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    torch.manual_seed(1)
    x = torch.randn(5, 8, dtype=dtype, requires_grad=True)
    y = model.base_model.model["block"](x)
    y.float().square().sum().backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return [y.detach(), x.grad, *grads]


@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.5}], ids=["fp32 adapters", "dropout"])
def test_a_copy_for_the_layer_named(options: dict[str, Any]) -> None:
    model = adapted(**options)
    stock = copy.deepcopy(model)
    fastlora.accelerate(model)
    with pytest.raises(RuntimeError, match=r"the backward of layer block\.inner needs"):
        run(model)
    fastlora.accelerate(model, copy_inputs=["inner"])
    assert explain(model).summary().startswith("fastlora") and "2/2" in explain(model).summary()
    got = run(model)
    if not options:
        for one, other in zip(got, run(stock), strict=True):
            torch.testing.assert_close(one, other, rtol=0.05, atol=0.05)
    # Full names, again, and not any more.
    fastlora.accelerate(model, copy_inputs=["block.inner"])
    fastlora.accelerate(model, copy_inputs=["block.inner"])
    assert len(model.base_model.model["block"].inner._forward_pre_hooks) == 1
    assert all(torch.equal(a, b) for a, b in zip(got, run(model), strict=True))
    fastlora.accelerate(model)  # leaves it so
    assert len(model.base_model.model["block"].inner._forward_pre_hooks) == 1
    fastlora.accelerate(model, copy_inputs=[])
    with pytest.raises(RuntimeError, match=r"accelerate\(model, copy_inputs=\['block.inner'\]\)"):
        run(model)


def test_restore_takes_the_copies_away() -> None:
    model = adapted()
    fastlora.restore(fastlora.accelerate(model, copy_inputs=["inner"]))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_adapters_that_were_cast_are_named_too() -> None:
    model = fastlora.accelerate(adapted(torch.float32))
    with (
        pytest.raises(RuntimeError, match=r"layer block\.inner needs a tensor that was changed"),
        torch.autocast("cpu", torch.bfloat16),
    ):
        run(model, torch.float32)


def test_a_function_names_no_layer() -> None:
    A, B = torch.randn(2, 8, requires_grad=True), torch.randn(8, 2, requires_grad=True)
    x = torch.randn(3, 8, requires_grad=True) * 1
    y = fastlora.lora_linear(x, torch.randn(8, 8), None, A, B, 1.0)
    x.add_(1)
    with pytest.raises(RuntimeError, match="the backward of a LoRA layer needs a tensor that"):
        y.sum().backward()


@pytest.mark.parametrize("names", [["up"], ["inner", "nner"], "inner"])
def test_names_of_no_layer(names: Any) -> None:
    model = adapted()
    with pytest.raises(ValueError, match="copy_inputs"):
        fastlora.accelerate(model, copy_inputs=names)
    assert "0/2" in explain(model).summary()


def test_an_input_by_keyword() -> None:
    model: Any = fastlora.accelerate(adapted(), copy_inputs=["base_model.model.block.inner"])
    inner, h = model.base_model.model["block"].inner, torch.randn(2, 8).bfloat16()
    assert torch.equal(inner(x=h), inner(h))
