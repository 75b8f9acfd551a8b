"""`fastlora finetune` and `fastlora demo`."""

from __future__ import annotations
