"""The reference as a backend: runs everywhere, on any device and dtype, at plain torch's speed."""

from __future__ import annotations

from ..reference import (
    dequantize_4bit,
    dora_dropout_bwd,
    dora_dropout_fwd,
    dora_magnitude_bwd,
    dora_magnitude_fwd,
    dora_norm,
    grouped_lora_linear_bwd,
    grouped_lora_linear_fwd,
    lora_embedding_bwd,
    lora_embedding_fwd,
    lora_linear_bwd,
    lora_linear_fwd,
    quantize_4bit,
    shared_linear_bwd,
    shared_linear_fwd,
    shrink,
    skinny_bwd,
)
from .contract import Request

__all__ = [
    "NAME",
    "dequantize_4bit",
    "dora_dropout_bwd",
    "dora_dropout_fwd",
    "dora_magnitude_bwd",
    "dora_magnitude_fwd",
    "dora_norm",
    "grouped_lora_linear_bwd",
    "grouped_lora_linear_fwd",
    "lora_embedding_bwd",
    "lora_embedding_fwd",
    "lora_linear_bwd",
    "lora_linear_fwd",
    "quantize_4bit",
    "shared_linear_bwd",
    "shared_linear_fwd",
    "shrink",
    "skinny_bwd",
    "unsupported",
]

NAME = "reference"


def unsupported(request: Request) -> str | None:
    """None: the reference runs every op."""
    return None
