"""A gated MLP with LoRA layers, `down(act(gate(x)) * up(x))`, run as one autograd node."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ....autograd.common import autocast_off, draw_seed
from ....autograd.gated import gated_mlp
from ....reference import ACTIVATIONS, activate
from ..plan.call import Plan
from ..plan.plain import has_hooks
from ..plan.plan import plan
from ..plan.reasons import LAST_REASON
from ..run.linear import one_call
from ..run.tensors import cast
from ..swap import bypass_reason, not_linear_reason
from .source import GatedSource, global_of

# Under this name a module keeps its `GatedMLP`.
GATED = "_fastlora_mlp"


def activation_of(module: nn.Module, source: GatedSource) -> str | None:
    """The entry of `reference.ACTIVATIONS` that an MLP's activation computes, or None.

    Names differ between libraries, so the activation is asked: a module of torch or Transformers
    without state, or `torch.nn.functional`'s function, is run on a row of numbers.
    """
    found = source.activation
    if isinstance(found, str):
        found = getattr(module, found, None)
    if isinstance(found, nn.Module):
        home = type(found).__module__.split(".")[0]
        if home not in ("torch", "transformers") or found._modules or has_hooks(found):
            return None
        if "forward" in found.__dict__:
            return None
        if any(True for _ in found.parameters()) or any(True for _ in found.buffers()):
            return None
    elif found not in (nn.functional.silu, nn.functional.gelu):
        return None
    x = torch.linspace(-9, 9, 181, dtype=torch.float64, device="cpu")
    with torch.no_grad():
        y = found(x, **source.keywords)
        for name in ACTIVATIONS:
            # Two ways of writing one function differ in the last bits, two functions in the 4th.
            if torch.allclose(y, activate(x, name), rtol=0, atol=1e-9):
                return name
    return None


class GatedMLP:
    """What a module keeps under `GATED`: how to run its MLP as one node.

    Args:
        source: what its forward computes.
        activation: one of `reference.ACTIVATIONS`.
        act: the module that does, or None.
        forward: the forward that `source` was read from.
    """

    def __init__(
        self, source: GatedSource, activation: str, act: nn.Module | None, forward: Any
    ) -> None:
        self.names = (source.gate, source.up, source.down)
        self.up_first = source.up_first
        self.act_name = source.activation if isinstance(source.activation, str) else None
        self.activation = activation
        self.act = act
        self.act_forward: Any = None if act is None else type(act).forward
        self.forward = forward
        self.dotted, self.function = source.dotted, source.activation
        # Why the latest call ran the module's own forward; None before any, "" when it did not.
        self.last: str | None = None

    def run(
        self,
        module: nn.Module,
        stock: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """One forward of `module`: the MLP as one node, or `stock`, its own forward."""
        layers = [module._modules.get(name) for name in self.names]
        if any(not_linear_reason(layer) is not None for layer in layers):
            separate_mlp(module)  # merged, or restored one by one
            return stock(*args, **kwargs)
        found = self._plans(module, layers, args, kwargs)
        self.last = found if isinstance(found, str) else ""
        if isinstance(found, str):
            return stock(*args, **kwargs)
        for layer in layers:
            layer.__dict__[LAST_REASON] = ""
        return self._run(found, args[0])

    def _plans(
        self, module: nn.Module, layers: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Plan, ...] | str:
        """The plans of gate, up and down, or why the module's own forward has to run."""
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
            return "the call has other arguments than one tensor"
        if self.act_name is not None and module._modules.get(self.act_name) is not self.act:
            return "the activation was replaced"
        own: Any = _own_class(type(module))
        if own.forward is not self.forward:
            return "its class has another forward since"
        if self.dotted and global_of(self.forward, self.dotted) is not self.function:
            return "the activation was replaced"
        if self.act is not None:
            if has_hooks(self.act):
                return "the activation has hooks, which fastlora would not call"
            replaced = "forward" in self.act.__dict__
            if replaced or type(self.act).forward is not self.act_forward:
                return "the activation has another forward since"
        x, plans = args[0], []
        for name, layer in zip(self.names, layers, strict=True):
            reason = _closed(layer)
            found: Plan | str = reason if reason is not None else plan(layer, x, (), {})
            if not isinstance(found, str) and (reason := found.apart_reason) is not None:
                found = reason
            if isinstance(found, str):
                return f"{name}: {found}"
            plans.append(found)
            if len(plans) == 2:
                # The input of down: only its dtype, device and width are looked at.
                dtype, width = plans[0].casts.x, plans[0].parts.shape[0]
                x = x.new_empty((0, width), dtype=dtype)
        gate, up, down = plans
        if (gate.parts.quant_state is None) != (up.parts.quant_state is None):
            return "one of gate and up is dense and one in 4 bits"
        if gate.casts != up.casts or down.casts.x != gate.casts.x:
            return "the dtypes of its layers differ"
        return gate, up, down

    def _run(self, plans: tuple[Plan, ...], x: Tensor) -> Tensor:
        with autocast_off(x.device):
            layers = [one_call(each, x) for each in plans]
            x = cast(x, plans[0].casts.x)
            # Each dropout draws its seed when PEFT's would: in the order of the calls.
            for i in (1, 0, 2) if self.up_first else (0, 1, 2):
                if layers[i].dropout_p != 0.0:
                    layers[i] = layers[i]._replace(seed=draw_seed(x))
            gate, up, down = layers
            return gated_mlp(x, gate, up, down, self.activation)


class _Gated(nn.Module):
    """Stands before the class of a module, whose forward it hands to what `GATED` holds."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        stock: Any = super().forward
        # A compiled forward is the module's own: the compiler fuses what lies between the layers.
        mlp = None if torch.compiler.is_compiling() else self.__dict__.get(GATED)
        return stock(*args, **kwargs) if mlp is None else mlp.run(self, stock, args, kwargs)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        names = mlp.names if (mlp := self.__dict__.get(GATED)) is not None else ()
        if any(not_linear_reason(self._modules.get(name)) is not None for name in names):
            separate_mlp(self)  # merged: what is saved must load without fastlora
            return self.__reduce_ex__(protocol)
        # A class made at run time has no name that a pickle could look up.
        return _rebuilt, (_own_class(type(self)),), self.__dict__


@functools.cache
def _gated_class(kind: Any) -> Any:
    body = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (_Gated, kind), body)


def _own_class(gated: type) -> type:
    """The class that a gated one was derived from."""
    order = gated.__mro__
    return order[order.index(_Gated) + 1]


def _rebuilt(kind: type) -> Any:
    gated = _gated_class(kind)
    return gated.__new__(gated)


def join(module: nn.Module, mlp: GatedMLP) -> None:
    """Makes `module` run as `mlp`, by changing its class: to one derived from its own."""
    module.__dict__[GATED] = mlp
    kind: Any = type(module)
    module.__class__ = _gated_class(kind)


def separate_mlp(module: nn.Module) -> None:
    """Undoes `join`."""
    # A class that something else has derived since stays; its forward finds nothing to run.
    if module.__dict__.pop(GATED, None) is not None and type(module).__mro__[1] is _Gated:
        module.__class__ = _own_class(type(module))


def _closed(layer: Any) -> str | None:
    """Why the call of a layer must be a call of its own, and can't be a part of its parent's."""
    if (reason := not_linear_reason(layer)) is not None:
        return reason
    if has_hooks(layer):
        return "it has hooks, which fastlora would not call"
    if "_hf_hook" in layer.__dict__:
        return "accelerate's hooks wrap its forward"
    return bypass_reason(layer)
