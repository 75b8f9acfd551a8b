"""Computes a call of PEFT's LoRA on a parameter: experts, routers, plain weights.

PEFT's `ParamWrapper` adds `scaling * B A` to the parameter at each forward, for all experts. Here
an `AdaptedWeight` takes the place where the model looks for the parameter, whoever the model is:
its own code multiplies with it, in a loop over experts or in torch's grouped_mm.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..plan.parameter import ParamParts
from .adapted_weight import adapted_weight


@contextmanager
def in_place(parts: ParamParts) -> Iterator[list[str]]:
    """The adapted weight where the owner's code finds the parameter; yields `built_for`."""
    built_for: list[str] = []
    left, right, scaling = _stacked(parts.factors)
    # Instance attributes are found before parameters, which stay what they are.
    parts.owner.__dict__[parts.name] = adapted_weight(parts.weight, left, right, scaling, built_for)
    try:
        yield built_for
    finally:
        del parts.owner.__dict__[parts.name]


def built_reason(built_for: list[str]) -> str:
    """What a layer records of a call that built the weight; "" when it did not."""
    if not built_for:
        return ""
    return f"the model calls {', '.join(built_for)} on the weight, so that W + BA was built"


def _stacked(factors: tuple[tuple[Tensor, Tensor, float], ...]) -> tuple[Tensor, Tensor, float]:
    """`sum of s_i L_i R_i = [s_1 L_1, s_2 L_2, ...] [R_1; R_2; ...]`: one adapter for all."""
    if len(factors) == 1:
        return factors[0]
    lefts = [left.float() * scaling for left, _, scaling in factors]
    rights = [right.float() for _, right, _ in factors]
    return torch.cat(lefts, dim=-1), torch.cat(rights, dim=-2), 1.0
