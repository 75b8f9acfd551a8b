"""Calls of the ops of an embedding: their sizes, their inputs, and what PEFT's sequence makes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastlora.reference import plain


@dataclass(frozen=True)
class Case:
    """Sizes of one call, as in `reference`."""

    name: str
    M: int
    N: int
    V: int
    R: int
    padding_idx: int | None = None
    weight_scale: float = 1.0
    scaling: float = 1.5

    def __str__(self) -> str:
        return self.name


# Panels are 8 to 64 wide, tiles have 64 tokens, strips of dy 64 columns and heights of 256 tokens.
CASES = (
    Case("one token, one column", 1, 1, 3, 1),
    Case("few tokens, below a vector", 7, 5, 11, 3),
    Case("one id above a vector", 17, 17, 1, 16, weight_scale=0.75),
    Case("two tiles of tokens, padding", 129, 67, 40, 8, padding_idx=5),
    Case("two heights and strips", 300, 131, 513, 4, padding_idx=0, weight_scale=11.3125),
    Case("two panels of ranks", 70, 577, 97, 65),
    Case("rank above N, scaled", 33, 40, 50, 256, weight_scale=8.0),
)
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "bf16, fp32 adapter": (torch.bfloat16, torch.float32),
    "fp16, fp32 adapter": (torch.float16, torch.float32),
}


@dataclass
class Inputs:
    """Tensors of one call."""

    ids: Tensor
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    dy: Tensor


def make_inputs(case: Case, dtype: torch.dtype, adapter_dtype: torch.dtype) -> Inputs:
    ids = torch.randint(0, case.V, (case.M,))
    if case.padding_idx is not None:
        ids[::4] = case.padding_idx
    return Inputs(
        ids,
        torch.randn(case.V, case.N).to(dtype),
        torch.randn(case.R, case.V).to(adapter_dtype),
        torch.randn(case.N, case.R).div(case.R**0.5).to(adapter_dtype),
        torch.randn(case.M, case.N).to(dtype),
    )


def peft_results(case: Case, inputs: Inputs, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """PEFT's sequence and torch's gradients of it, in the working dtypes or in `dtype`."""
    weight, dy = inputs.weight, inputs.dy
    A, B = (
        t.detach().to(dtype or t.dtype).requires_grad_() for t in (inputs.lora_A, inputs.lora_B)
    )
    if dtype is not None:
        weight, dy = weight.to(dtype), dy.to(dtype)
    y = plain.lora_embedding(
        inputs.ids, weight, A, B, case.scaling, case.weight_scale, case.padding_idx
    )
    dA, dB = torch.autograd.grad(y, (A, B), dy)
    return {"y": y.detach(), "dA": dA, "dB": dB}
