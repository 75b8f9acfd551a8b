"""Whether a call of a PEFT layer can run on fastlora, and why not."""

from __future__ import annotations
