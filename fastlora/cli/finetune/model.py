"""The model of a run: its adapter, and the kernels that run it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from typing import Any

from ..errors import CliError
from ..options import torch_dtype
from .job import Job, Observer


def with_adapter(model: Any, job: Job, observer: Observer) -> Any:
    """PEFT's model around `model`, with the job's adapter.

    Raises:
        CliError: PEFT has no adapter for a layer.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=job.r,
        lora_alpha=job.alpha,
        lora_dropout=job.dropout,
        target_modules=_target_modules(model, job.target_modules),
    )
    if job.gradient_checkpointing:
        model.config.use_cache = False
        enable_checkpointing(model)
    try:
        if job.dropout > 0.0 and _adapts_experts(model, config):
            observer.emit("status", text="dropout 0, since PEFT's adapters on experts have none")
            config.lora_dropout = 0.0
        model = get_peft_model(model, config)
    except ValueError as error:
        raise CliError(f"--target-modules: {error}") from error
    cast_adapter(model, torch_dtype(job.adapter_dtype))
    return model


def _adapts_experts(model: Any, config: Any) -> bool:
    """Whether PEFT puts adapters on stacks of experts, tried on a model without memory."""
    import torch
    from peft import get_peft_model
    from peft.tuners.lora.layer import ParamWrapper

    if not any(parameter.dim() == 3 for parameter in model.parameters()):
        return False
    with torch.device("meta"):
        empty = type(model)(model.config)
        trial = get_peft_model(empty, dataclasses.replace(config, lora_dropout=0.0))
    return any(isinstance(module, ParamWrapper) for module in trial.modules())


def enable_checkpointing(model: Any) -> None:
    """Switches gradient checkpointing on; Transformers 5.2x renamed the method."""
    old_name = model.gradient_checkpointing_enable
    getattr(model, "activation_checkpointing_enable", old_name)({"use_reentrant": False})


def cast_adapter(model: Any, dtype: Any) -> None:
    """Casts everything that is trained to `dtype`."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def accelerate(model: Any) -> dict[str, int]:
    """Puts the model on fastlora's kernels; returns how many layers each backend got."""
    from ...integrations import peft

    peft.accelerate(model, verbose=False)
    return Counter(row.backend or "PEFT's own" for row in peft.explain(model).rows)


def adapted_layers(model: Any) -> int:
    """The number of layers with an adapter."""
    from peft.tuners.lora import LoraLayer

    return sum(isinstance(m, LoraLayer) for m in model.modules())


def trainable_digest(model: Any) -> str:
    """A hash of every trainable parameter: equal for equal adapters."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()


def _target_modules(model: Any, given: str) -> str | list[str]:
    if given == "all-linear":
        return given
    import torch
    from transformers.pytorch_utils import Conv1D

    linear = (torch.nn.Linear, Conv1D)
    names = [name for name, module in model.named_modules() if isinstance(module, linear)]
    targets = [t.strip() for t in given.split(",") if t.strip()]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            known = sorted({name.rsplit(".", 1)[-1] for name in names})
            raise CliError(
                f"--target-modules: the model has no linear layer {target!r}; "
                f"it has {', '.join(known)}"
            )
    if not targets:
        raise CliError("--target-modules: give all-linear or names of layers, like q_proj,v_proj")
    return targets
