"""Layers that run as one autograd node: those of one input, and gated MLPs."""

from __future__ import annotations
