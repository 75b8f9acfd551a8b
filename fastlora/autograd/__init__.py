"""The differentiable layers: each saves, calls ops and returns. Contains no math."""

from __future__ import annotations

from .linear import LoraLinearFunction, lora_linear
