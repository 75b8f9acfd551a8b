"""The drop-in for PEFT: `accelerate`, `restore`, `explain`, `register` and `patch_peft`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .explanation import Explanation, Row, explain
from .fuse.join import Fusion
from .layers import FastLoraLinear, fast_path
from .model import accelerate, patch_peft, register, restore, unpatch_peft

if TYPE_CHECKING:
    from .layers_bnb import FastLoraLinear4bit


def __getattr__(name: str) -> Any:
    # Its base class needs bitsandbytes, which is slow to import and absent on many machines.
    if name == "FastLoraLinear4bit":
        from .layers_bnb import FastLoraLinear4bit

        return FastLoraLinear4bit
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
