"""A gated MLP as one autograd node. Contains no math."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..layer import Grads, Layer, Needs
from ..reference import activate, gated_bwd, gated_fwd
from .common import (
    Saved,
    as_matrix,
    autocast_off,
    differentiable,
    differentiable_gradients,
    prepared,
    run_backward,
    wants_gradient,
    working,
)

_TRAINED = ("lora_A", "lora_B", "bias")


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
            return _differentiable_bwd(dy, x, whole, activation, needs)

        dx, grads = run_backward(dy.device, kernels, plain)
        return dx, None, None, None, *ctx.saved.gradients(grads)


def _differentiable_bwd(
    dy: Tensor, x: Tensor, layers: Sequence[Layer], activation: str, needs: Sequence[Needs]
) -> tuple[Tensor | None, Sequence[Grads]]:
    """dx and the other gradients of each layer with a graph, in plain torch."""
    names = [[name for name in _TRAINED if getattr(p, name) is not None] for p in layers]

    def run(x: Tensor, *flat: Tensor) -> list[Tensor]:
        rest = iter(flat)
        own: list[Layer] = []
        for p, named in zip(layers, names, strict=True):
            fields: dict[str, Any] = {name: next(rest) for name in named}
            own.append(working(p)._replace(**fields))
        (gate, up), _ = ops.shared_linear_fwd(x, own[:2], backend="reference")
        wide = gate.to(torch.promote_types(gate.dtype, torch.float32))
        h = (activate(wide, activation) * up).to(gate.dtype)
        ys, _ = ops.shared_linear_fwd(h, own[2:], backend="reference")
        return [ys[0]]

    inputs, flags = [x], [needs[0].x]
    for p, named, need in zip(layers, names, needs, strict=True):
        inputs += [getattr(p, name) for name in named]
        asked = {"lora_A": need.A, "lora_B": need.B, "bias": need.bias}
        flags += [asked[name] for name in named]
    dx, *flat = differentiable_gradients(run, inputs, flags, (dy,))
    rest = iter(flat)
    found = [{name: next(rest) for name in named} for named in names]
    return dx, [Grads(None, g.get("lora_A"), g.get("lora_B"), g.get("bias")) for g in found]


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
        gate, up: [I, K], down: [N, I]; as in `shared_linear`. Seeds are drawn in this order.
        activation: one of `reference.ACTIVATIONS`.
        backend: as in `shared_linear`.

    Under autocast as `lora_linear`.

    Returns:
        y [..., N] in x's dtype (autocast's dtype under autocast).

    Raises:
        As `shared_linear`.
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
