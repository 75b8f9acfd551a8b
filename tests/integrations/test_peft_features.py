"""What PEFT models can do, done to a Llama whose layers became fast in each of the three ways.

Each feature runs on three copies of a model: fast, PEFT's own in float64, and PEFT's own. The
results have to agree, and every layer has to have run where it should: on fastlora, or on PEFT's
own code for the reason given.
"""

from __future__ import annotations

import copy
import json
import pickle
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

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
    VOCAB,
    assert_network_close,
    exact,
    fill_adapters,
    gradients,
    last_reasons,
    llama,
    lora_layers,
    replaying,
    train_step,
)

WAYS = ["accelerate", "register", "patch_peft"]
FAST = {""}
IDS = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))


class Trio(NamedTuple):
    """The same model three times."""

    fast: nn.Module
    exact: nn.Module
    stock: nn.Module


@pytest.fixture(scope="module")
def base() -> nn.Module:
    torch.manual_seed(0)
    return llama()


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def plug(way: str, model: nn.Module, config: LoraConfig) -> nn.Module:
    """`get_peft_model` with fast layers."""
    if way == "accelerate":
        return fastlora.accelerate(get_peft_model(model, config), verbose=False)
    if way == "register":
        return get_peft_model(model, fastlora.register(config))
    fastlora.patch_peft()
    try:
        return get_peft_model(model, config)
    finally:
        fastlora.unpatch_peft()


def trio(way: str, base: nn.Module, **options: Any) -> Trio:
    settings: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": "all-linear", **options}
    stock = fill_adapters(get_peft_model(copy.deepcopy(base), LoraConfig(**settings)))
    fast = plug(way, copy.deepcopy(base), LoraConfig(**settings))
    fast.load_state_dict(stock.state_dict(), strict=True)
    assert {type(layer) for layer in lora_layers(fast)} == {FastLoraLinear}
    assert {type(layer) for layer in lora_layers(stock)} == {Linear}
    return Trio(fast, exact(stock), replaying(stock))


def logits(model: nn.Module, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, **options).logits


def add(model: nn.Module, name: str = "other", **options: Any) -> None:
    """A further adapter, with values that depend on the names of its parameters alone."""
    settings: dict[str, Any] = {"r": 3, "lora_alpha": 7, "target_modules": "all-linear", **options}
    model.add_adapter(name, LoraConfig(**settings))
    for parameter_name, parameter in model.named_parameters():
        if f".{name}." in parameter_name:
            generator = torch.Generator().manual_seed(zlib.crc32(parameter_name.encode()))
            values = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.data.copy_(values)


# ---- features ------------------------------------------------------------------------------------

Results = dict[str, Tensor]


@dataclass
class Feature:
    """Something to do with a model, and where its layers run when it is done."""

    run: Callable[[nn.Module], Results]
    reasons: set[str] = field(default_factory=lambda: FAST)
    config: dict[str, Any] = field(default_factory=dict)


FEATURES: dict[str, Feature] = {}


def feature(*reasons: str, **config: Any) -> Callable[[Callable[[nn.Module], Results]], None]:
    def register(run: Callable[[nn.Module], Results]) -> None:
        FEATURES[run.__name__] = Feature(run, set(reasons) or FAST, config)

    return register


@feature()
def forward(model: nn.Module) -> Results:
    return {"logits": logits(model.eval())}


@feature()
def backward(model: nn.Module) -> Results:
    return train_step(model.train(), IDS)


@feature(lora_dropout=0.3)
def dropout(model: nn.Module) -> Results:
    return train_step(model.train(), IDS)


@feature(lora_dropout=0.3)
def evaluation_between_steps(model: nn.Module) -> Results:
    first = train_step(model.train(), IDS)
    second = logits(model.eval())
    third = train_step(model.train(), IDS, seed=1)
    return {**first, "eval": second, **{f"again {k}": v for k, v in third.items()}}


@feature(use_rslora=True)
def rank_stabilised(model: nn.Module) -> Results:
    return train_step(model.train(), IDS)


@feature(rank_pattern={"q_proj": 5, "down_proj": 1}, alpha_pattern={"v_proj": 11})
def rank_and_alpha_patterns(model: nn.Module) -> Results:
    return train_step(model.train(), IDS)


@feature(use_dora=True)
def dora(model: nn.Module) -> Results:
    return train_step(model.train(), IDS)


@feature(alora_invocation_tokens=[3])
def activated_lora(model: nn.Module) -> Results:
    # Of the second row, only what follows the last invocation token gets the adapter.
    ids = IDS.clone()
    ids[1, 4] = 3
    offsets = [None, 5]
    with torch.no_grad():
        return {"logits": model.eval()(input_ids=ids, alora_offsets=offsets).logits}


@feature(modules_to_save=["lm_head"], target_modules=["q_proj", "down_proj"])
def modules_to_save(model: nn.Module) -> Results:
    return train_step(model.train(), IDS)


MERGED = "the adapter is merged into the base weight"


@feature(MERGED)
def merge(model: nn.Module) -> Results:
    model.merge_adapter()
    return {"logits": logits(model.eval())}


@feature(MERGED)
def safe_merge(model: nn.Module) -> Results:
    model.merge_adapter(safe_merge=True)
    return {"logits": logits(model.eval())}


@feature()
def unmerge(model: nn.Module) -> Results:
    model.merge_adapter()
    logits(model.eval())
    model.unmerge_adapter()
    return {"logits": logits(model)}


@feature("gone")
def merge_and_unload(model: nn.Module) -> Results:
    return {"logits": logits(model.merge_and_unload().eval())}


@feature("gone")
def unload(model: nn.Module) -> Results:
    return {"logits": logits(model.unload().eval())}


@feature("the adapters are disabled")
def disable_adapter(model: nn.Module) -> Results:
    with model.eval().disable_adapter():
        return {"logits": logits(model)}


@feature()
def disable_and_enable(model: nn.Module) -> Results:
    """As DPO does: the reference model is the policy without its adapter."""
    with model.train().disable_adapter():
        reference = logits(model)
    return {"reference": reference, **train_step(model, IDS)}


@feature()
def disable_adapter_while_merged(model: nn.Module) -> Results:
    model.merge_adapter()
    with model.eval().disable_adapter():
        off = logits(model)
    return {"off": off, "on": logits(model)}


@feature()
def mixed_batch(model: nn.Module) -> Results:
    add(model)
    model.eval()
    return {
        "a": logits(model, adapter_names=["default", "__base__"]),
        "b": logits(model, adapter_names=["other", "default"]),
    }


@feature()
def set_adapter(model: nn.Module) -> Results:
    add(model)
    model.set_adapter("other")
    return train_step(model.train(), IDS)


@feature()
def two_active_adapters(model: nn.Module) -> Results:
    add(model, r=5)
    model.base_model.set_adapter(["default", "other"])
    return train_step(model.train(), IDS)


@feature("", "no adapters are active on this layer")
def adapter_on_some_layers(model: nn.Module) -> Results:
    add(model, target_modules=["q_proj", "up_proj"])
    model.set_adapter("other")
    return {"logits": logits(model.eval())}


@feature()
def weighted_adapter(model: nn.Module) -> Results:
    add(model)
    model.add_weighted_adapter(["default", "other"], [0.5, 0.7], "mix", combination_type="linear")
    model.set_adapter("mix")
    return {"logits": logits(model.eval())}


@feature()
def delete_adapter(model: nn.Module) -> Results:
    add(model)
    model.set_adapter("other")
    model.delete_adapter("default")
    return train_step(model.train(), IDS)


@feature()
def scale_layer(model: nn.Module) -> Results:
    for layer in lora_layers(model):
        layer.scale_layer(0.5)
    return {"logits": logits(model.eval())}


def checkpointed(model: nn.Module, reentrant: bool) -> Results:
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls = []
    layer = lora_layers(model)[0]
    handle = layer.register_forward_hook(lambda *_: calls.append(1))
    results = train_step(model.train(), IDS)
    handle.remove()
    assert len(calls) == 2
    return results


@feature(lora_dropout=0.3)
def checkpointing_reentrant(model: nn.Module) -> Results:
    return checkpointed(model, reentrant=True)


@feature(lora_dropout=0.3)
def checkpointing_non_reentrant(model: nn.Module) -> Results:
    return checkpointed(model, reentrant=False)


@feature()
def gradient_accumulation(model: nn.Module) -> Results:
    model.train()
    for ids in IDS.split(1):
        model(input_ids=ids, labels=ids).loss.backward()
    return gradients(model)


@feature()
def inference_mode(model: nn.Module) -> Results:
    model.eval()
    with torch.inference_mode():
        out = model(input_ids=IDS).logits
    return {"logits": out.clone()}


@feature()
def generate(model: nn.Module) -> Results:
    """With the cache: one token a call after the first."""
    out = model.eval().generate(
        input_ids=IDS,
        attention_mask=torch.ones_like(IDS),
        max_new_tokens=4,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return {"tokens": out.sequences.double(), "logits": torch.stack(out.logits)}


@feature()
def hooks_on_the_layer(model: nn.Module) -> Results:
    """Hooks on a LoRA layer itself see and change what they always did."""
    layer = lora_layers(model)[3]
    seen: Results = {}
    layer.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 2,))
    layer.register_forward_hook(lambda _, inputs, output: output + 1)
    layer.register_full_backward_hook(lambda _, dx, dy: seen.update(dx=dx[0], dy=dy[0]))
    return {**train_step(model.train(), IDS), **seen}


@feature("", "lora_A has hooks, which fastlora would not call")
def hooks_on_lora_A(model: nn.Module) -> Results:
    seen: Results = {}
    lora_A = lora_layers(model)[3].lora_A["default"]
    lora_A.register_forward_hook(lambda _, inputs, output: seen.update(S=output.detach()))
    return {**train_step(model.train(), IDS), **seen}


@pytest.mark.parametrize("name", FEATURES)
def test_feature(way: str, name: str, base: nn.Module) -> None:
    what = FEATURES[name]
    models = trio(way, base, **what.config)
    results = [what.run(model) for model in models]
    reasons = last_reasons(models.fast)
    assert reasons == (what.reasons if what.reasons != {"gone"} else set())
    assert_network_close(*results)
    assert models.fast.state_dict().keys() == models.stock.state_dict().keys()


# ---- dtypes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ["fp32", "bf16"])
@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_base(way: str, base: nn.Module, adapter: str, autocast: bool) -> None:
    """PEFT's fp32 adapters, or bf16 ones, on a bf16 base, with and without autocast."""
    models = trio(way, copy.deepcopy(base).to(torch.bfloat16))

    def run(model: nn.Module) -> Results:
        on = autocast and model is not models.exact
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            out = model.train()(input_ids=IDS, labels=IDS)
        out.loss.backward()
        return {"logits": out.logits.detach(), **gradients(model)}

    if adapter == "bf16":
        for model in (models.fast, models.stock):
            for layer in lora_layers(model):
                layer.lora_A.to(torch.bfloat16)
                layer.lora_B.to(torch.bfloat16)
        models.exact.load_state_dict(models.stock.state_dict())
    results = [run(model) for model in models]
    assert last_reasons(models.fast) == FAST
    assert_network_close(*results)


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
