"""The fast layer around bitsandbytes' `Linear4bit`. Importing this module imports bitsandbytes."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.bnb import Linear4bit
from torch import Tensor

from ..bitsandbytes import disable_cpu_repacking
from .layers import serve


class FastLoraLinear4bit(Linear4bit):
    """PEFT's `Linear4bit` with fastlora's forward; everything else, and all state, is PEFT's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        disable_cpu_repacking(self)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`y = x W^T + bias + scaling * drop(x) A^T B^T`, or PEFT's own code; see `fast_path`."""
        y = serve(self, x, args, kwargs)
        return super().forward(x, *args, **kwargs) if y is None else y

    def _get_name(self) -> str:
        return type(self).__name__.removeprefix("FastLora")
