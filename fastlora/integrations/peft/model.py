"""The drop-in for PEFT: `accelerate`, `restore`, `explain`, `register`, `patch_peft` and its undo.

All ways in lead to two subclasses of PEFT's own layers, `FastLoraLinear` and `FastLoraLinear4bit`,
which override `forward` alone. Their state is PEFT's, so parameters, state dicts, saving, merging
and switching adapters are PEFT's own. `fast_path` decides for each call whether fastlora's forward
or PEFT's runs.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.model import LoraModel
from torch import nn

from .. import bitsandbytes as bnb
from . import inputs
from .explanation import explain
from .fuse.join import Fuse, check_fuse, join_mlps, separate
from .names import check_module
from .swap import swap_in, swap_out

_Model = TypeVar("_Model", bound=nn.Module)


def accelerate(
    model: _Model,
    *,
    fuse: Fuse | None = None,
    copy_inputs: Iterable[str] | None = None,
    verbose: bool | None = None,
) -> _Model:
    """Runs the LoRA layers of a PEFT model on fastlora; `restore` undoes it.

    Changes the class of each layer in place and nothing else: parameters, names, state dict, hooks
    and every method of PEFT stay. A call to which fastlora does not apply runs PEFT's own code;
    `explain` says which and why. bitsandbytes' in-place repacking of 4-bit weights in eval mode is
    switched off for the whole model, and undone where it has happened and nothing was lost.

    A backward that is differentiated itself (`create_graph=True`) runs in plain torch.

    Args:
        model: a `PeftModel`, its base model, or any module with PEFT's LoRA layers inside. Calling
            it again after adding adapters to new layers is fine.
        fuse: "mlp" runs each gated MLP, `down(act(gate(x)) * up(x))`, as one autograd node, which
            keeps x and the outputs of gate and up alone for the backward. None, the default, joins
            nothing.
        copy_inputs: names of layers, or their last parts, whose input the model changes in place
            after the call (`h += f(h)`): they work on a copy, as PEFT's layers do where they cast
            or drop. Without, the backward of such a layer raises an error that names it. None
            leaves it as an earlier call has set it.
        verbose: True prints one line to stderr, False does not; None prints it on the first process
            of a run, unless FASTLORA_QUIET=1 is set.

    Returns:
        The same model.

    Raises:
        TypeError: model is no nn.Module.
        ValueError: fuse is neither None nor "mlp"; copy_inputs names no LoRA layer; a 4-bit weight
            was repacked in eval mode and cannot be restored. The model is left as it was.
    """
    check_module(model)
    check_fuse(fuse)
    copying = inputs.find_layers(model, copy_inputs or ())
    damaged = [(name, m) for name, m in bnb.linear4bit_modules(model) if bnb.is_repacked(m)]
    for name, module in damaged:
        if (reason := bnb.unpack_reason(module)) is not None:
            raise ValueError(f"model: layer {name}: {reason}")
    for _, module in damaged:
        bnb.unpack(module)
    bnb.disable_cpu_repacking(model)

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        swap_in(layer)
    inputs.name_layers(model)
    if copy_inputs is not None:
        inputs.copy_none(model)
        inputs.copy_inputs(copying)
    join_mlps(model, fuse)
    if not layers:
        warnings.warn(
            "fastlora.accelerate: the model has no LoRA layers; call it after get_peft_model",
            stacklevel=2,
        )
    if _shall_print(verbose):
        print(explain(model).summary(), file=sys.stderr)
    return model


def restore(model: _Model) -> _Model:
    """Undoes `accelerate`, `register` and `patch_peft` for the layers of `model`, in place.

    Raises:
        TypeError: model is no nn.Module.
    """
    check_module(model)
    separate(model)
    inputs.copy_none(model)
    for module in model.modules():
        swap_out(module)
    bnb.restore_cpu_repacking(model)
    return model


def register(lora_config: LoraConfig) -> LoraConfig:
    """Makes PEFT build fastlora's layers from `lora_config`, for trainers that call it themselves.

    PEFT still chooses and builds each layer; then those for which fastlora has a class change it.
    Nothing of it is saved with the adapter. A copy by `dataclasses.replace` is registered, too; one
    that is made anew from a dictionary is not: `patch_peft` serves trainers that do so.

    Args:
        lora_config: the config to hand to the trainer.

    Returns:
        The same config.

    Raises:
        TypeError: lora_config is no LoraConfig.
    """
    if not isinstance(lora_config, LoraConfig):
        raise TypeError(f"lora_config must be a peft.LoraConfig, got {type(lora_config).__name__}")
    if type(lora_config) is LoraConfig:
        lora_config.__class__ = RegisteredLoraConfig
    builder = _LayerBuilder(lora_config)
    lora_config._register_custom_module({nn.Linear: builder, nn.Embedding: builder})
    return lora_config


class RegisteredLoraConfig(LoraConfig):
    """A `LoraConfig` that registers each copy of itself."""

    def __post_init__(self) -> None:
        super().__post_init__()
        register(self)


class _LayerBuilder:
    """Stands where PEFT expects a layer class: builds what PEFT would build, then swaps its class.

    `nn.Linear` has many subclasses that PEFT hands to layers of other kinds (8-bit, GPTQ, parameter
    wrappers), so a plain mapping from nn.Linear to FastLoraLinear would take too much.
    """

    def __init__(self, lora_config: LoraConfig) -> None:
        self.lora_config = lora_config

    def __call__(
        self, target: nn.Module, adapter_name: str, config: LoraConfig | None = None, **kwargs: Any
    ) -> nn.Module:
        # PEFT 0.18 does not pass the config on.
        config = config or self.lora_config
        registered = config._custom_modules
        others = {key: value for key, value in (registered or {}).items() if value is not self}
        config._custom_modules = others or None
        try:
            layer: nn.Module = LoraModel._create_new_module(config, adapter_name, target, **kwargs)
        finally:
            config._custom_modules = registered
        swap_in(layer)
        return layer


class _SwappingBuild:
    """`LoraModel._create_new_module` with the class of what it builds swapped."""

    def __init__(self, build: Callable[..., nn.Module]) -> None:
        self.__wrapped__ = build

    def __call__(self, *args: Any, **kwargs: Any) -> nn.Module:
        layer = self.__wrapped__(*args, **kwargs)
        swap_in(layer)
        return layer


def patch_peft() -> None:
    """Makes PEFT build fastlora's layers in this process from now on, whoever calls it.

    Models that exist already do not change. Calling it twice is the same as calling it once.
    """
    if _our_patch(LoraModel._create_new_module) is None:
        build = _SwappingBuild(LoraModel._create_new_module)
        LoraModel._create_new_module = staticmethod(build)


def unpatch_peft() -> None:
    """Undoes `patch_peft`. Layers built meanwhile stay as they are; see `restore`.

    Raises:
        RuntimeError: something else has patched the same function since.
    """
    ours = _our_patch(LoraModel._create_new_module)
    if ours is None:
        return
    if ours is not LoraModel._create_new_module:
        raise RuntimeError(
            "peft.tuners.lora.model.LoraModel._create_new_module was patched again after "
            "fastlora.patch_peft(); undo that patch first"
        )
    LoraModel._create_new_module = staticmethod(ours.__wrapped__)


def _our_patch(build: Any) -> _SwappingBuild | None:
    """Our patch in the chain of functions that wrap each other, or None."""
    while build is not None and not isinstance(build, _SwappingBuild):
        build = getattr(build, "__wrapped__", None)
    return build


def _shall_print(verbose: bool | None) -> bool:
    if verbose is not None:
        return verbose
    quiet = os.environ.get("FASTLORA_QUIET", "0") not in ("", "0")
    return not quiet and os.environ.get("RANK", "0") == "0"
