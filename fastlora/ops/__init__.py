"""The stateless ops: check the arguments once, choose a backend, call it.

They have the names, arguments and results of `reference`, which has the formulas. None of them is
differentiable; `fastlora.lora_linear` is.

What doesn't fit is refused: a shape, a device, the quant_state, the offsets, dropout_p or the seed
with a ValueError, a dtype with a TypeError. A backend that was asked for and can't run the op is a
RuntimeError that says why. What else an op refuses stands with it.
"""

from __future__ import annotations

from .dora import (
    dora_dropout_bwd,
    dora_dropout_fwd,
    dora_magnitude_bwd,
    dora_magnitude_fwd,
    dora_norm,
)
from .embedding import lora_embedding_bwd, lora_embedding_fwd
from .grouped import grouped_lora_linear_bwd, grouped_lora_linear_fwd
from .linear import lora_linear_bwd, lora_linear_fwd
from .quantize import dequantize_4bit, quantize_4bit
from .shared import shared_linear_bwd, shared_linear_fwd
