"""The kernels, one in a file, each with the function that launches it."""

from __future__ import annotations
