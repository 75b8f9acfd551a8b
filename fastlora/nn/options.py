"""The keywords of the layers' constructors."""

from __future__ import annotations

from typing import Literal, TypedDict, cast

import torch

TRAIN_BIAS = ("none", "lora_only", "all")


class LoraOptions(TypedDict, total=False):
    """Keywords that every constructor of `LoraLinear` and `QLoraLinear` takes; PEFT's defaults.

    r: rank, 8.
    lora_alpha: the LoRA term is scaled by `lora_alpha / r`, 8.
    use_rslora: scale by `lora_alpha / sqrt(r)` instead, False.
    lora_dropout: probability of dropping an element of x on the LoRA path, 0.
    train_bias: PEFT's `bias`: "none" freezes the base layer's bias; "lora_only" and "all", which
        are the same for a single layer, train it. "none".
    init_lora_weights: True: A kaiming-uniform (a = sqrt(5)), B zero; "gaussian": A normal with
        std 1 / r, B zero; False: A and B both kaiming-uniform, for tests. True.
    adapter_dtype: dtype of A and B, fp32 as PEFT's, also over a bf16 base. fp32.
    adapter_name: the name in the state-dict keys, "default".
    """

    r: int
    lora_alpha: float
    use_rslora: bool
    lora_dropout: float
    train_bias: Literal["none", "lora_only", "all"]
    init_lora_weights: bool | Literal["gaussian"]
    adapter_dtype: torch.dtype
    adapter_name: str


class QuantOptions(TypedDict, total=False):
    """Keywords of the constructors that quantise.

    quant_type: "nf4", "fp4" or "mxfp4", "nf4".
    blocksize: elements per scale; 64, or 32 for "mxfp4", when None. None.
    compress_statistics: absmax in 8 bits; when None, True as in bitsandbytes' Linear4bit, but False
        for "mxfp4", whose scales have 8 bits anyway. None.
    compute_dtype: dtype of the base product; x's when None. None.
    """

    quant_type: str
    blocksize: int | None
    compress_statistics: bool | None
    compute_dtype: torch.dtype | None


class QLoraOptions(LoraOptions, QuantOptions, total=False):
    """`LoraOptions` and `QuantOptions`."""


def split(options: QLoraOptions) -> tuple[QuantOptions, LoraOptions]:
    """Separates the two kinds of keywords."""
    names = QuantOptions.__annotations__
    quant = {key: value for key, value in options.items() if key in names}
    lora = {key: value for key, value in options.items() if key not in names}
    return cast("QuantOptions", quant), cast("LoraOptions", lora)
