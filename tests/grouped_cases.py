"""Calls of the grouped ops: their sizes, their inputs, and what the plain sequence makes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastlora import reference
from fastlora.layer import Layer
from fastlora.quant import QuantState
from tests.cases import Base, autograd_results


@dataclass(frozen=True)
class Case:
    """Sizes of one call; `ends` are the offsets."""

    name: str
    ends: tuple[int, ...]
    M: int
    N: int
    K: int
    R: int
    dropout_p: float = 0.0

    def __str__(self) -> str:
        return self.name


# N K is a whole number of blocks, of 256 elements at most, and no multiple of 256 blocks of 64.
CASES = (
    Case("no tokens", (0, 0, 0), 0, 32, 24, 4, 0.1),
    Case("one token, four experts", (0, 0, 1, 1), 1, 96, 80, 8),
    Case("empty first, middle and last expert", (0, 7, 7, 24, 24), 24, 40, 96, 3, 0.2),
    Case("rows after the last expert", (5, 9), 17, 48, 112, 5, 0.1),
    Case("one long expert among short ones", (1, 130, 133, 140, 141), 141, 72, 160, 8, 0.05),
    Case("more experts than rows", tuple(range(1, 20)) + (19,) * 12, 19, 33, 128, 2, 0.3),
    Case("one expert, rank above N", (33,), 33, 16, 208, 64, 0.5),
    Case("everything dropped", (3, 12), 12, 32, 40, 4, 1.0),
)


@dataclass
class Inputs:
    """Tensors of one call; `weight` is packed where `state` is given."""

    x: Tensor
    weight: Tensor
    state: QuantState | None
    offsets: Tensor
    lora_A: Tensor
    lora_B: Tensor
    dy: Tensor
    compute: torch.dtype | None
    scaling: float = 1.5

    dropout_p: float = 0.0

    @property
    def seed(self) -> Tensor:
        return torch.tensor([0x1234_5678_9ABC_DEF])

    @property
    def layer(self) -> Layer:
        """The stack that the call is of."""
        return Layer(
            self.weight,
            self.lora_A,
            self.lora_B,
            self.scaling,
            quant_state=self.state,
            compute_dtype=self.compute,
            dropout_p=self.dropout_p,
            seed=self.seed,
            offsets=self.offsets,
        )


def make_inputs(case: Case, base: Base, dtypes: tuple[Any, Any, Any]) -> Inputs:
    x_dtype, adapter_dtype, compute = dtypes
    E, M, N, K, R = len(case.ends), case.M, case.N, case.K, case.R
    weight, state = torch.randn(E, N, K) * K**-0.5, None
    if base.quant_type is None:
        weight = weight.to(x_dtype)
    else:
        weight, state = reference.quantize_4bit(
            weight, base.blocksize, base.quant_type, base.nested
        )
    return Inputs(
        x=torch.randn(M, K + 5).to(x_dtype)[:, :K],  # rows lie apart
        weight=weight,
        state=state,
        offsets=torch.tensor(case.ends, dtype=torch.int32),
        lora_A=(torch.randn(E, R, K) * K**-0.5).to(adapter_dtype),
        lora_B=(torch.randn(E, N, R) * R**-0.5).to(adapter_dtype),
        dy=torch.randn(M, N).to(x_dtype),
        compute=compute,
        dropout_p=case.dropout_p,
    )


def segment_results(inputs: Inputs, exactly: bool) -> dict[str, Tensor]:
    """The plain sequence, expert by expert, under torch's autograd: in fp64 or as is."""
    layer, x = inputs.layer, inputs.x
    if exactly:
        layer, x = reference.plain.widened(layer), x.double()
    results = autograd_results(reference.plain.grouped_lora_linear, x, layer, inputs.dy)
    return {name: out for name, out in results.items() if out is not None}
