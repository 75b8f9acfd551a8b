"""Gated MLPs of LoRA layers that run as one autograd node."""

from __future__ import annotations
