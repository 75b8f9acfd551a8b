"""LoRA and QLoRA linear layers for your own models. Parameters have the names that PEFT uses.

State-dict keys are `base_layer.weight`, `base_layer.bias`, `lora_A.<adapter_name>.weight` and
`lora_B.<adapter_name>.weight`; an NF4 or FP4 base adds bitsandbytes' keys
(`base_layer.weight.absmax`, ...), so checkpoints go to and from PEFT's own layers unchanged. An
MXFP4 base has `base_layer.weight_blocks` and `base_layer.weight_scales`, as gpt-oss checkpoints do.
"""

from __future__ import annotations

from .linear4bit import Linear4bit
from .lora import LoraLinear
from .merge import MergeError
from .options import TRAIN_BIAS, LoraOptions, QLoraOptions, QuantOptions
from .qlora import QLoraLinear

# Pickles name the module of a class: they keep naming this one, whichever file has the class.
for _class in (Linear4bit, LoraLinear, MergeError, QLoraLinear):
    _class.__module__ = __name__
