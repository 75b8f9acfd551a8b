"""The inputs of every provider, and a layer made from them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ... import ops, reference
from ...quant import QuantState
from ..options import torch_dtype
from .case import Layer

# All copies of a weight together exceed the last-level cache, so that weights come from memory as
# they do in a model.
_COLD_BYTES = 96 * 2**20
_MOST_COPIES = 16
# Above this many tokens, reading the weight from memory no longer matters.
ROTATE_UP_TO = 256


@dataclass
class Built:
    """One copy of a layer, ready to be called.

    Args:
        call: x [M, K] -> y [M, N].
        adapter: (A, B), which get gradients; empty for a frozen layer.
        train: switches dropout on and off.
    """

    call: Callable[[Tensor], Tensor]
    adapter: tuple[Tensor, ...]
    train: Callable[[bool], Any]


@dataclass
class Setup:
    """The inputs of every provider: the same values, drawn once.

    `weights` holds separate copies of one weight, dense or packed.

    Args:
        layer: sizes and dtypes.
        copies: of the weight; None means more than fit into a cache.
        device: of the tensors; their values don't depend on it.
    """

    layer: Layer
    copies: int | None = None
    device: str = "cpu"
    weights: list[tuple[Tensor, QuantState | None]] = field(init=False)
    lora_A: Tensor = field(init=False)
    lora_B: Tensor = field(init=False)

    def __post_init__(self) -> None:
        layer = self.layer
        self.dtype: torch.dtype = torch_dtype(layer.dtype)
        self._generator = torch.Generator().manual_seed(0)
        weight = self._normal(layer.N, layer.K).mul_(layer.K**-0.5).to(self.dtype)
        state = None
        if layer.quant != "none":
            weight, state = ops.quantize_4bit(weight, 64, layer.quant, layer.nested)
        copies = self.copies or min(_MOST_COPIES, -(-_COLD_BYTES // layer.weight_bytes))
        self.weights = [(weight, state)]
        self.weights += [(weight.clone(), copy.deepcopy(state)) for _ in range(copies - 1)]
        # Rounded to x's dtype, so that fp32 adapters and cast ones have the same values.
        self.lora_A = self._normal(layer.R, layer.K).mul_(layer.K**-0.5).to(self.dtype).float()
        self.lora_B = (
            self._normal(layer.N, layer.R).mul_(max(1, layer.R) ** -0.5).to(self.dtype).float()
        )
        self._tokens: dict[int, tuple[Tensor, Tensor]] = {}

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator).to(self.device)

    def tokens(self, M: int) -> tuple[Tensor, Tensor]:
        """x [M, K] and dy [M, N]."""
        if M not in self._tokens:
            layer = self.layer
            self._tokens[M] = (
                self._normal(M, layer.K).to(self.dtype),
                self._normal(M, layer.N).to(self.dtype),
            )
        return self._tokens[M]

    @cached_property
    def dense(self) -> list[Tensor]:
        """Copies of the weight as a dense matrix, a 4-bit one decoded."""
        weight, state = self.weights[0]
        if state is None:
            return [weight for weight, _ in self.weights]
        # Decoded by the reference, because the timed results are compared with it.
        decoded = reference.dequantize_4bit(weight, state, self.dtype)
        size = decoded.numel() * decoded.element_size()
        copies = min(len(self.weights), -(-_COLD_BYTES // size))
        return [decoded, *(decoded.clone() for _ in range(copies - 1))]

    @cached_property
    def output(self) -> Tensor:
        """A buffer for a dense weight, shared by all calls."""
        return torch.zeros(self.layer.N, self.layer.K, dtype=self.dtype, device=self.device)

    @cached_property
    def exact_weight(self) -> Tensor:
        """The weight in float64, after rounding to x's dtype."""
        return self.dense[0].double()

    def adapter(self, dtype: str) -> tuple[Tensor, Tensor]:
        """New leaves A and B in a dtype of DTYPES."""
        A, B = (
            t.to(torch_dtype(dtype), copy=True).requires_grad_() for t in (self.lora_A, self.lora_B)
        )
        return A, B


def no_modes(training: bool) -> None:
    """`Built.train` of a layer without dropout."""
