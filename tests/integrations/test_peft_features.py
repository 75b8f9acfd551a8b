"""What PEFT models can do, done to a Llama whose layers became fast in each of the three ways.

Each feature runs on three copies of a model: fast, PEFT's own in float64, and PEFT's own. The
results have to agree, and every layer has to have run where it should: on fastlora, or on PEFT's
own code for the reason given.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.integrations.models import (
    assert_network_close,
    gradients,
    last_reasons,
    lora_layers,
    train_step,
)
from tests.integrations.trios import FAST, IDS, add, logits, trio

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


@feature()
def merge(model: nn.Module) -> Results:
    model.merge_adapter()
    return {"logits": logits(model.eval())}


@feature()
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


@feature()
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


@feature()
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
