"""LoRA around nn.Linear."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .layer import LoraModule, check_linear
from .options import LoraOptions

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class LoraLinear(LoraModule):
    """`y = x W^T + bias + scaling * drop(x) A^T B^T`, W frozen.

    Args:
        in_features, out_features, bias, device, dtype: of the base layer, as nn.Linear's.
        lora: see `LoraOptions`.

    Raises:
        ValueError: an option is out of range.
    """

    base_layer: nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **lora: Unpack[LoraOptions],
    ) -> None:
        super().__init__()
        self._attach(nn.Linear(in_features, out_features, bias, device, dtype), **lora)

    @classmethod
    def from_linear(cls, linear: nn.Linear, **lora: Unpack[LoraOptions]) -> Self:
        """A LoRA layer around `linear`, which becomes its `base_layer` and is frozen.

        Raises:
            TypeError: `linear` computes something other than nn.Linear.
            ValueError: an option is out of range.
        """
        check_linear(linear)
        return cls._around(linear, **lora)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if self._original is not None:
            self._original = fn(self._original)
        return self

    def _dense_weight(self) -> Tensor:
        return self.base_layer.weight.detach()

    def _stored(self) -> Tensor:
        return self.base_layer.weight.data

    def _store(self, exact: Tensor) -> None:
        self.base_layer.weight.data = exact.to(self.base_layer.weight.dtype)

    def _restore(self, original: Tensor) -> None:
        self.base_layer.weight.data = original
