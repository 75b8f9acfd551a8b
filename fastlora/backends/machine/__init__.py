"""Facts about this machine: its processor, its GPUs, and what `fastlora tune` measured on them."""

from __future__ import annotations
