"""LoRA on parameters (`target_parameters`) of Transformers' models, against PEFT's code.

Experts and routers, in Transformers' three ways of calling experts.
"""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

import fastlora
from fastlora.integrations.peft import fast_path
from fastlora.integrations.peft.layers import FastParamWrapper
from fastlora.integrations.peft.plan.parameter import param_parts
from tests.integrations.conftest import BACKENDS
from tests.integrations.models import (
    assert_network_close,
    last_reasons,
    lora_layers,
)
from tests.integrations.moes import (
    EXPERTS,
    MODELS,
    ROUTERS,
    compare,
    double,
    evaluate,
    moe,
    train,
    trio,
)

# ---- Transformers' models ------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_training_and_evaluation(name: str, implementation: str, backend: str) -> None:
    stock = moe(name, implementation)
    fast = compare(stock, train, {""})
    compare(stock, evaluate, {""})
    assert len(lora_layers(fast)) == 6
    rows = fastlora.explain(fast).rows
    assert {row.reason or row.last_call for row in rows} == {""}
    assert {row.base for row in rows} == {"fp32", "fp32 x 5 experts"}
    assert {row.kernel.split(" ")[0] for row in rows} == {"lora_linear", "grouped_lora_linear"}
    assert all(row.fast and row.r == 3 for row in rows)


@pytest.mark.parametrize("name", MODELS)
def test_bf16_experts_with_fp32_adapters(name: str) -> None:
    """As PEFT makes them of a model loaded in bf16; PEFT rounds W + BA, fastlora does not."""
    torch.manual_seed(0)
    stock = moe(name)
    for layer in lora_layers(stock):
        layer.get_base_layer().to(torch.bfloat16)
    stock = stock.to(torch.bfloat16)
    for parameter_name, parameter in stock.named_parameters():
        if "lora_" in parameter_name:
            parameter.data = parameter.data.float()
    fast = compare(stock, train, {""})
    assert {row.adapter for row in fastlora.explain(fast).rows} == {"fp32"}


@pytest.mark.parametrize("name", MODELS)
def test_gradient_checkpointing(name: str) -> None:
    fast, _, _ = trio(moe(name))
    expected = train(fast)
    fast.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    fast.enable_input_require_grads()
    for key, value in train(fast).items():
        torch.testing.assert_close(value, expected[key])
    assert last_reasons(fast) == {""}


@pytest.mark.parametrize("name", MODELS)
def test_merged_unmerged_disabled(name: str) -> None:
    merged = "the adapter is merged into the base weight"

    def merge(model: nn.Module) -> dict[str, Tensor]:
        model.merge_adapter()
        return evaluate(model)

    def unmerge(model: nn.Module) -> dict[str, Tensor]:
        model.merge_adapter()
        model.unmerge_adapter()
        return train(model)

    def disable(model: nn.Module) -> dict[str, Tensor]:
        with model.disable_adapter():
            return evaluate(model)

    compare(moe(name), merge, {merged})
    compare(moe(name), unmerge, {""})
    compare(moe(name), disable, {"the adapters are disabled"})
    fast, _, stock = trio(moe(name))
    plain = fast.merge_and_unload()
    assert not lora_layers(plain)
    want = stock.merge_and_unload().state_dict()
    assert all(torch.equal(value, want[key]) for key, value in plain.state_dict().items())


@pytest.mark.parametrize("name", ["Mixtral", "gpt-oss"])
def test_two_adapters(name: str) -> None:
    """PEFT adds two deltas to the weight; fastlora stacks them into one of the summed rank."""

    def both(model: nn.Module) -> dict[str, Tensor]:
        targets = [*EXPERTS, ROUTERS[name]]
        config = LoraConfig(r=2, lora_alpha=7, target_modules=[], target_parameters=targets)
        model.add_adapter("other", config)
        generator = torch.Generator().manual_seed(4)
        for key, parameter in model.named_parameters():
            if ".other." in key:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        model.base_model.set_adapter(["default", "other"])
        return train(model)

    compare(moe(name), both, {""})


@pytest.mark.parametrize("options", [{"use_rslora": True}, {"bias": "all"}])
def test_options(options: dict[str, Any]) -> None:
    compare(moe("Mixtral", **options), train, {""})


@pytest.mark.parametrize("targets", [["experts.down_proj"], ["gate.weight"]])
def test_some_parameters(targets: list[str]) -> None:
    compare(moe("Qwen3-MoE", target_parameters=targets), train, {""})


def test_next_to_linear_layers() -> None:
    stock = moe("Mixtral", target_modules=["q_proj", "v_proj"])
    fast = fastlora.accelerate(copy.deepcopy(stock), verbose=False)
    assert_network_close(*(train(model) for model in (fast, double(stock), stock)))
    assert last_reasons(fast) == {""}
    assert fastlora.explain(fast).summary().count("10/10 LoRA layers accelerated") == 1


@pytest.mark.parametrize("name", MODELS)
def test_a_weight_for_each_token(name: str) -> None:
    """Transformers' batched_mm, which it takes for decoding on GPUs."""
    compare(moe(name, "batched_mm"), train, {""})
    compare(moe(name, "batched_mm"), evaluate, {""})


def test_autocast() -> None:
    """Autocast narrows fp32 weights at each call: they are built, and cast as in PEFT's code."""

    def step(model: nn.Module) -> dict[str, Tensor]:
        if next(model.parameters()).dtype == torch.float64:
            return train(model)
        with torch.autocast("cpu", torch.bfloat16):
            return train(model)

    fast, *others = trio(moe("Mixtral", "eager"))
    results = [step(model) for model in (fast, *others)]
    assert_network_close(*results)
    assert all(reason and "was built" in reason for reason in last_reasons(fast))
    narrow = fastlora.accelerate(moe("Mixtral", "eager"), verbose=False)
    for layer in lora_layers(narrow):
        layer.get_base_layer().to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        train(narrow)
    assert last_reasons(narrow) == {""}


# ---- ways in and out -----------------------------------------------------------------------------


def test_accelerate_and_restore_leave_everything_in_place(tmp_path: Path) -> None:
    stock = moe("gpt-oss")
    names = [name for name, _ in stock.named_parameters()]
    state = stock.state_dict()
    fast = fastlora.accelerate(copy.deepcopy(stock), verbose=False)
    train(fast)
    assert [name for name, _ in fast.named_parameters()] == names
    assert all(torch.equal(value, state[key]) for key, value in fast.state_dict().items())
    assert repr(fast) == repr(stock)
    assert pickle.loads(pickle.dumps(FastParamWrapper)) is FastParamWrapper
    for layer in lora_layers(fast):
        assert layer.parameter_name not in layer.get_base_layer().__dict__
    fast.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(stock.get_base_model().__class__(stock.config), tmp_path)
    loaded = {key: value for key, value in again.state_dict().items() if "lora_" in key}
    assert loaded and all(torch.equal(value, state[key]) for key, value in loaded.items())
    fastlora.restore(fast)
    assert all(type(layer) is ParamWrapper for layer in lora_layers(fast))
    want = train(stock)
    assert all(torch.equal(value, want[key]) for key, value in train(fast).items())


def test_the_parameter_is_back_after_an_error() -> None:
    fast = fastlora.accelerate(moe("Mixtral"), verbose=False)
    layer = next(layer for layer in lora_layers(fast) if layer.num_experts > 1)
    with pytest.raises(TypeError):
        layer(torch.randn(3, 32))  # without the router's choice
    owner = layer.get_base_layer()
    assert type(getattr(owner, layer.parameter_name)) is nn.Parameter


def test_patch_peft() -> None:
    fastlora.patch_peft()
    try:
        model = moe("Mixtral")
    finally:
        fastlora.unpatch_peft()
    assert all(type(layer) is FastParamWrapper for layer in lora_layers(model))


def test_register_serves_linear_weights() -> None:
    config = LoraConfig(r=2, target_modules=[], target_parameters=["0.weight"])
    model = get_peft_model(nn.Sequential(nn.Linear(8, 6)), fastlora.register(config))
    assert [type(layer) for layer in lora_layers(model)] == [FastParamWrapper]


def test_conditions() -> None:
    model = fastlora.accelerate(moe("Mixtral"), verbose=False)
    layer: Any = next(layer for layer in lora_layers(model) if layer.num_experts > 1)
    owner, name = layer.get_base_layer(), layer.parameter_name

    x = torch.randn(3, 32)

    def reason() -> str:
        found = param_parts(layer)
        assert isinstance(found, str)
        assert fast_path(layer, x) == (False, found)
        return found

    assert fast_path(layer, x) == (True, "")
    weight = owner._parameters[name]
    weight.requires_grad_()
    assert "is being trained" in reason()
    weight.requires_grad_(False)
    owner._parameters[name] = nn.Parameter(weight.double(), requires_grad=False)
    assert reason() == f"the parameter {name} is in float64; fastlora takes fp32, bf16 and fp16"
    owner._parameters[name] = nn.Parameter(weight[:, :5].clone(), requires_grad=False)
    assert reason() == f"lora_A or lora_B does not fit the parameter {name} (sharded?)"
    owner._parameters[name] = nn.Parameter(weight.to("meta"), requires_grad=False)
    assert "is on the meta device" in reason()
    owner._parameters[name] = weight
    nn.utils.parametrize.register_parametrization(owner, name, nn.Identity())
    assert reason() == f"{name} is no parameter of its module (parametrised or pruned)"
    nn.utils.parametrize.remove_parametrizations(owner, name)
    owner._parameters[name].requires_grad_(False)
    layer.scaling["default"] = torch.tensor(1.0)
    assert reason() == "scaling is a Tensor, not a number"
    layer.scaling["default"] = 1.0
    with pytest.raises(ValueError, match="does not support mixed adapter batches"):
        layer(torch.randn(3, 32), adapter_names=["default"] * 3)
    layer.lora_A["default"].double()
    assert reason() == "the lora_A is in float64; fastlora takes fp32, bf16 and fp16"
    layer.lora_A["default"].float()
    layer.set_adapter([])
    assert reason() == "no adapters are active on this layer"


@pytest.mark.parametrize("trained", EXPERTS)
def test_one_wrapper_on_pefts_code_and_one_not(trained: str) -> None:
    """The nested wrappers of one module do not disturb each other."""
    stock = moe("Mixtral")
    for name, parameter in stock.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or name.endswith(trained.split(".")[1]))
    fast, *others = trio(stock)
    assert_network_close(*(train(model) for model in (fast, *others)))
    reasons = last_reasons(fast)
    assert "" in reasons and len(reasons) == 2
    assert any(reason and "is being trained" in reason for reason in reasons)
