"""Names of layers: without PEFT's prefix, and by kind."""

from __future__ import annotations

import re

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_PEFT_PREFIX = "base_model.model."


def plain_name(name: str) -> str:
    """The name in the model that the adapters were added to: `model.layers.3.mlp.up_proj`."""
    return name.removeprefix(_PEFT_PREFIX)


def kind_of(name: str) -> str:
    """The name of all layers that differ only in numbers: `model.layers.*.mlp.up_proj`."""
    return _NUMBER.sub("*", plain_name(name))


def numbers_of(name: str) -> list[str]:
    """The numbers that `kind_of` replaces."""
    return _NUMBER.findall(name)
