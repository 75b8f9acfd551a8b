"""`fastlora tune`: measures the kernels for your layers and keeps the fastest."""

from __future__ import annotations
