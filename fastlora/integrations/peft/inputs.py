"""Layers whose input the model changes in place after the call, and that need a copy of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from ...autograd.common import LAYER_NAMES
from ..names import plain_name

_HANDLE = "_fastlora_copies_input"


def name_layers(model: nn.Module) -> None:
    """Lets the error of an input that was changed in place name its layer."""
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            for part in layer.adapter_layer_names:
                for parameter in getattr(layer, part).parameters():
                    LAYER_NAMES[parameter] = plain_name(name)


def find_layers(model: nn.Module, names: Iterable[str]) -> list[LoraLayer]:
    """The LoRA layers of these names, or of names that end in `.` and these.

    Raises:
        ValueError: a name is of no such layer.
    """
    if isinstance(names, str):
        raise ValueError(f"copy_inputs must be a list of names, got the string {names!r}")
    layers = {plain_name(n): m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    found: list[LoraLayer] = []
    for wanted in map(plain_name, names):
        these = [m for n, m in layers.items() if n == wanted or n.endswith(f".{wanted}")]
        if not these:
            known = sorted({name.rsplit(".", 1)[-1] for name in layers})
            raise ValueError(
                f"copy_inputs: the model has no LoRA layer {wanted!r}; it has {', '.join(known)}"
            )
        found += these
    return found


def copy_inputs(layers: Sequence[LoraLayer]) -> None:
    """Makes each layer work on a copy of its input."""
    for layer in layers:
        if _HANDLE not in layer.__dict__:
            layer.__dict__[_HANDLE] = layer.register_forward_pre_hook(_copied, with_kwargs=True)


def copy_none(model: nn.Module) -> None:
    """Undoes `copy_inputs`."""
    for module in model.modules():
        if (handle := module.__dict__.pop(_HANDLE, None)) is not None:
            handle.remove()


def _copied(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args and isinstance(args[0], Tensor):
        return (args[0].clone(), *args[1:]), kwargs
    if isinstance(x := kwargs.get("x"), Tensor):
        return args, {**kwargs, "x": x.clone()}
    return args, kwargs
