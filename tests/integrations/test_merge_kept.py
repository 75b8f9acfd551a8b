"""`keep_base`: unmerging gives the base back bit for bit, however often."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from peft import LNTuningConfig, LoraConfig, get_peft_model
from torch import Tensor, nn

from fastlora import accelerate
from fastlora.integrations import bitsandbytes as bnb
from fastlora.integrations.peft.merge import merge_adapter, unmerge_adapter
from fastlora.integrations.peft.merge.kept import KeptTensor, kept_of
from tests.integrations.merging import DENSE, FOUR_BIT
from tests.integrations.models import MLP, MLP4bit, lora_layers, peft_model
from tests.integrations.peft_acts import add
from tests.integrations.peft_table import CASES

pytestmark = pytest.mark.filterwarnings("ignore")
merge = partial(merge_adapter, compare=False, keep_base=True)


def bits(model: nn.Module) -> dict[str, Tensor]:
    """Every byte of the model but the adapters', absmax too."""
    found = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if "lora_" not in name:
            found[name] = tensor.detach().clone().view(torch.uint8)
    for name, module in bnb.linear4bit_modules(model):
        for key, tensor in bnb.raw_quant_state(module).as_dict(packed=True).items():
            found[f"{name}.{key}"] = tensor.clone()
    return found


def assert_same(model: nn.Module, want: dict[str, Tensor]) -> None:
    got = bits(model)
    assert got.keys() == want.keys()
    assert [name for name in want if not torch.equal(got[name], want[name])] == []


def move_adapters(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.add_(torch.randn_like(parameter) * 0.01)


@pytest.mark.parametrize("name", [*DENSE, *FOUR_BIT, "LoRA on NF4, dense", "VeRA"])
def test_the_base_comes_back_bit_for_bit(name: str) -> None:
    into = "dense" if name.endswith(", dense") else "4bit"
    name = name.removesuffix(", dense")
    model = CASES[name].trio()[0] if name in CASES else vera()
    before, kinds = bits(model), [type(layer) for layer in model.modules()]
    for _ in range(3):
        report = merge(model, into=into)
        assert any(not torch.equal(bits(model).get(k, v), v) for k, v in before.items()) or (
            into == "dense"
        ), report
        unmerge_adapter(model)
        assert_same(model, before)
        move_adapters(model)
    assert [type(layer) for layer in model.modules()] == kinds
    assert not any(getattr(layer, "_caches", None) for layer in model.modules())


def vera() -> Any:
    from peft import VeraConfig

    model = get_peft_model(MLP().bfloat16(), VeraConfig(r=4, target_modules=["up", "down"]))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    return model


def dense(dtype: torch.dtype) -> Callable[[], Any]:
    return lambda: MLP(64, 128, 32).to(dtype)


BASES: dict[str, tuple[Callable[[], Any], str]] = {
    "bf16": (dense(torch.bfloat16), "4bit"),
    "fp16": (dense(torch.float16), "4bit"),
    "fp32": (dense(torch.float32), "4bit"),
    "nf4": (MLP4bit, "4bit"),
    "nf4, dense between": (MLP4bit, "dense"),
}


@pytest.mark.parametrize("base", BASES)
def test_a_thousand_merges_do_not_drift(base: str) -> None:
    """Also of a fast model, whose outputs are then those of the first step, bit for bit."""
    torch.manual_seed(0)
    make, into = BASES[base]
    model: Any = peft_model(make()).eval()
    accelerate(model)
    drifting = copy.deepcopy(model)
    before, adapters = bits(model), copy.deepcopy(model.state_dict())
    dtype = torch.bfloat16 if base.startswith("nf4") else model.up.base_layer.bias.dtype
    x = torch.randn(5, model.up.in_features, dtype=dtype)
    want = model(x)
    for _ in range(1000):
        merge(model, into=into)
        unmerge_adapter(model)
        move_adapters(model)
    assert_same(model, before)
    model.load_state_dict({k: v for k, v in adapters.items() if "lora_" in k}, strict=False)
    assert torch.equal(model(x), want)
    for _ in range(30):  # what is kept from drifting
        drifting.merge_adapter()
        drifting.unmerge_adapter()
        move_adapters(drifting)
    after = bits(drifting)
    if base != "fp32":
        assert any(not torch.equal(after[name], bits_) for name, bits_ in before.items())


def test_several_adapters_one_after_the_other() -> None:
    model = CASES["LoRA, bf16 base, fp32 adapters"].trio()[0]
    add(model)
    before = bits(model)
    merge(model, ["default"])
    merge_adapter(model, ["other"], compare=False)  # keeps, for the first's sake
    assert unmerge_adapter(model) == len(list(lora_layers(model)))
    assert_same(model, before)

    merge_adapter(model, ["default"], compare=False)
    between = bits(model)
    merge(model, ["other"])
    layer = next(iter(lora_layers(model)))
    kept_of(layer)[-1].restore(layer)
    assert layer.merged_adapters == ["default"]
    name = next(n for n, m in model.named_modules() if m is layer)
    weight = f"{name}.base_layer.weight"
    assert torch.equal(bits(model)[weight], between[weight])
    assert unmerge_adapter(model)
    assert not any(layer.merged for layer in lora_layers(model))


def test_as_methods_of_the_model() -> None:
    """As a trainer calls them that knows PEFT's names alone."""
    model: Any = peft_model(MLP(64, 128, 32).bfloat16())
    before = bits(model)
    model.merge_adapter = partial(merge, model)
    model.unmerge_adapter = partial(unmerge_adapter, model)
    model.merge_adapter()
    merged = dict(model.named_parameters())["base_model.model.up.base_layer.weight"]
    assert not torch.equal(
        merged.view(torch.uint8), before["base_model.model.up.base_layer.weight"]
    )
    model.unmerge_adapter()
    assert_same(model, before)


def test_peft_unmerges_by_what_was_kept() -> None:
    """Also where it does so by itself: in a call with disabled adapters, or for another adapter."""
    model: Any = peft_model(MLP(64, 128, 32).bfloat16()).eval()
    before, x = bits(model), torch.randn(3, 64).bfloat16()

    def add_one() -> None:
        model.add_adapter("more", LoraConfig(r=2, target_modules=["up"]))
        model.delete_adapter("more")

    for act in (model.unmerge_adapter, lambda: disabled_call(model, x), add_one):
        merge(model)
        act()
        unmerge_adapter(model)
        assert_same(model, before)
    assert not any("unmerge" in module.__dict__ for module in model.modules())
    merge_adapter(model, compare=False)
    assert unmerge_adapter(model)  # by rounding, as nothing is kept any more


def disabled_call(model: Any, x: Tensor) -> None:
    with model.disable_adapter():
        model(x)


def test_copies_of_a_merged_model() -> None:
    model = CASES["LoRA, bf16 base, fp32 adapters"].trio()[0]
    before = bits(model)
    merge(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        copied.unmerge_adapter()
        assert_same(copied, before)
    assert all(layer.merged for layer in lora_layers(model))
    unmerge_adapter(model)
    assert_same(model, before)


def test_what_is_merged_by_others_in_between_is_refused() -> None:
    model = CASES["LoRA, bf16 base, fp32 adapters"].trio()[0]
    for name in ("other", "third"):
        model.add_adapter(name, model.peft_config["default"])
    merge(model, ["default"])
    model.merge_adapter(["other"])
    for keep in (True, False):
        with pytest.raises(ValueError, match=r"model: layer .*: other adapters were merged"):
            merge_adapter(model, ["third"], keep_base=keep, compare=False)
    with pytest.raises(ValueError, match="other adapters were merged"):
        unmerge_adapter(model)
    with pytest.warns(UserWarning, match="unmerging with rounding"):
        model.unmerge_adapter()
    assert not any(layer.merged for layer in lora_layers(model))


def test_methods_that_exchange_the_base_are_refused() -> None:
    model = nn.ModuleDict({"norm": nn.LayerNorm(8)})
    adapted = get_peft_model(model, LNTuningConfig(target_modules=["norm"]))
    with pytest.raises(ValueError, match="keep_base must be False: PEFT's LNTuningLayer exchanges"):
        merge(adapted)
    layer: Any = adapted.base_model.model["norm"]
    assert not layer.merged


def test_a_weight_in_the_middle_of_a_buffer() -> None:
    """As flat parameters have them: at any offset."""
    model: Any = peft_model(MLP(64, 128, 32).bfloat16())
    layer = model.base_model.model.up
    flat = torch.randn(64 * 128 + 1).bfloat16()
    layer.base_layer.weight = nn.Parameter(flat[1:].view(128, 64), requires_grad=False)
    before = bits(model)
    merge(model)
    unmerge_adapter(model)
    assert_same(model, before)


def test_offloaded_layers() -> None:
    from accelerate import cpu_offload

    model: Any = peft_model(MLP(64, 128, 32).bfloat16()).eval()
    x = torch.randn(3, 64).bfloat16()
    want = model(x)
    cpu_offload(model)
    merge(model)
    unmerge_adapter(model)
    assert torch.equal(model(x), want)


def test_a_changed_weight_is_refused() -> None:
    model = CASES["LoRA"].trio()[0]
    merge(model)
    layers = list(lora_layers(model))
    before = bits(model)
    with torch.no_grad():
        layers[-1].get_base_layer().weight[0, 0] += 1
    with pytest.raises(ValueError, match=r"model: layer .*: its weight has changed since"):
        unmerge_adapter(model)
    with torch.no_grad():
        layers[-1].get_base_layer().weight[0, 0] -= 1
        layers[0].get_base_layer().weight.copy_(layers[0].get_base_layer().weight.flip(0))
    with pytest.raises(ValueError, match="its weight has changed since"):  # the same values
        unmerge_adapter(model)
    assert all(layer.merged for layer in layers)
    assert bits(model).keys() == before.keys()


def test_a_layer_that_cannot_be_kept_is_refused() -> None:
    attention = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)})
    model = get_peft_model(attention, LoraConfig(r=2, target_modules=["attn"]))
    before = bits(model)
    with pytest.raises(ValueError, match="keep_base must be False: PEFT's MultiheadAttention"):
        merge(model)
    assert_same(model, before)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 7), (16, 5)])
def test_kept_tensors(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    before = (torch.randn(shape) * 100).to(dtype)
    after = torch.where(torch.rand(shape) < 0.5, before, before + 1)
    if before.numel() > 1 and dtype.is_floating_point:
        before.view(-1)[:2] = torch.tensor([float("nan"), -0.0])
        after.view(-1)[:2] = torch.tensor([float("nan"), 0.0])
    kept = KeptTensor.of(before, after)
    changed = int((before.view(torch.uint8) != after.view(torch.uint8)).any()) and len(kept.values)
    assert kept.nbytes == (before.numel() + 7) // 8 + changed * before.element_size()
    assert kept.fits(after) and (torch.equal(before, after) or not kept.fits(before))
    kept.restore(after)
    assert torch.equal(after.view(torch.uint8), before.view(torch.uint8))
