"""Names of layers: without PEFT's prefix, and by kind."""

from __future__ import annotations

import re

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_PEFT_PREFIX = "base_model.model."
# Words in names around the same layers, in one order in files and in another in models.
_WRAPPERS = ("base_model", "base_layer", "language_model", "model")


def plain_name(name: str) -> str:
    """The name in the model that the adapters were added to: `model.layers.3.mlp.up_proj`."""
    return name.removeprefix(_PEFT_PREFIX)


def core_name(name: str) -> str:
    """The name without the words around it that differ between files and models."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def kind_of(name: str) -> str:
    """The name of all layers that differ only in numbers: `model.layers.*.mlp.up_proj`."""
    return _NUMBER.sub("*", plain_name(name))


def numbers_of(name: str) -> list[str]:
    """The numbers that `kind_of` replaces."""
    return _NUMBER.findall(name)
