"""The reference as a backend: runs everywhere, on any device and dtype, at plain torch's speed."""

from __future__ import annotations

from ..reference import (
    dequantize_4bit as dequantize_4bit,
)
from ..reference import (
    dora_dropout_bwd as dora_dropout_bwd,
)
from ..reference import (
    dora_dropout_fwd as dora_dropout_fwd,
)
from ..reference import (
    dora_magnitude_bwd as dora_magnitude_bwd,
)
from ..reference import (
    dora_magnitude_fwd as dora_magnitude_fwd,
)
from ..reference import (
    dora_norm as dora_norm,
)
from ..reference import (
    grouped_lora_linear_bwd as grouped_lora_linear_bwd,
)
from ..reference import (
    grouped_lora_linear_fwd as grouped_lora_linear_fwd,
)
from ..reference import (
    lora_embedding_bwd as lora_embedding_bwd,
)
from ..reference import (
    lora_embedding_fwd as lora_embedding_fwd,
)
from ..reference import (
    lora_linear_bwd as lora_linear_bwd,
)
from ..reference import (
    lora_linear_fwd as lora_linear_fwd,
)
from ..reference import (
    quantize_4bit as quantize_4bit,
)
from ..reference import (
    shared_linear_bwd as shared_linear_bwd,
)
from ..reference import (
    shared_linear_fwd as shared_linear_fwd,
)
from ..reference import (
    shrink as shrink,
)
from ..reference import (
    skinny_bwd as skinny_bwd,
)
from .contract import Request

NAME = "reference"


def unsupported(request: Request) -> str | None:
    """None: the reference runs every op."""
    return None
