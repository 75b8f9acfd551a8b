"""One LoRA layer as data: the argument of every op, from the modules down to the kernels.

The C++ twin is `LoraLinearFwd` in csrc/common/params.h. Sizes: M tokens, N out_features,
K in_features, R rank, E experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .quant import QuantState


class Layer(NamedTuple):
    """A frozen weight with its adapter: `y = x W^T + bias + scaling * drop(x) A^T B^T`.

    Args:
        weight: [N, K], dense, in compute_dtype or x's dtype, or its packed bytes if quant_state is
            given; [E, N, K] with offsets.
        lora_A: [R, K], fp32 or x's dtype; [E, R, K] with offsets.
        lora_B: [N, R], lora_A's dtype; [E, N, R] with offsets.
        scaling: factor of the LoRA term (alpha / r in PEFT).
        bias: [N] or None.
        quant_state: how to decode a 4-bit weight; None for a dense one.
        compute_dtype: dtype to which a 4-bit weight is decoded and x rounded for the base product;
            x's dtype when None. The LoRA term always reads x as it is, and y keeps x's dtype. The
            differentiable functions cast a dense weight to it; the ops take a dense weight that is
            in it, which for an fp32 x may be bf16 or fp16.
        dropout_p: probability of dropping an element of x on the LoRA path, 0 to 1.
        seed: int64, one element: the dropout's key. Needed when dropout_p > 0.
        offsets: [E], int64, ascending, of a stack of experts: the end of each expert's rows.
    """

    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    bias: Tensor | None = None
    quant_state: QuantState | None = None
    compute_dtype: torch.dtype | None = None
    dropout_p: float = 0.0
    seed: Tensor | None = None
    offsets: Tensor | None = None


class Needs(NamedTuple):
    """Which gradients a backward computes."""

    x: bool = True
    A: bool = True
    B: bool = True
    bias: bool = False


class Grads(NamedTuple):
    """The gradients of a backward; None for those that were not asked for."""

    x: Tensor | None = None
    A: Tensor | None = None
    B: Tensor | None = None
    bias: Tensor | None = None
