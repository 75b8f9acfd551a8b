"""The fast layers: PEFT's own classes with fastlora's forward.

Each asks `plan` whether fastlora may run a call. `run` then computes it; otherwise PEFT's own
forward does.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.adalora.layer import SVDLinear
from peft.tuners.lora.layer import Embedding, Linear, ParamWrapper
from torch import Tensor, nn

from .plan.call import Plan
from .plan.embedding import EmbeddingParts, embedding_plan
from .plan.parameter import ParamParts, param_plan
from .plan.plan import plan
from .plan.reasons import LAST_REASON, record
from .run.embedding import embed
from .run.linear import run
from .run.parameter import built_reason, in_place


class Fast(nn.Module):
    """Stands before a class around a linear layer, whose forward it replaces and nothing else."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`y = x W^T + bias + scaling * drop(x) A^T B^T`, or PEFT's own code; see `fast_path`.

        The instance's `__dict__` keeps the reason of the latest call, for `explain`.
        """
        found = plan(self, x, args, kwargs)
        if isinstance(found, str):
            record(self, found)
            y: Tensor = super().forward(x, *args, **kwargs)
            return y
        if not torch.compiler.is_compiling():
            self.__dict__[LAST_REASON] = ""
        return run(found, x)

    def _get_name(self) -> str:
        # PEFT's name, so that a printed model looks as it did; `explain` tells them apart.
        return type(self).__name__.removeprefix("Fast").removeprefix("Lora")


class FastLoraLinear(Fast, Linear):
    """PEFT's `lora.Linear` with fastlora's forward; everything else, and all state, is PEFT's."""


class FastSVDLinear(Fast, SVDLinear):
    """PEFT's `adalora.SVDLinear` with fastlora's forward, in which A is `A * E`."""


class FastLoraEmbedding(Embedding):
    """PEFT's `lora.Embedding` with fastlora's forward; all else, and all state, is PEFT's."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`y = e * (E[x] + scaling * A[:, x] B^T)`, or PEFT's own code; see `embedding_plan`."""
        found = embedding_plan(self, x, args, kwargs)
        if isinstance(found, str):
            record(self, found)
            return super().forward(x, *args, **kwargs)
        record(self, "")
        return embed(found, x)

    def _get_name(self) -> str:
        return type(self).__name__.removeprefix("FastLora")


class FastParamWrapper(ParamWrapper):
    """PEFT's `ParamWrapper` with fastlora's forward; everything else, and all state, is PEFT's."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The wrapped module's own forward with the adapted weight, or PEFT's code."""
        found = param_plan(self, kwargs)
        if isinstance(found, str):
            record(self, found)
            return super().forward(x, *args, **kwargs)
        with in_place(found) as built_for:
            result = self.base_layer(x, *args, **kwargs)
        record(self, built_reason(built_for))
        return result


# PEFT knows wrapped parameters by the name of their class, when it adds another adapter.
FastParamWrapper.__name__ = ParamWrapper.__name__


def fast_path(
    layer: nn.Module, x: Tensor, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
) -> tuple[bool, str]:
    """Whether `layer(x, *args, **kwargs)` may run on fastlora, and why not, in one sentence.

    Args:
        layer: one of PEFT's LoRA layers: around `nn.Linear`, transformers' `Conv1D`, bitsandbytes'
            `Linear4bit` or an embedding, or on a parameter.
        x: its input.
        args, kwargs: the other arguments of the call.

    Returns:
        `(True, "")` or `(False, reason)`.
    """
    kwargs = kwargs or {}
    found: Plan | EmbeddingParts | ParamParts | str
    if isinstance(layer, Embedding):
        found = embedding_plan(layer, x, args, kwargs)
    elif isinstance(layer, ParamWrapper):
        found = param_plan(layer, kwargs)
    else:
        found = plan(layer, x, args, kwargs)
    return (False, found) if isinstance(found, str) else (True, "")
