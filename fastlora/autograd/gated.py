"""A gated MLP as one autograd node. Contains no math."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..layer import Grads, Layer
from ..reference import activate, gated_bwd, gated_fwd
from .common import (
    Saved,
    as_matrix,
    autocast_off,
    differentiable,
    differentiable_bwd,
    prepared,
    run_backward,
    wants_gradient,
    working,
)


class GatedMLPFunction(torch.autograd.Function):
    """`down(act(gate(x)) * up(x))` with gradients for x and each bias, lora_A and lora_B.

    Saves x, the outputs of gate and up, each S [M, R], the adapters, biases and dropout seeds. The
    other two [M, I] that autograd would keep, act(gate) and the product, are recomputed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        activation: str,
        layers: Sequence[Layer],
        backend: str | None,
        *tensors: Tensor | None,
    ) -> Tensor:
        inner = [working(p) for p in layers]
        (gate, up), Ss = ops.shared_linear_fwd(x, inner[:2], backend=backend)
        h = gated_fwd(gate, up, activation)
        (y,), (S_down,) = ops.shared_linear_fwd(h, inner[2:], backend=backend)
        biases = [p.bias for p in layers]
        ctx.saved = Saved(ctx, (x, gate, up, *Ss, S_down, *biases), layers, backend)
        ctx.activation = activation
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x, gate, up, S_gate, S_up, S_down, *biases), layers = ctx.saved.restore(ctx)
        needs, activation = ctx.saved.needs(ctx, 4), ctx.activation

        def kernels() -> tuple[Tensor | None, Sequence[Grads]]:
            backend, inner = ctx.saved.backend, [working(p) for p in layers]
            first = needs[0].x or any(any(need) for need in needs[:2])
            h = gated_fwd(gate, up, activation)
            down_needs = [needs[2]._replace(x=first)]
            dh, down = ops.shared_linear_bwd(
                [dy], h, inner[2:], [S_down], down_needs, backend=backend
            )
            del h
            if dh is None:
                return None, (Grads(), Grads(), *down)
            dgate, dup = gated_bwd(dh, gate, up, activation)
            del dh
            dx, grads = ops.shared_linear_bwd(
                [dgate, dup], x, inner[:2], [S_gate, S_up], needs[:2], backend=backend
            )
            return dx, (*grads, *down)

        def plain() -> tuple[Tensor | None, Sequence[Grads]]:
            whole = [p._replace(bias=bias) for p, bias in zip(layers, biases, strict=True)]
            return differentiable_bwd(
                lambda x, own: _plain(x, own, activation), dy, x, whole, needs
            )

        dx, grads = run_backward(dy.device, kernels, plain)
        return dx, None, None, None, *ctx.saved.gradients(grads)


def _plain(x: Tensor, layers: Sequence[Layer], activation: str) -> Tensor:
    """The MLP in plain torch, on the layers as `working` makes them."""
    (gate, up), _ = ops.shared_linear_fwd(x, layers[:2], backend="reference")
    wide = gate.to(torch.promote_types(gate.dtype, torch.float32))
    h = (activate(wide, activation) * up).to(gate.dtype)
    (y,), _ = ops.shared_linear_fwd(h, layers[2:], backend="reference")
    return y


def gated_mlp(
    x: Tensor,
    gate: Layer,
    up: Layer,
    down: Layer,
    activation: str,
    *,
    backend: str | None = None,
) -> Tensor:
    """`down(act(gate(x)) * up(x))`, three LoRA linears and what is between them, as one node.

    Args:
        x: [..., K], fp32, bf16 or fp16.
        gate, up: [I, K], down: [N, I], all dense or all 4-bit, with the same dtypes and frozen
            weights. A seed that dropout needs and lacks is drawn, in this order.
        activation: one of `reference.ACTIVATIONS`.
        backend: "native", "triton" or "reference"; the device's best when None.

    Under autocast as `lora_linear`.

    Returns:
        y [..., N] in x's dtype (autocast's dtype under autocast).

    Raises:
        ValueError, TypeError: a shape or dtype does not fit; a weight requires a gradient.
        RuntimeError: the backend asked for can't run here; the message says why.
    """
    x, layers, backend = prepared(x, (gate, up, down), backend)
    rows, tensors = as_matrix(x), differentiable(layers)
    with autocast_off(x.device):
        if wants_gradient(x, *tensors):
            y = GatedMLPFunction.apply(rows, activation, layers, backend, *tensors)
        else:
            inner = [working(p) for p in layers]
            (g, u), _ = ops.shared_linear_fwd(rows, inner[:2], backend=backend)
            h = gated_fwd(g, u, activation)
            del g, u
            (y,), _ = ops.shared_linear_fwd(h, inner[2:], backend=backend)
    return y.view(*x.shape[:-1], y.shape[-1])
