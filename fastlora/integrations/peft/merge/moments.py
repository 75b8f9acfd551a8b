"""The second moments of what reaches a model's 4-bit layers, collected when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ... import bitsandbytes as bnb


class InputMoments(Mapping[str, Tensor]):
    """Layer name -> `H = x^T x` over the inputs x of the layer, `[K, K]` fp32.

    Asked for a layer, it runs the batches through the model, and keeps the moments of that layer
    and of those after it, as many as the budget holds. Asked in the order of the model while layers
    are being merged, the inputs are the outputs of the layers merged before.

    Args:
        model: a model with 4-bit layers, PEFT's or not. It is called as it is: put it in eval mode.
        batches: keyword arguments of its calls, gone through several times.
        budget: bytes for the moments that are held at a time; one layer's may exceed it.
    """

    def __init__(
        self, model: nn.Module, batches: Sequence[Mapping[str, Any]], budget: int = 1 << 31
    ) -> None:
        self._model, self._batches, self._budget = model, batches, budget
        # By the name of PEFT's layer around it, where there is one; the inputs are the same.
        self._layers = {
            name.removesuffix(".base_layer"): module
            for name, module in model.named_modules()
            if bnb.is_linear4bit(module)
        }
        self._held: dict[str, Tensor] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __contains__(self, name: object) -> bool:
        return name in self._layers

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._layers:
            raise KeyError(name)
        if name not in self._held:
            self._collect(self._from(name))
        return self._held[name]

    def _from(self, name: str) -> list[str]:
        """`name` and the layers after it that the budget holds."""
        names = list(self._layers)
        names, size = names[names.index(name) :], 0
        for count, each in enumerate(names):
            size += 4 * int(self._layers[each].in_features) ** 2
            if count and size > self._budget:
                return names[:count]
        return names

    @torch.no_grad()
    def _collect(self, names: list[str]) -> None:
        self._held.clear()
        # A hook on the Linear4bit inside would keep PEFT's layer off fastlora's kernels.
        hooks = [
            self._model.get_submodule(name).register_forward_pre_hook(partial(self._note, name))
            for name in names
        ]
        try:
            for batch in self._batches:
                self._model(**batch)
        finally:
            for hook in hooks:
                hook.remove()
        if missing := [name for name in names if name not in self._held]:
            raise ValueError(f"batches must reach every layer, {missing[0]} got no input")

    def _note(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].reshape(-1, args[0].shape[-1]).float()
        if name in self._held:
            self._held[name].addmm_(x.mT, x)
        else:
            self._held[name] = x.mT @ x
