"""Saving, copying, loading and compiling PEFT models on fastlora, as PEFT's own."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora.layer import Linear
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor, nn

import fastlora
from fastlora.integrations.peft import FastLoraLinear
from tests.integrations.models import (
    MLP,
    fill_adapters,
    gradients,
    last_reasons,
    lora_layers,
    train_step,
)
from tests.integrations.trios import FAST, IDS, add, logits, plug, trio

# ---- saving, copying, loading ------------------------------------------------------------------


def assert_same_forward(left: nn.Module, right: nn.Module) -> None:
    assert torch.equal(logits(left.eval()), logits(right.eval()))


def test_state_dict_is_peft_s(way: str, base: nn.Module) -> None:
    models = trio(way, base, modules_to_save=["lm_head"], target_modules=["q_proj", "down_proj"])
    for read in (nn.Module.state_dict, get_peft_model_state_dict):
        ours, theirs = read(models.fast), read(models.stock)
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    ours = [(n, p.requires_grad) for n, p in models.fast.named_parameters()]
    assert ours == [(n, p.requires_grad) for n, p in models.stock.named_parameters()]


def test_saved_adapter_loads_in_plain_peft(way: str, base: nn.Module, tmp_path: Path) -> None:
    models = trio(way, base, modules_to_save=["lm_head"], target_modules=["q_proj", "down_proj"])
    train_step(models.fast.train(), IDS)
    with torch.no_grad():
        for parameter in models.fast.parameters():
            if parameter.requires_grad:
                parameter -= 0.1 * parameter.grad
    models.fast.save_pretrained(tmp_path / "fast")
    models.stock.save_pretrained(tmp_path / "stock")
    configs = [
        json.loads((tmp_path / name / "adapter_config.json").read_text())
        for name in ("fast", "stock")
    ]
    for config in configs:  # a set, which PEFT writes in any order
        config["target_modules"].sort()
    assert configs[0] == configs[1]
    plain = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "fast")
    assert {type(layer) for layer in lora_layers(plain)} == {Linear}
    fastlora.restore(models.fast)
    assert_same_forward(models.fast, plain)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_from_pretrained(
    way: str, base: nn.Module, tmp_path: Path, low_cpu_mem_usage: bool
) -> None:
    """Loading PEFT's own checkpoint into fast layers."""
    models = trio(way, base)
    models.stock.save_pretrained(tmp_path)
    options: dict[str, Any] = {"low_cpu_mem_usage": low_cpu_mem_usage}
    if way == "register":
        options["config"] = fastlora.register(LoraConfig.from_pretrained(tmp_path))
    if way == "patch_peft":
        fastlora.patch_peft()
    try:
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, **options)
    finally:
        fastlora.unpatch_peft()
    if way == "accelerate":
        fastlora.accelerate(loaded, verbose=False)
    assert {type(layer) for layer in lora_layers(loaded)} == {FastLoraLinear}
    assert_same_forward(loaded, models.fast)
    assert last_reasons(loaded) == FAST


@pytest.mark.parametrize("copier", ["deepcopy", "pickle", "torch.save"])
def test_copies(way: str, base: nn.Module, copier: str, tmp_path: Path) -> None:
    models = trio(way, base)
    logits(models.fast.eval())
    if copier == "deepcopy":
        copied = copy.deepcopy(models.fast)
    elif copier == "pickle":
        copied = pickle.loads(pickle.dumps(models.fast))
    else:
        torch.save(models.fast, tmp_path / "model.pt")
        copied = torch.load(tmp_path / "model.pt", weights_only=False)
    assert {type(layer) for layer in lora_layers(copied)} == {FastLoraLinear}
    assert_same_forward(copied, models.fast)
    assert last_reasons(copied) == FAST
    fastlora.restore(copied)
    assert {type(layer) for layer in lora_layers(models.fast)} == {FastLoraLinear}


def test_hotswap(way: str, base: nn.Module, tmp_path: Path) -> None:
    models, other = trio(way, base), trio("accelerate", base, lora_alpha=9)
    other.stock.save_pretrained(tmp_path)
    hotswap_adapter(models.fast, str(tmp_path), "default")
    assert_same_forward(models.fast, other.fast)
    assert last_reasons(models.fast) == FAST


def test_adapters_added_later(way: str, base: nn.Module) -> None:
    """An adapter for new layers brings PEFT's own class, until accelerate is called again."""
    models = trio(way, base, target_modules=["q_proj"])
    add(models.fast)
    kinds = {type(layer) for layer in lora_layers(models.fast)}
    assert kinds == {FastLoraLinear, Linear}
    assert "again if it was added since" in fastlora.explain(models.fast).notes()[-1]
    fastlora.accelerate(models.fast, verbose=False)
    assert {type(layer) for layer in lora_layers(models.fast)} == {FastLoraLinear}
    assert_same_forward(models.fast, copy.deepcopy(models.fast))


def test_get_peft_model_again(way: str, base: nn.Module) -> None:
    """Unloading, and wrapping the base model anew, as scripts with several runs do."""
    models = trio(way, base)
    plain = models.fast.unload()
    again = fill_adapters(plug(way, plain, LoraConfig(r=2, target_modules="all-linear")))
    assert {type(layer) for layer in lora_layers(again)} == {FastLoraLinear}
    train_step(again.train(), IDS)
    assert last_reasons(again) == FAST


def test_restore(way: str, base: nn.Module) -> None:
    models = trio(way, base)
    logits(models.fast.eval())
    restored = fastlora.restore(models.fast)
    assert {type(layer) for layer in lora_layers(restored)} == {Linear}
    assert_same_forward(restored, models.stock)
    assert not [name for m in restored.modules() for name in m.__dict__ if "fastlora" in name]


# ---- torch.compile -------------------------------------------------------------------------------


def compilable(way: str, **options: Any) -> tuple[nn.Module, nn.Module]:
    """(fast, stock) MLPs."""
    torch.manual_seed(0)
    config = {"target_modules": ["up", "down"], **options}
    stock = fill_adapters(get_peft_model(MLP(), LoraConfig(**config)))
    fast = plug(way, MLP(), LoraConfig(**config))
    fast.load_state_dict(stock.state_dict())
    torch._dynamo.reset()
    return fast.train(), stock.train()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compile(way: str, backend: str) -> None:
    """One graph, with fastlora's ops in it, that follows the state of the adapters."""
    fast, stock = compilable(way)
    graphs = []

    def record(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph.print_readable(print_output=False))
        return graph.forward

    x = torch.randn(3, 37)
    torch.compile(fast, backend=record, fullgraph=True)(x)
    assert len(graphs) == 1
    assert ("torch.ops.fastlora.lora_linear_fwd" in graphs[0]) == (backend == "native")

    torch._dynamo.reset()
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)

    def check() -> None:
        outs = [model(x) for model in (compiled, stock)]
        torch.testing.assert_close(*outs)
        for model, out in zip((fast, stock), outs, strict=True):
            model.zero_grad()
            out.square().sum().backward()
        ours, theirs = gradients(fast), gradients(stock)
        assert ours.keys() == theirs.keys()
        for name, gradient in ours.items():
            torch.testing.assert_close(gradient, theirs[name])

    check()
    for model in (fast, stock):
        for layer in lora_layers(model):
            layer.set_scale("default", 3.0)
    check()
    with fast.disable_adapter(), stock.disable_adapter():
        torch.testing.assert_close(compiled(x), stock(x))
    for model in (fast, stock):
        model.merge_adapter()
    torch.testing.assert_close(compiled(x), stock(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("checkpoint", [False, True])
def test_compile_with_dropout(checkpoint: bool) -> None:
    """Forward, backward and recomputation use one mask: `dB = scaling dy^T S` with the S of y."""
    fast, _ = compilable("accelerate", lora_dropout=0.5)
    layer = lora_layers(fast)[0]
    layer.base_layer.weight.data.zero_()
    layer.base_layer.bias.data.zero_()

    def call(x: Tensor) -> Tensor:
        if checkpoint:
            return torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
        return layer(x)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    x, dy = torch.randn(6, 37, requires_grad=True), torch.randn(6, 53)
    y = compiled(x)
    y.backward(dy)
    scaling, B = layer.scaling["default"], layer.lora_B["default"].weight
    S = torch.linalg.lstsq(B.detach(), y.detach().T / scaling).solution.T
    torch.testing.assert_close(B.grad, scaling * dy.T @ S, rtol=1e-4, atol=1e-4)
    assert not torch.equal(compiled(x), y)
