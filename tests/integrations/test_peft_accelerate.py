"""How PEFT models get fast layers and give them back, and what is said of each layer."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.model import LoraModel
from torch import nn

import fastlora
from fastlora.backends import native
from fastlora.integrations import peft as integration
from fastlora.integrations.peft.layers import FastLoraEmbedding, FastParamWrapper
from tests.integrations.models import (
    MLP,
    MLP4bit,
    last_reasons,
    llama,
    lora_layers,
    peft_model,
    train_step,
)

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def types(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def test_accelerate_changes_classes_and_nothing_else(stock: nn.Module) -> None:
    before = {name: t.data_ptr() for name, t in stock.state_dict(keep_vars=True).items()}
    attributes = [set(layer.__dict__) for layer in lora_layers(stock)]
    model = fastlora.accelerate(stock, verbose=False)
    assert model is stock
    assert {type(layer) for layer in lora_layers(model)} == {integration.FastLoraLinear}
    assert {name: t.data_ptr() for name, t in model.state_dict(keep_vars=True).items()} == before
    assert [set(layer.__dict__) for layer in lora_layers(model)] == attributes
    assert isinstance(lora_layers(model)[0], peft.tuners.lora.Linear)


@pytest.mark.parametrize("make", [lambda: MLP(), lambda: MLP4bit()], ids=["dense", "4bit"])
def test_restore_gives_the_model_back(make: Callable[[], nn.Module]) -> None:
    stock = peft_model(make())
    for module in stock.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = True
    before, attributes = types(stock), [dict(m.__dict__) for m in stock.modules()]
    model = fastlora.accelerate(fastlora.accelerate(stock, verbose=False), verbose=False)
    assert types(model) != before
    model.train()
    x = torch.randn(2, next(iter(lora_layers(model))).in_features)
    model(x)
    assert last_reasons(model) == {""}
    assert fastlora.restore(model) is model
    assert types(model) == before
    for module, was in zip(model.modules(), attributes, strict=True):
        assert module.__dict__.keys() == was.keys()
        for name in ("support_avx512bf16_for_cpu", "training"):
            assert module.__dict__.get(name) == was.get(name)
    assert fastlora.restore(model) is model


@pytest.mark.parametrize("part", ["PeftModel", "base_model", "inner", "layer"])
def test_accelerate_takes_any_module_with_lora_layers(stock: nn.Module, part: str) -> None:
    target = {
        "PeftModel": stock,
        "base_model": stock.base_model,
        "inner": stock.base_model.model,
        "layer": stock.base_model.model.up,
    }[part]
    assert fastlora.accelerate(target, verbose=False) is target
    fast = [layer for layer in lora_layers(stock) if type(layer) is integration.FastLoraLinear]
    assert len(fast) == (1 if part == "layer" else 2)


@pytest.mark.parametrize("function", [fastlora.accelerate, fastlora.restore, fastlora.explain])
def test_a_model_is_a_module(function: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got dict"):
        function({})


def test_a_model_without_lora_layers_gets_a_warning() -> None:
    with pytest.warns(UserWarning, match="no LoRA layers; call it after get_peft_model"):
        fastlora.accelerate(MLP(), verbose=False)


BANNER = "fastlora {}: 2/2 LoRA layers accelerated (2 {}), 0 on PEFT's own code\n"


@pytest.mark.parametrize(("make", "kind"), [(MLP, "fp32"), (MLP4bit, "nf4")])
def test_banner(
    make: type[nn.Module],
    kind: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("FASTLORA_QUIET", raising=False)
    model = peft_model(make())
    fastlora.accelerate(model)
    captured = capsys.readouterr()
    assert captured.err == BANNER.format(fastlora.__version__, kind)
    assert captured.out == ""
    fastlora.accelerate(model, verbose=False)
    monkeypatch.setenv("FASTLORA_QUIET", "1")
    fastlora.accelerate(model)
    assert capsys.readouterr().err == ""
    fastlora.accelerate(model, verbose=True)
    assert capsys.readouterr().err == BANNER.format(fastlora.__version__, kind)
    monkeypatch.setenv("FASTLORA_QUIET", "0")
    monkeypatch.setenv("RANK", "1")
    fastlora.accelerate(model)
    assert capsys.readouterr().err == ""


def test_explain_rows(backend: str) -> None:
    model = peft_model(MLP4bit(nested=True), lora_dropout=0.1, lora_bias=False)
    stock_rows = fastlora.explain(model).rows
    assert [row.fast for row in stock_rows] == [False, False]
    assert "call fastlora.accelerate(model)" in stock_rows[0].reason
    fastlora.accelerate(model, verbose=False)
    up, down = fastlora.explain(model).rows
    assert up.name == "base_model.model.up"
    assert (up.kind, up.base, up.shape) == ("FastLoraLinear4bit", "nf4/64 nested", (128, 64))
    assert (up.r, up.dropout, up.adapter) == (3, 0.1, "fp32")
    assert up.backend == backend and up.kernel.startswith("qlora_linear")
    assert (up.reason, up.last_call) == ("", None)
    model(torch.randn(2, 64))
    with model.disable_adapter():
        model.base_model.model.down(torch.randn(2, 128))
    up, down = fastlora.explain(model).rows
    assert up.last_call == ""
    assert (down.last_call, down.idle, down.note) == ("", "", "") and down.fast


def test_explain_says_why_not() -> None:
    model = peft_model(MLP())
    with model.disable_adapter():
        fastlora.accelerate(model, verbose=False)
        rows = fastlora.explain(model).rows
        assert all(row.fast for row in rows)
        note = "the base product alone: the adapters are disabled"
        assert {row.note for row in rows} == {note}
    explained = fastlora.explain(peft_model(MLP()).merge_and_unload())
    assert explained.rows == []
    model = get_peft_model(
        nn.ModuleDict({"up": nn.Conv1d(5, 4, 3)}), LoraConfig(target_modules=["up"])
    )
    (row,) = fastlora.explain(fastlora.accelerate(model, verbose=False)).rows
    assert row.reason == "fastlora has no layer for PEFT's Conv1d"
    assert (row.base, row.shape, row.fast) == ("Conv1d", None, False)


def test_explain_knows_every_kind_of_lora_layer() -> None:
    """Also those without a class, and parameters, embeddings and AdaLoRA's, which have one."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.embedding = nn.Embedding(5, 8)
            self.conv = nn.Conv2d(3, 4, 3)
            self.attention = nn.MultiheadAttention(8, 2)
            self.raw = nn.Linear(8, 8)

    targets = ["linear", "embedding", "conv", "attention"]
    config = LoraConfig(r=2, target_modules=targets, target_parameters=["raw.weight"])
    model = fastlora.accelerate(get_peft_model(Net(), config), verbose=False)
    rows = {row.name.removeprefix("base_model.model."): row for row in fastlora.explain(model).rows}
    assert rows["linear"].fast and rows["linear"].r == 2
    assert rows["raw"].fast and (rows["raw"].base, rows["raw"].shape) == ("fp32", (8, 8))
    row = rows["embedding"]
    assert (row.base, row.shape, row.r, row.adapter) == ("fp32 Embedding", (8, 5), 2, "fp32")
    assert row.kernel.startswith("lora_embedding")
    for name, kind in (("conv", "Conv2d"), ("attention", "MultiheadAttention")):
        assert rows[name].reason == f"fastlora has no layer for PEFT's {kind}"
    adalora = peft.AdaLoraConfig(target_modules=["up"], total_step=10)
    model = fastlora.accelerate(get_peft_model(MLP(), adalora), verbose=False)
    (row,) = fastlora.explain(model).rows
    assert row.fast and (row.kind, row.shape, row.r) == ("FastSVDLinear", (53, 37), 12)
    assert str(fastlora.explain(model))


def test_explain_prints_a_table() -> None:
    model = fastlora.accelerate(peft_model(llama()), verbose=False)
    explained = fastlora.explain(model)
    text = str(explained)
    assert explained.summary() in text
    assert "model.layers.*.self_attn.q_proj" in text and "x2" in text
    assert "lora_linear" in text and "(1)" not in text
    layer = lora_layers(model)[0]
    layer.merge()
    text = str(fastlora.explain(model))
    assert "14/14 LoRA layers accelerated (14 fp32), 0 on PEFT's own code" in text
    assert "(1) the base product alone: the adapter is merged into the base weight" in text


@pytest.mark.parametrize("backend", ["auto"], indirect=True)
def test_explain_without_a_fast_backend(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only the reference could serve, PEFT's own code runs, unless the user asks for it."""
    monkeypatch.setattr(native, "unsupported", lambda *_, **__: "no such kernel.")
    model = fastlora.accelerate(peft_model(MLP()), verbose=False)
    model(torch.randn(2, 37))
    assert last_reasons(model) == {"no fast backend for cpu. native: no such kernel."}
    assert "no such kernel" in fastlora.explain(model).rows[0].reason
    monkeypatch.setenv("FASTLORA_BACKEND", "reference")
    model(torch.randn(2, 37))
    assert last_reasons(model) == {""}


@pytest.mark.skipif(
    native.unavailable_reason() is not None, reason=str(native.unavailable_reason())
)
@pytest.mark.parametrize("backend", ["auto"], indirect=True)
def test_the_compiled_backend_is_the_default(backend: str) -> None:
    model = fastlora.accelerate(peft_model(MLP()), verbose=False)
    model(torch.randn(2, 37))
    assert last_reasons(model) == {""}
    assert {row.backend for row in fastlora.explain(model).rows} == {"native"}


# ---- the other ways in -------------------------------------------------------------------------


def test_register_leaves_the_choice_of_layer_to_peft() -> None:
    """8-bit and other subclasses of nn.Linear keep PEFT's layers; embeddings do not."""

    class OddLinear(nn.Linear):
        pass

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.b = OddLinear(4, 4)
            self.c = nn.Embedding(4, 4)
            self.d = nn.Linear(4, 4)

    config = fastlora.register(
        LoraConfig(target_modules=["a", "b", "c"], target_parameters=["d.weight"])
    )
    model = get_peft_model(Net(), config).base_model.model
    plain = get_peft_model(
        Net(), LoraConfig(target_modules=["a", "b", "c"], target_parameters=["d.weight"])
    ).base_model.model
    assert type(model.a) is integration.FastLoraLinear
    for name in "abcd":
        assert isinstance(getattr(model, name), type(getattr(plain, name)))
    assert type(model.d) is FastParamWrapper and type(model.c) is FastLoraEmbedding


def test_copies_of_a_registered_config() -> None:
    config = fastlora.register(LoraConfig(r=4, target_modules=["up", "down"]))
    for copied in (replace(config, r=2), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        model = get_peft_model(MLP(), copied)
        assert all(row.fast for row in fastlora.explain(model).rows)
        assert isinstance(copied, LoraConfig) and copied.to_dict().keys() == config.to_dict().keys()
    assert fastlora.explain(get_peft_model(MLP(), replace(config, r=2))).rows[0].r == 2


def test_register_keeps_other_custom_modules() -> None:
    class OddLinear(nn.Linear):
        pass

    class OddLora(peft.tuners.lora.Linear):
        pass

    net = nn.ModuleDict({"a": nn.Linear(4, 4), "b": OddLinear(4, 4)})
    config = fastlora.register(LoraConfig(target_modules=["a", "b"]))
    config._register_custom_module({OddLinear: OddLora})
    model = get_peft_model(net, config).base_model.model
    assert type(model["a"]) is integration.FastLoraLinear
    assert type(model["b"]) is OddLora
    assert set(config._custom_modules) == {nn.Linear, nn.Embedding, OddLinear}


def test_register_is_not_saved(tmp_path: Path) -> None:
    plain, registered = (LoraConfig(target_modules=["up", "down"]) for _ in range(2))
    assert fastlora.register(fastlora.register(registered)) is registered
    assert plain.to_dict() == registered.to_dict()
    model = get_peft_model(MLP(), registered)
    model.save_pretrained(tmp_path)
    loaded = LoraConfig.from_pretrained(tmp_path)
    assert loaded._custom_modules is None
    for copied in (copy.deepcopy(registered), pickle.loads(pickle.dumps(registered))):
        assert {type(m) for m in lora_layers(get_peft_model(MLP(), copied))} == {
            integration.FastLoraLinear
        }


def test_register_wants_a_lora_config() -> None:
    with pytest.raises(TypeError, match=r"lora_config must be a peft.LoraConfig, got dict"):
        fastlora.register({})  # type: ignore[arg-type]


@pytest.fixture
def unpatched() -> Iterator[None]:
    original = LoraModel.__dict__["_create_new_module"]
    yield
    LoraModel._create_new_module = original


def layer_class() -> type:
    (kind,) = {type(layer) for layer in lora_layers(peft_model(MLP()))}
    return kind


@pytest.mark.usefixtures("unpatched")
def test_patch_peft() -> None:
    original = LoraModel._create_new_module
    fastlora.unpatch_peft()
    fastlora.patch_peft()
    fastlora.patch_peft()
    assert layer_class() is integration.FastLoraLinear
    fastlora.unpatch_peft()
    assert LoraModel._create_new_module is original
    assert layer_class() is peft.tuners.lora.Linear
    fastlora.unpatch_peft()
    assert LoraModel._create_new_module is original


@pytest.mark.usefixtures("unpatched")
def test_unpatch_peft_refuses_to_remove_another_patch() -> None:
    import functools

    fastlora.patch_peft()
    ours = LoraModel._create_new_module

    @functools.wraps(ours)
    def theirs(*args: Any, **kwargs: Any) -> Any:
        return ours(*args, **kwargs)

    LoraModel._create_new_module = staticmethod(theirs)
    fastlora.patch_peft()
    assert LoraModel._create_new_module is theirs
    with pytest.raises(RuntimeError, match=r"patched again after fastlora\.patch_peft"):
        fastlora.unpatch_peft()
    assert layer_class() is integration.FastLoraLinear


# ---- forwards that hide the class's ------------------------------------------------------------


def hooked(model: nn.Module) -> nn.Module:
    """What accelerate does to a model spread over devices: a hook on every module."""
    accelerate.hooks.attach_execution_device_hook(model, "cpu")
    return model


@pytest.mark.parametrize("order", ["hooks first", "accelerate first", "before PEFT"])
def test_device_hooks(order: str) -> None:
    """Hooks that only move inputs do not stop the fast path, whenever they were installed."""
    stock = peft_model(hooked(MLP()) if order == "before PEFT" else MLP()).eval()
    x = torch.randn(2, 37)
    expected = stock(x)
    if order == "hooks first":
        hooked(stock)
    fast = fastlora.accelerate(stock, verbose=False)
    if order == "accelerate first":
        hooked(fast)
    torch.testing.assert_close(fast(x), expected)
    assert last_reasons(fast) == {""}
    assert all(row.fast for row in fastlora.explain(fast).rows)
    # Not on the PeftModel: it answers for its base model's hook, and cannot delete it.
    accelerate.hooks.remove_hook_from_module(fast.base_model.model, recurse=True)
    fast(x)
    assert last_reasons(fast) == {""}
    fastlora.restore(fast)
    assert torch.equal(fast(x), expected)
    assert last_reasons(fast) == {None}


def test_offloading_hooks_run_on_peft() -> None:
    """With weights on the meta device between calls, only PEFT's way through the hooks is right."""
    stock = peft_model(MLP()).eval()
    x = torch.randn(2, 37)
    expected = stock(x)
    accelerate.cpu_offload(stock, execution_device="cpu")
    fast = fastlora.accelerate(stock, verbose=False)
    assert torch.equal(fast(x), expected)
    (reason,) = last_reasons(fast)
    assert reason is not None and "forward of its own" in reason


def test_a_replaced_forward_is_explained(stock: nn.Module) -> None:
    layer = lora_layers(stock)[0]
    layer.forward = lambda x: x.new_zeros(*x.shape[:-1], layer.out_features)
    fastlora.accelerate(stock, verbose=False)
    rows = fastlora.explain(stock).rows
    assert [row.fast for row in rows] == [False, True]
    assert rows[0].reason == (
        "forward was replaced on the instance, which hides that of its class; call "
        "fastlora.accelerate before whatever replaces it"
    )
    assert not layer(torch.randn(2, 37)).any()


# ---- distributed -------------------------------------------------------------------------------


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("order", ["accelerate first", "fully_shard first"])
@pytest.mark.parametrize("unit", ["model", "layers", "adapters", "4-bit layers"])
def test_fsdp2(unit: str, order: str) -> None:
    """Sharded by model or layer, weights are plain while a layer runs; sharded below it, not."""
    from torch.distributed.fsdp import fully_shard

    # Of 4-bit weights, those stored in a float dtype can be sharded.
    net = MLP4bit(storage=BF16, nested=True) if unit == "4-bit layers" else MLP()
    model = peft_model(net).train()
    x = torch.randn(2, lora_layers(model)[0].in_features)
    expected = train_step(copy.deepcopy(model), x)
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    if order == "accelerate first":
        fastlora.accelerate(model, verbose=False)
    for layer in lora_layers(model):
        if "layers" in unit:
            fully_shard(layer, mesh=mesh)
        if unit == "adapters":
            fully_shard(layer.lora_A["default"], mesh=mesh)
    fully_shard(model, mesh=mesh)
    before = types(model)
    fastlora.accelerate(model, verbose=False)
    assert (types(model) == before) == (order == "accelerate first")
    if unit != "adapters":
        assert "is sharded (a DTensor" in fastlora.explain(model).rows[0].reason
    results = train_step(model, x)
    for name, tensor in results.items():
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        torch.testing.assert_close(whole, expected[name])
    if unit == "adapters":
        (reason,) = last_reasons(model)
        assert reason is not None and "FSDPLinear, not a plain nn.Linear" in reason
    else:
        assert last_reasons(model) == {""}
    fast = types(model)
    fastlora.restore(model)
    if order == "fully_shard first":
        assert types(model) == before
    assert not any("fastlora" in base.__module__ for kind in types(model) for base in kind.__mro__)
    fastlora.accelerate(model, verbose=False)
    assert types(model) == fast


@pytest.mark.parametrize("make", [MLP, MLP4bit])
def test_a_printed_model_looks_as_it_did(make: Callable[[], nn.Module]) -> None:
    model = peft_model(make())
    before = str(model)
    assert str(fastlora.accelerate(model, verbose=False)) == before
