"""How a PEFT layer becomes a fast one and back."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Iterator
from types import MethodType
from typing import Any

from peft.tuners.adalora.layer import SVDLinear
from peft.tuners.lora.layer import Embedding, Linear, ParamWrapper
from torch import nn

from ..bitsandbytes import disable_cpu_repacking
from .layers import FastLoraEmbedding, FastLoraLinear, FastParamWrapper, FastSVDLinear
from .plan.kept import KEPT
from .plan.reasons import LAST_REASON

# Set on a class made by `_rebased`: the class that it was made from.
_MADE_FROM = "_fastlora_made_from"


def swap_in(layer: nn.Module) -> None:
    """Makes `layer` a fast layer, where fastlora has a class for it, by changing its class."""
    if (fast := fast_class(layer)) is not None:
        _change_class(layer, fast)
        disable_cpu_repacking(layer)


def swap_out(layer: nn.Module) -> None:
    """Undoes `swap_in`, except for `disable_cpu_repacking`."""
    pairs = [(fast, stock) for stock, fast in _pairs()]
    if (stock := _counterpart(type(layer), pairs)) is not None:
        _change_class(layer, stock)
        for name in (LAST_REASON, KEPT):
            layer.__dict__.pop(name, None)


def fast_class(layer: nn.Module) -> type | None:
    """The class that `swap_in` would give to one of PEFT's own layers; None for all others."""
    return _counterpart(type(layer), _pairs())


def is_fast(layer: nn.Module) -> bool:
    """True for layers of our classes and of classes derived from them."""
    return any(isinstance(layer, fast) for _, fast in _pairs())


def not_linear_reason(layer: nn.Module | None) -> str | None:
    """Why a module is no fast layer around a linear one, as `plan` takes, or None."""
    if layer is None or not is_fast(layer):
        return "it is not on fastlora"
    if isinstance(layer, ParamWrapper):
        return "its adapter is on a parameter (target_parameters)"
    if isinstance(layer, Embedding):
        return "its adapter is on an embedding"
    return None


def bypass_reason(layer: nn.Module) -> str | None:
    """Why calling a fast layer does not reach the forward of its class, or None.

    A forward in the instance's `__dict__` hides the class's. Accelerate's hooks keep the method
    that they replaced and call it, and `swap_in` renews that one.
    """
    inner = layer.__dict__
    if "forward" not in inner:
        return None
    method = inner.get("_old_forward", inner["forward"])
    if getattr(method, "__func__", None) is type(layer).forward:
        return None
    return (
        "forward was replaced on the instance, which hides that of its class; call "
        "fastlora.accelerate before whatever replaces it"
    )


def _change_class(layer: nn.Module, kind: Any) -> None:
    inner = layer.__dict__
    for name in ("forward", "_old_forward"):
        if getattr(inner.get(name), "__func__", None) is type(layer).forward:
            inner[name] = MethodType(kind.forward, layer)
    layer.__class__ = kind


def _pairs() -> Iterator[tuple[type, type]]:
    """`(PEFT's class, ours)`; the 4-bit pair only where PEFT's class exists already."""
    yield Linear, FastLoraLinear
    yield ParamWrapper, FastParamWrapper
    yield Embedding, FastLoraEmbedding
    yield SVDLinear, FastSVDLinear
    stock = getattr(sys.modules.get("peft.tuners.lora.bnb"), "Linear4bit", None)
    if stock is not None:
        # Its base class needs bitsandbytes, which is slow to import and absent on many machines.
        from .layers_bnb import FastLoraLinear4bit

        yield stock, FastLoraLinear4bit


def _counterpart(kind: type, pairs: Iterable[tuple[type, type]]) -> type | None:
    """The counterpart of class `kind` on the other side of `pairs`, or None.

    `fully_shard` puts a module into a class of its own, `(FSDPModule, <class of the module>)`. Its
    counterpart is a copy with the last base exchanged.
    """
    for old, new in pairs:
        if kind is old:
            return new
        if kind.__bases__[1:] == (old,) and kind.__bases__[0].__module__.startswith("torch."):
            return vars(kind).get(_MADE_FROM) or _rebased(kind, old, new)
    return None


@functools.cache
def _rebased(kind: type, old: type, new: type) -> type:
    """A copy of class `kind` with `new` in the place of its base class `old`."""
    body = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
    bases = tuple(new if base is old else base for base in kind.__bases__)
    return type(kind.__name__, bases, {**body, _MADE_FROM: kind})
