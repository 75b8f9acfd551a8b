"""fastlora: fused LoRA and QLoRA linear layers, with PEFT's exact meaning.

Three ways in: `accelerate(model)` for a PEFT model; `LoraLinear`, `QLoraLinear`, `lora_linear` for
your own models; `register(lora_config)`, `patch_peft()` for trainers that build the model.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from .version import __version__

# Public name -> module that defines it. Loaded on first use, so that `import fastlora` stays light
# and a peer (peft, bitsandbytes) is needed only by the name that needs it.
_EXPORTS = {
    "LoraLinear": ".nn",
    "QLoraLinear": ".nn",
    "LoraLinearFunction": ".autograd",
    "lora_linear": ".autograd",
    "lora_embedding": ".autograd.embedding",
    "grouped_lora_linear": ".autograd.grouped",
    "quantize_4bit": ".ops",
    "dequantize_4bit": ".ops",
    "use_backend": ".backends",
    "QuantState": ".quant",
    "from_mxfp4": ".quant",
    "to_mxfp4": ".quant",
    "accelerate": ".integrations.peft",
    "restore": ".integrations.peft",
    "explain": ".integrations.peft",
    "register": ".integrations.peft",
    "patch_peft": ".integrations.peft",
    "unpatch_peft": ".integrations.peft",
    "merge_adapter": ".integrations.peft.merge",
    "unmerge_adapter": ".integrations.peft.merge",
    "spectrum": ".integrations.spectrum",
}

# `from fastlora import *` takes what can be imported here.
_WITHOUT_PEFT = [name for name, home in _EXPORTS.items() if ".integrations" not in home]
__all__ = ["__version__", *(_EXPORTS if find_spec("peft") else _WITHOUT_PEFT)]

if TYPE_CHECKING:
    from .autograd.embedding import lora_embedding
    from .autograd.grouped import grouped_lora_linear
    from .autograd.linear import LoraLinearFunction, lora_linear
    from .backends import use_backend
    from .integrations.peft import (
        accelerate,
        explain,
        patch_peft,
        register,
        restore,
        unpatch_peft,
    )
    from .integrations.peft.merge.merge import merge_adapter, unmerge_adapter
    from .integrations.spectrum import spectrum
    from .nn import LoraLinear, QLoraLinear
    from .ops import dequantize_4bit, quantize_4bit
    from .quant import QuantState, from_mxfp4, to_mxfp4


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'fastlora' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
