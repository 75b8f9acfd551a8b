"""Finds the LoRA layers of a model that can run as one node, fuses them, and reports it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..plan.reasons import SHARED
from ..swap import not_linear_reason
from .mlp import GATED, GatedMLP, activation_of, join, separate_mlp
from .shared import SharedInput, Slot
from .source import gated_mlp, is_readable, shared_inputs

Fuse = Literal["inputs", "mlp"]
FUSE = ("inputs", "mlp")
# On a module with several LoRA layers: why none of them were joined.
_REASON = "_fastlora_not_fused"


@dataclass(frozen=True)
class Fusion:
    """LoRA layers that run as one node, or might.

    Args:
        name: the module that they belong to.
        layers: their names, in the order of their calls.
        kind: "inputs": they share x; "mlp": gate, up and down of a gated MLP.
        reason: why they are not joined, "" where they are.
        last_call: why the latest call did not run them as one: "" where it did, None before a call.
    """

    name: str
    layers: tuple[str, ...]
    kind: str
    reason: str
    last_call: str | None

    @property
    def fused(self) -> bool:
        """True when the layers run as one node."""
        return not self.reason

    @property
    def note(self) -> str:
        """What is printed of them."""
        return self.reason or (f"in the latest call: {self.last_call}" if self.last_call else "")


def check_fuse(how: str | None) -> None:
    """Raises ValueError unless `how` is None or one of `FUSE`."""
    if how is not None and how not in FUSE:
        raise ValueError(f"fuse must be None or one of {', '.join(FUSE)}, got {how!r}")


def join_layers(model: nn.Module, how: Fuse | None, example: Any = None) -> None:
    """Joins layers of `model`, after undoing what was joined before.

    Args:
        model: a module with fast layers inside.
        how: "inputs": layers that share an input; "mlp": gated MLPs as a whole, too; None: nothing.
        example: inputs of one call of `model`, a tensor, a tuple or a mapping, to see who shares an
            input; None reads it from the source of the modules.
    """
    separate(model)
    if how is None:
        return
    slot = Slot()
    groups = _read(model) if example is None else _recorded(model, example)
    for group in groups:
        SharedInput(group, slot)
    joined = {id(layer) for group in groups for layer in group}
    for module in list(model.modules()):
        children = _fast_children(module)
        if how == "mlp" and len(children) > 2 and (reason := _join_mlp(module)) is not None:
            module.__dict__[_REASON] = "mlp", tuple(children), reason
        elif len(children) > 1 and not any(id(layer) in joined for layer in children.values()):
            reason = "none of these layers share an input"
            if example is None and not is_readable(module):
                reason = "the source of its forward can't be read; pass example="
            module.__dict__[_REASON] = "inputs", tuple(children), reason


def separate(model: nn.Module) -> None:
    """Undoes `join_layers`."""
    for module in model.modules():
        module.__dict__.pop(_REASON, None)
        separate_mlp(module)
        if (group := module.__dict__.get(SHARED)) is not None:
            group.dissolve()


def _fast_children(module: nn.Module) -> dict[str, nn.Module]:
    children = module._modules.items()
    return {
        name: child
        for name, child in children
        if child is not None and not_linear_reason(child) is None
    }


def _read(model: nn.Module) -> list[list[nn.Module]]:
    groups = []
    for module in model.modules():
        children = _fast_children(module)
        groups += [[children[name] for name in names] for names in shared_inputs(module, children)]
    return groups


@torch.no_grad()
def _recorded(model: nn.Module, example: Any) -> list[list[nn.Module]]:
    """Fast layers that one call of `model` has called in a row with the same x.

    The call is made in eval mode, and draws nothing from torch's generators that would be missed.
    """
    calls: list[tuple[nn.Module, Tensor, int]] = []

    def note(layer: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            calls.append((layer, args[0], args[0]._version))

    modes = [(module, module.training) for module in model.modules()]
    fast = [module for module in model.modules() if not_linear_reason(module) is None]
    hooks = [layer.register_forward_pre_hook(note) for layer in fast]
    try:
        model.eval()
        devices = {p.device.index for p in model.parameters() if p.is_cuda}
        with torch.random.fork_rng(sorted(devices)):
            if isinstance(example, Mapping):
                model(**example)
            else:
                model(*(example if isinstance(example, tuple) else (example,)))
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
    groups: list[list[nn.Module]] = []
    grouped: set[int] = set()
    last: tuple[Tensor, int] | None = None
    for layer, x, version in calls:
        if id(layer) in grouped:
            last = None  # what was joined runs in between
            continue
        grouped.add(id(layer))
        if last is not None and last[0] is x and last[1] == version:
            groups[-1].append(layer)
        else:
            groups.append([layer])
        last = x, version
    return [group for group in groups if len(group) > 1]


def _join_mlp(module: nn.Module) -> str | None:
    """Joins a gated MLP; why not where it looks like one, None also where it does not."""
    source = gated_mlp(module)
    if source is None:
        return None
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
    join(module, GatedMLP(source, activation, act, kind.forward))
    return None


def fusions(model: nn.Module) -> list[Fusion]:
    """What `join_layers` has joined in `model`, and what it has left alone, with the reason."""
    return list(_fusions(model))


def _fusions(model: nn.Module) -> Iterator[Fusion]:
    names = {id(module): name for name, module in model.named_modules()}
    seen: set[int] = set()
    for name, module in model.named_modules():
        if (left := module.__dict__.get(_REASON)) is not None:
            kind, layers, reason = left
            yield Fusion(name, layers, kind, reason, None)
        if (mlp := module.__dict__.get(GATED)) is not None:
            seen.update(id(module._modules[each].__dict__.get(SHARED)) for each in mlp.names)
            yield Fusion(name, mlp.names, "mlp", "", mlp.last)
        group = module.__dict__.get(SHARED)
        if group is None or id(group) in seen:
            continue
        seen.add(id(group))
        full = [names.get(id(layer), "?") for layer in group.layers]
        parent = full[0].rpartition(".")[0]
        layers = tuple(each.removeprefix(f"{parent}.") for each in full)
        last = group.last
        if group.untaken:
            last = f"{group.untaken} of {len(full)} results were not used: other inputs came"
        yield Fusion(parent, layers, "inputs", "", last)
