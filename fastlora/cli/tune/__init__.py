"""`fastlora tune`: times the kernels on your layers and keeps the fastest choices."""

from __future__ import annotations
