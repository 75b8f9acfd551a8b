"""Weights that several layers share, as tied embeddings and replicated layers do."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import nn


def part_shared(model: nn.Module, layers: Iterable[Any]) -> None:
    """Gives each of PEFT's `layers` parameters of its own where its base layer shares some.

    What is merged into one layer would change the others, too, and where all are merged, each as
    often as it has owners: PEFT's own merge does so. If the embeddings of `model` are parted, its
    config says no longer that they are tied, so that both are saved.
    """
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values())
    for layer in layers:
        parameters = layer.get_base_layer()._parameters
        for name, parameter in parameters.items():
            if parameter is not None and owners[id(parameter)] > 1:
                owners[id(parameter)] -= 1
                parameters[name] = copy.deepcopy(parameter)
    untie_config(model)


def untie_config(model: nn.Module) -> None:
    """Unsets `tie_word_embeddings` of a model whose embeddings are two tensors."""
    config: Any = getattr(model, "config", None)
    text: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
    if not getattr(text, "tie_word_embeddings", False):
        return
    ends: Any = [
        getattr(model, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output")
    ]
    weights = [end.weight for end in ends if hasattr(end, "weight")]
    if len({weight.data_ptr() for weight in weights}) > 1:
        config.tie_word_embeddings = text.tie_word_embeddings = False
