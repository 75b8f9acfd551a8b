"""Computes the calls of PEFT layers that `plan` has found to be fastlora's."""

from __future__ import annotations
