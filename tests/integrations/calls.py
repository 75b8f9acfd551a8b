"""One call of a fast layer, and the layer as it was, for tests that change something in between."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import fastlora
from fastlora.integrations.peft.plan.kept import KEPT
from fastlora.integrations.peft.plan.reasons import LAST_REASON
from tests.integrations.models import MLP, MLP4bit, lora_layers, peft_model

# Whether `dense`, `four_bit` and `bf16` make the call once before they return it.
CALL_FIRST = False


@dataclass
class Call:
    """A layer and what it is called with."""

    layer: Any
    x: Tensor
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    # The same call on PEFT's own layer fails, so that there is nothing to compare.
    stock_raises: type[Exception] | None = None
    # The result of the call that was made before any change, and the layer as it was then.
    first: Tensor | None = None
    snapshot: Snapshot | None = None

    def result(self) -> Tensor:
        """One call, with the same dropout masks each time."""
        torch.manual_seed(0)
        with self.around():
            y: Tensor = self.layer(self.x, *self.args, **self.kwargs)
        return y.detach()

    @property
    def base(self) -> Any:
        return self.layer.base_layer

    @property
    def A(self) -> Any:
        return self.layer.lora_A["default"]

    @property
    def B(self) -> Any:
        return self.layer.lora_B["default"]


Case = Callable[[], Call]


def into(cases: list[tuple[str, str, Case]], reason: str) -> Callable[[Case], Case]:
    """Adds a case to `cases` under its function's name: it makes a call that gets this reason."""

    def register(function: Case) -> Case:
        cases.append((function.__name__, reason, function))
        return function

    return register


def begun(call: Call) -> Call:
    """`call`, after it has been made once if `CALL_FIRST`."""
    if CALL_FIRST:
        call.first = call.result()
        call.snapshot = Snapshot(call)
    return call


def dense(**options: Any) -> Call:
    model = peft_model(MLP(), **options).train()
    fastlora.accelerate(model, verbose=False)
    return begun(Call(lora_layers(model)[0], torch.randn(2, 5, 37)))


def four_bit(**options: Any) -> Call:
    model = peft_model(MLP4bit(**options)).train()
    fastlora.accelerate(model, verbose=False)
    return begun(Call(lora_layers(model)[0], torch.randn(2, 5, 64)))


def bf16() -> Call:
    model = peft_model(MLP()).train()
    fastlora.accelerate(model, verbose=False)
    layer = lora_layers(model)[0]
    layer.base_layer.to(torch.bfloat16)
    return begun(Call(layer, torch.randn(2, 5, 37, dtype=torch.bfloat16)))


class Snapshot:
    """All that a call depends on, to take changes back: the layer's modules, tensors and states."""

    def __init__(self, call: Call) -> None:
        self.call = replace(call)
        self.objects: list[tuple[Any, type, dict[str, Any]]] = []
        self.containers: list[tuple[Any, Any]] = []
        self.tensors: list[tuple[Tensor, Tensor, Tensor, bool]] = []
        for module in call.layer.modules():
            self._note(module)
            for parameter in module._parameters.values():
                if parameter is not None:
                    self._note(parameter)
                    self._note_values(parameter)
                state = getattr(parameter, "quant_state", None)
                while state is not None:
                    self._note(state)
                    self._note_values(state.absmax)
                    state = state.state2

    def _note(self, found: Any) -> None:
        self.objects.append((found, type(found), dict(found.__dict__)))
        for value in found.__dict__.values():
            if isinstance(value, dict | list):
                self.containers.append((value, copy.copy(value)))

    def _note_values(self, tensor: Tensor) -> None:
        self.tensors.append((tensor, tensor.data, tensor.data.clone(), tensor.requires_grad))

    def restore(self) -> Call:
        """The call as it was; what the layer has kept since stays with it."""
        layer = self.call.layer
        own = layer.__dict__
        ours = {name: own[name] for name in (KEPT, LAST_REASON) if name in own}
        for found, kind, state in self.objects:
            found.__class__ = kind
            found.__dict__.clear()
            found.__dict__.update(state)
        for container, items in self.containers:
            container.clear()
            container.update(items) if isinstance(container, dict) else container.extend(items)
        for parameter, data, values, requires_grad in self.tensors:
            parameter.data = data
            parameter.data.copy_(values)
            parameter.requires_grad_(requires_grad)
        layer.__dict__.update(ours)
        return replace(self.call)
