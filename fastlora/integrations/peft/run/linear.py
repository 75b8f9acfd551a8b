"""Computes a call of a layer around a linear one, from its plan.

The casts are outside the autograd Functions, so that autograd casts the gradients back and the
backward does not depend on autocast.
"""

from __future__ import annotations

from torch import Tensor

from ....autograd.common import autocast_off
from ....autograd.linear import linear
from ....layer import Layer
from ... import bitsandbytes as bnb
from ..plan.call import Plan
from .dora import dora
from .launch import base_alone
from .mixed import invoke, mixed
from .several import joined, term
from .tensors import cast


def run(plan: Plan, x: Tensor) -> Tensor:
    """`y = x W^T + bias + sum of scaling * drop(x) A^T B^T`, in the dtypes of PEFT's code."""
    if not plan.autocast:
        return _run(plan, x)
    with autocast_off(x.device):
        return _run(plan, x)


def _run(plan: Plan, x: Tensor) -> Tensor:
    if plan.parts.quant_state is not None:
        bnb.settle_compute_dtype(plan.parts.base, x)
    x = cast(x, plan.casts.x)
    if plan.rows is not None:
        return mixed(plan, x, plan.rows)
    adapters = plan.parts.adapters
    if not adapters:
        return linear(x, base_alone(plan, x))
    if adapters[0].magnitude is not None:
        return dora(plan, x, adapters[0])
    if len(adapters) == 1 and not adapters[0].invoked:
        return linear(x, joined(plan, adapters))
    together = plan.together
    y = linear(x, joined(plan, together) if together else base_alone(plan, x))
    for adapter in adapters:
        if adapter.invoked:
            y = invoke(plan, y, x, adapter)
        elif adapter.drops and adapter is not together[0]:
            y = (y + term(plan, x, adapter)).to(y.dtype)
    return y


def one_call(plan: Plan, x: Tensor) -> Layer:
    """A call on x as one layer, valid only if the plan's `apart_reason` is None."""
    if plan.parts.quant_state is not None:
        bnb.settle_compute_dtype(plan.parts.base, x)
    return joined(plan, plan.together)
