"""The fast layer around bitsandbytes' `Linear4bit`. Importing this module imports bitsandbytes."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.bnb import Linear4bit

from ..bitsandbytes import disable_cpu_repacking
from .layers import Fast


class FastLoraLinear4bit(Fast, Linear4bit):
    """PEFT's `Linear4bit` with fastlora's forward; everything else, and all state, is PEFT's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        disable_cpu_repacking(self)
