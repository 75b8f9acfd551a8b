"""What the configurations of peft_table.py do with a model, and what PEFT does once it is built."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.eva import initialize_lora_eva_weights
from torch import Tensor, nn

from tests.integrations.models import ReplayDropout, Results, gradients, lora_layers
from tests.integrations.peft_case import BATCH, IDS, LENGTH, WIDTH, Act, step

# ---- what is done with a model -----------------------------------------------------------------


def add(model: Any, name: str = "other", **options: Any) -> None:
    settings = {"r": 5, "lora_alpha": 3, "target_modules": ["up", "down"], **options}
    model.add_adapter(name, LoraConfig(**settings))
    generator = torch.Generator().manual_seed(3)
    for parameter_name, parameter in model.named_parameters():
        if f".{name}." in f"{parameter_name}.":
            values = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.data.copy_(values)
    for layer in lora_layers(model):
        if any(type(d) is ReplayDropout for d in layer.lora_dropout.values()):
            p = getattr(layer.lora_dropout[name], "p", 0.0)
            layer.lora_dropout[name] = ReplayDropout(p)


def together(dtype: torch.dtype | None = None, **options: Any) -> Act:
    def act(model: Any) -> Results:
        add(model, **options)
        for name, parameter in model.named_parameters():
            if dtype is not None and ".other." in name:
                rounded = parameter.data.to(dtype)
                exactly = parameter.dtype == torch.float64
                parameter.data = rounded.double() if exactly else rounded
        model.base_model.set_adapter(["default", "other"])
        return step(model)

    return act


def mixed(training: bool) -> Act:
    def act(model: Any) -> Results:
        add(model)
        x = torch.linspace(-1, 1, BATCH * LENGTH * WIDTH).view(BATCH, LENGTH, WIDTH)
        layer = lora_layers(model)[0]
        x = x.to(next(layer.lora_A.parameters()).dtype).requires_grad_(training)
        for adapter in ("default", "other"):
            for part in (layer.lora_A, layer.lora_B):
                part[adapter].requires_grad_(training)
        names = ["other", "__base__", "default"]
        y = layer(x, adapter_names=names)
        # The others are called as well, so that each has a latest call.
        for further in lora_layers(model)[1:]:
            width = further.in_features
            further(x.detach().new_ones(BATCH, width), adapter_names=names)
        if not training:
            return {"y": y.detach()}
        y.square().sum().backward()
        return {"y": y.detach(), "dx": x.grad, **gradients(layer)}

    return act


def switched(model: Any) -> Results:
    add(model)
    model.set_adapter("other")
    return step(model)


def disabled(model: Any) -> Results:
    with model.disable_adapter(), torch.no_grad():
        return {"logits": model(IDS)}


def merged(**options: Any) -> Act:
    def act(model: Any) -> Results:
        model.merge_adapter(**options)
        return {"logits": model(IDS).detach()}

    return act


def merged_and_unmerged(model: Any) -> Results:
    model.merge_adapter()
    model.unmerge_adapter()
    return step(model)


def ranks_cut(model: Any) -> Results:
    """Gradients after AdaLoRA's allocator has switched singular values off."""
    step(model)
    model.base_model.peft_config["default"].tinit = 0
    model.base_model.update_and_allocate(4)
    zeros = [int((layer.lora_E["default"] == 0).sum()) for layer in lora_layers(model)]
    assert any(zeros), zeros
    return step(model)


def combined(kind: str, **options: Any) -> Act:
    def act(model: Any) -> Results:
        add(model, r=4)
        torch.manual_seed(0)
        model.add_weighted_adapter(
            ["default", "other"], [0.5, 0.7], "mix", combination_type=kind, **options
        )
        model.set_adapter("mix")
        return {"logits": model(IDS).detach()}

    return act


def optimised(make: Callable[..., torch.optim.Optimizer], **options: Any) -> Act:
    """Gradients after a step of PEFT's own optimizer."""

    def act(model: Any) -> Results:
        optimizer = make(model=model, lr=1e-2, **options)
        step(model)
        optimizer.step()
        return step(model)

    return act


def evaluated(model: nn.Module) -> Results:
    with torch.no_grad():
        return {"logits": model.eval()(IDS)}


def invoked(*offsets: int | None, further: bool = False, training: bool = True) -> Act:
    """aLoRA with an offset for each row, and with a plain adapter beside it."""

    def act(model: Any) -> Results:
        if further:
            add(model, alora_invocation_tokens=None)
            model.base_model.set_adapter(["default", "other"])
        if training:
            return step(model, alora_offsets=list(offsets))
        with torch.no_grad():
            return {"logits": model.eval()(IDS, alora_offsets=list(offsets))}

    return act


def invoked_in_mixed_batches(model: Any) -> Results:
    """Rows with an aLoRA adapter, with a plain one, and with none."""
    add(model, alora_invocation_tokens=None)
    options = {"adapter_names": ["default", "other", "__base__"], "alora_offsets": [4, 2, 3]}
    with torch.no_grad():
        return {"logits": model.eval()(IDS, **options)}


# ---- what PEFT does to a model once it is built ------------------------------------------------


def by_eva(model: Any, config: LoraConfig) -> None:
    loader = [IDS, IDS.flip(1)]
    initialize_lora_eva_weights(
        model,
        loader,
        forward_fn=lambda model, ids: model(ids),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=lambda x, *_: x[0].reshape(-1, x[0].shape[-1]),
        show_progress_bar=False,
    )


def narrow(model: Any, config: LoraConfig) -> None:
    """bf16 linears under fp32 adapters, as PEFT makes them of a model loaded in bf16."""
    for layer in lora_layers(model):
        layer.base_layer.to(torch.bfloat16)
        layer.register_forward_pre_hook(to_weight_dtype)
        layer.register_forward_hook(from_bf16)


def narrow_table(model: nn.Module, config: LoraConfig) -> None:
    """A bf16 table under fp32 adapters."""
    for layer in lora_layers(model):
        layer.base_layer.to(torch.bfloat16)
        layer.register_forward_hook(from_bf16)


def to_weight_dtype(layer: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0].to(layer.base_layer.weight.dtype),)


def from_bf16(layer: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
    return y.float() if y.dtype == torch.bfloat16 else y
