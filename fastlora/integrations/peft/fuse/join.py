"""Finds the gated MLPs of a model that can run as one node, joins them, and reports it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from ..swap import not_linear_reason
from .mlp import GATED, GatedMLP, activation_of, join, separate_mlp
from .source import GatedSource, gated_mlp

Fuse = Literal["mlp"]
# On a module that is a gated MLP with LoRA layers: their names, and why they were not joined.
_REASON = "_fastlora_not_fused"


@dataclass(frozen=True)
class Fusion:
    """The LoRA layers of a gated MLP, which run as one node, or might.

    Args:
        name: the module that they belong to.
        layers: their names: gate, up and down.
        reason: why they are not joined, "" where they are.
        last_call: why the latest call did not run them as one: "" where it did, None before a call.
    """

    name: str
    layers: tuple[str, ...]
    reason: str
    last_call: str | None

    @property
    def fused(self) -> bool:
        """True when the layers run as one node."""
        return not self.reason

    @property
    def note(self) -> str:
        """What is printed of them."""
        return note_of(self.reason, self.last_call)


def note_of(reason: str, last_call: str | None) -> str:
    """What is printed of a layer, or of layers that might run as one; "" when all is well."""
    return reason or (f"in the latest call: {last_call}" if last_call else "")


def check_fuse(how: str | None) -> None:
    """Raises ValueError unless `how` is None or "mlp"."""
    if how not in (None, "mlp"):
        raise ValueError(f'fuse must be None or "mlp", got {how!r}')


def join_mlps(model: nn.Module, how: Fuse | None) -> None:
    """Joins the gated MLPs of `model` if `how` says so, after undoing what was joined before.

    Warns where it finds no MLP to join.
    """
    separate(model)
    if how is None:
        return
    found = [_join(module) for module in list(model.modules())]
    if not any(found):
        warnings.warn(
            'fuse="mlp": no module with LoRA layers has the forward '
            "`down(act(gate(x)) * up(x))`, so nothing is joined",
            stacklevel=3,
        )


def separate(model: nn.Module) -> None:
    """Undoes `join_mlps`."""
    for module in model.modules():
        module.__dict__.pop(_REASON, None)
        separate_mlp(module)


def _join(module: nn.Module) -> bool:
    """Joins `module` or keeps why not; False for a module that is no gated MLP of LoRA layers."""
    children = [child for child in module._modules.values() if child is not None]
    if all(not_linear_reason(child) is not None for child in children):
        return False
    source = gated_mlp(module)
    if source is None:
        return False
    found = _as_mlp(module, source)
    if isinstance(found, str):
        names = source.gate, source.up, source.down
        module.__dict__[_REASON] = names, found
    else:
        join(module, found)
    return True


def _as_mlp(module: nn.Module, source: GatedSource) -> GatedMLP | str:
    """How to run a gated MLP as one node, or why not."""
    for name in (source.gate, source.up, source.down):
        if (reason := not_linear_reason(module._modules.get(name))) is not None:
            return f"{name}: {reason}"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    activation = activation_of(module, source)
    if activation is None:
        return "its activation is neither SiLU nor GELU"
    named = isinstance(source.activation, str)
    act = module._modules.get(source.activation) if named else None
    kind: Any = type(module)
    return GatedMLP(source, activation, act, kind.forward)


def fusions(model: nn.Module) -> list[Fusion]:
    """What `join_mlps` has joined in `model`, and what it has left alone, with the reason."""
    found = []
    for name, module in model.named_modules():
        if (left := module.__dict__.get(_REASON)) is not None:
            layers, reason = left
            found.append(Fusion(name, layers, reason, None))
        if (mlp := module.__dict__.get(GATED)) is not None:
            found.append(Fusion(name, mlp.names, "", mlp.last))
    return found
