"""LoRA around a base layer in 4 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import ops
from ..quant import QuantState
from .layer import LoraModule, check_linear
from .linear4bit import Linear4bit
from .options import LoraOptions, QLoraOptions, split

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class QLoraLinear(LoraModule):
    """`y = x W^T + bias + scaling * drop(x) A^T B^T`, W frozen in 4 bits.

    Args:
        in_features, out_features, bias, device: of the base layer, as nn.Linear's. Its weight is
            drawn as nn.Linear's and quantised, to be replaced by a state dict. For "mxfp4",
            in_features is a multiple of 32.
        dtype: of the weight before it is quantised, and of the bias.
        options: see `LoraOptions` and `QuantOptions`.

    Raises:
        ValueError: an option is out of range.
    """

    base_layer: Linear4bit

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[QLoraOptions],
    ) -> None:
        super().__init__()
        quant, lora = split(options)
        linear = nn.Linear(in_features, out_features, bias, device, dtype)
        self._attach(Linear4bit.from_linear(linear, **quant), **lora)

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options: Unpack[QLoraOptions]) -> Self:
        """A QLoRA layer with the quantised weight of `linear`, whose bias it shares.

        Args:
            linear: fp32, bf16 or fp16.
            options: see `LoraOptions` and `QuantOptions`.

        Raises:
            TypeError: `linear` computes something other than nn.Linear.
            ValueError: an option is out of range.
        """
        check_linear(linear)
        quant, lora = split(options)
        return cls._around(Linear4bit.from_linear(linear, **quant), **lora)

    @classmethod
    def from_linear4bit(cls, linear: nn.Module, **lora: Unpack[LoraOptions]) -> Self:
        """A QLoRA layer around the weight of a bitsandbytes Linear4bit, whose memory it shares.

        Raises:
            ValueError: the weight is not quantised yet, or was repacked in place by bitsandbytes;
                or an option is out of range.
        """
        weight, bias = linear.weight, linear.bias
        # Under FSDP the weight is a plain parameter, and only the module holds the state.
        state = getattr(weight, "quant_state", None) or getattr(linear, "quant_state", None)
        if state is None:
            raise ValueError(
                "linear must hold a quantised weight, got one without quant_state; bitsandbytes "
                "quantises on `.to(device)`"
            )
        compute_dtype = getattr(linear, "compute_dtype", None)
        return cls._around(Linear4bit(weight, state, bias, compute_dtype), **lora)  # type: ignore[arg-type]

    def _base_options(self) -> dict[str, Any]:
        return {
            "quant_state": self.base_layer.quant_state,
            "compute_dtype": self.base_layer.compute_dtype,
        }

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if self._original is not None:
            device = self.base_layer.weight.device
            packed, state = self._original
            self._original = packed.to(device), state.to(device)
        return self

    def _dense_weight(self) -> Tensor:
        return ops.dequantize_4bit(
            self.base_layer.weight, self.base_layer.quant_state, torch.float32
        )

    def _stored(self) -> tuple[Tensor, QuantState]:
        return self.base_layer.weight.data, self.base_layer.quant_state

    def _store(self, exact: Tensor) -> None:
        old = self.base_layer.quant_state
        packed, state = ops.quantize_4bit(exact, old.blocksize, old.quant_type, old.nested)
        state.dtype = old.dtype
        self._restore((packed, state))

    def _restore(self, original: tuple[Tensor, QuantState]) -> None:
        self.base_layer.weight.data, self.base_layer.quant_state = original
