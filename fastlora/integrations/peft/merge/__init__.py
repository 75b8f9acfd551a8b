"""Adapters into weights, dense and 4-bit."""

from __future__ import annotations

from .merge import merge_adapter, unmerge_adapter
