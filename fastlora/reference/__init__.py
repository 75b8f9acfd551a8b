"""The definition of every op, in plain torch. All backends are checked against these functions.

Sizes: M tokens, N out_features, K in_features, R rank. Sums are taken in fp32 (fp64 for fp64
inputs) and each result is rounded once, at the end.
"""

from __future__ import annotations

from ..quant.absmax import nested
from . import plain
from .dora import (
    dora_dropout_bwd,
    dora_dropout_fwd,
    dora_magnitude_bwd,
    dora_magnitude_fwd,
    dora_norm,
)
from .dropout import PHILOX_ROUNDS, dropout_mask, dropout_threshold
from .embedding import lora_embedding_bwd, lora_embedding_fwd
from .gated import ACTIVATIONS, activate, gated_bwd, gated_fwd
from .grouped import grouped_lora_linear_bwd, grouped_lora_linear_fwd, separable
from .linear import (
    expand_dx,
    lora_linear_bwd,
    lora_linear_fwd,
    merge_weight,
    shrink,
    skinny_bwd,
)
from .quantize import dequantize_4bit, dequantize_absmax, quantize_4bit
from .shared import shared_linear_bwd, shared_linear_fwd
