"""`fastlora bench`: PEFT, plain torch and fastlora on the same layer or model, in turn."""

from __future__ import annotations
