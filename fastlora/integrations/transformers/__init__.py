"""Transformers: callbacks for its Trainer, loading and saving of models, GGUF files."""

from __future__ import annotations

from .callbacks import FastLoraCallback, ThroughputCallback

__all__ = ["FastLoraCallback", "ThroughputCallback"]
