"""fastlora in Hugging Face Transformers: callbacks for its Trainer, and models to fine-tune."""

from __future__ import annotations

from .callbacks import FastLoraCallback, ThroughputCallback
from .evaluate import perplexity
from .gguf import cache_folder, convert_gguf, file_sha256, gguf_cache_folder, is_gguf
from .memory import peak_memory, reset_peak_memory
from .models import (
    QUANT_TYPES,
    four_bit,
    load_causal_lm,
    load_tokenizer,
    make_savable,
    model_folder,
)
