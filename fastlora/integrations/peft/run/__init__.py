"""What a call of a PEFT layer computes, once the plan is made."""

from __future__ import annotations
