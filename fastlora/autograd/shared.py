"""Several LoRA linears as one autograd node: those that share an input, and a gated MLP.

No math stands here; the formulas are those of `reference.shared_linear_fwd`, `gated_fwd` and their
backwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..backends import forced_backend
from ..quant import as_quant_state
from ..reference import Projection, activate, gated_bwd, gated_fwd
from ..reference.precision import sum_dtype
from .linear import autocast_off, check_frozen, differentiable_gradients, draw_seed

_Gradients = tuple[Tensor | None, ...]
_Needs = tuple[bool, bool, bool]  # dA, dB, dbias
# What of a projection is differentiable or a dropout's seed, in the order of Function arguments.
_ARGUMENTS = ("weight", "bias", "lora_A", "lora_B", "seed")
_Statics = tuple[Projection, ...]


def _flat(projections: Sequence[Projection]) -> list[Tensor | None]:
    return [getattr(p, name) for p in projections for name in _ARGUMENTS]


def _rebuilt(statics: _Statics, tensors: Sequence[Tensor | None]) -> list[Projection]:
    """The projections around the tensors that autograd has handed on."""
    rest = iter(tensors)
    projections = []
    for p in statics:
        fields: dict[str, Any] = {name: next(rest) for name in _ARGUMENTS}
        projections.append(p._replace(**fields))
    return projections


class _Saved:
    """Tensors and projections for a backward: every tensor goes through `save_for_backward`.

    So hooks on saved tensors (offloading, checkpointing) see all of them, and a change in place of
    any is an error.
    """

    def __init__(
        self,
        ctx: Any,
        tensors: Sequence[Tensor],
        projections: Sequence[Projection],
        backend: str | None,
    ) -> None:
        own: list[Tensor | None] = list(tensors)
        self.count = len(own)
        self.backend = backend
        self.bias_dtypes = [None if p.bias is None else p.bias.dtype for p in projections]
        self.statics: list[Projection] = []
        self.stats: list[int] = []
        for p in projections:
            stats = [] if p.quant_state is None else p.quant_state.tensors()
            own += [p.weight, p.bias, p.lora_A, p.lora_B, p.seed, *stats]
            self.stats.append(len(stats))
            state = None if p.quant_state is None else p.quant_state.without_tensors()
            self.statics.append(_hollow(p)._replace(quant_state=state))
        ctx.save_for_backward(*own)

    def restore(self, ctx: Any) -> tuple[list[Any], list[Projection]]:
        saved = list(ctx.saved_tensors)
        tensors, rest = saved[: self.count], saved[self.count :]
        projections = []
        for p, count in zip(self.statics, self.stats, strict=True):
            fields: dict[str, Any] = dict(zip(_ARGUMENTS, rest, strict=False))
            stats, rest = rest[len(_ARGUMENTS) :][:count], rest[len(_ARGUMENTS) + count :]
            state = p.quant_state.with_tensors(*stats) if p.quant_state is not None else None
            projections.append(p._replace(quant_state=state, **fields))
        return tensors, projections

    def gradients(self, grads: Sequence[_Gradients]) -> list[Tensor | None]:
        """`(dA, dB, dbias)` of each projection in the order of `_ARGUMENTS`."""
        out: list[Tensor | None] = []
        for (dA, dB, dbias), dtype in zip(grads, self.bias_dtypes, strict=True):
            out += [None, None if dbias is None else dbias.to(dtype), dA, dB, None]
        return out


def _hollow(p: Projection) -> Projection:
    """`p` without the tensors that go through autograd."""
    fields: dict[str, Any] = dict.fromkeys(_ARGUMENTS)
    return p._replace(**fields)


def _needs(ctx: Any, first: int, projections: Sequence[Projection]) -> list[_Needs]:
    """What each projection needs; its arguments begin at `first`."""
    size = len(_ARGUMENTS)
    needs: list[_Needs] = []
    for i in range(len(projections)):
        _, bias, A, B, _ = ctx.needs_input_grad[first + i * size : first + (i + 1) * size]
        needs.append((A, B, bias))
    return needs


class SharedLinearFunction(torch.autograd.Function):
    """`reference.shared_linear_fwd` with gradients for x and each bias, lora_A and lora_B.

    Saves x once, each S [M, R], the adapters and the dropout seeds.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, statics: _Statics, backend: str | None, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        projections = _rebuilt(statics, tensors)
        ys, Ss = ops.shared_linear_fwd(x, projections, backend=backend)
        ctx.saved = _Saved(ctx, (x, *Ss), projections, backend)
        ctx.set_materialize_grads(False)
        return ys

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> _Gradients:
        (x, *Ss), projections = ctx.saved.restore(ctx)
        need_dx, needs = ctx.needs_input_grad[0], _needs(ctx, 3, projections)
        dx: Tensor | None
        grads: Sequence[_Gradients]
        with autocast_off(x.device):
            if torch.is_grad_enabled():
                dx, grads = _differentiable_bwd(dys, x, projections, need_dx, needs)
            else:
                dx, grads = ops.shared_linear_bwd(
                    dys, x, projections, Ss, need_dx, needs, backend=ctx.saved.backend
                )
        return dx, None, None, *ctx.saved.gradients(grads)


def _differentiable_bwd(
    dys: Sequence[Tensor | None],
    x: Tensor,
    projections: Sequence[Projection],
    need_dx: bool,
    needs: Sequence[_Needs],
) -> tuple[Tensor | None, Sequence[_Gradients]]:
    """`ops.shared_linear_bwd` with a graph, in plain torch."""
    given = [i for i, dy in enumerate(dys) if dy is not None]

    def run(x: Tensor, *adapters: Tensor) -> list[Tensor]:
        pairs = zip(adapters[::2], adapters[1::2], strict=True)
        layers = [
            p._replace(lora_A=A, lora_B=B) for p, (A, B) in zip(projections, pairs, strict=True)
        ]
        ys, _ = ops.shared_linear_fwd(x, layers, backend="reference")
        return [ys[i] for i in given]

    inputs = [x, *(t for p in projections for t in (p.lora_A, p.lora_B))]
    flags = [need_dx, *(flag for need in needs for flag in need[:2])]
    some = [dy for dy in dys if dy is not None]
    dx, *flat = differentiable_gradients(run, inputs, flags, some)
    grads = [
        (
            *flat[2 * i : 2 * i + 2],
            dy.sum(0, dtype=sum_dtype(dy)) if need[2] and dy is not None else None,
        )
        for i, (dy, need) in enumerate(zip(dys, needs, strict=True))
    ]
    return dx, grads


class GatedMLPFunction(torch.autograd.Function):
    """`down(act(gate(x)) * up(x))` with gradients for x and each bias, lora_A and lora_B.

    Saves x, the outputs of gate and up, each S [M, R], the adapters and the dropout seeds. The
    other two [M, I] that autograd would keep, act(gate) and the product, are computed anew.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        activation: str,
        statics: _Statics,
        backend: str | None,
        *tensors: Tensor | None,
    ) -> Tensor:
        projections = _rebuilt(statics, tensors)
        (gate, up), Ss = ops.shared_linear_fwd(x, projections[:2], backend=backend)
        h = gated_fwd(gate, up, activation)
        (y,), (S_down,) = ops.shared_linear_fwd(h, projections[2:], backend=backend)
        ctx.saved = _Saved(ctx, (x, gate, up, *Ss, S_down), projections, backend)
        ctx.activation = activation
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> _Gradients:
        with autocast_off(dy.device):
            return GatedMLPFunction._backward(ctx, dy)

    @staticmethod
    def _backward(ctx: Any, dy: Tensor) -> _Gradients:
        (x, gate, up, S_gate, S_up, S_down), projections = ctx.saved.restore(ctx)
        needs, backend = _needs(ctx, 4, projections), ctx.saved.backend
        need_dx = ctx.needs_input_grad[0]
        if torch.is_grad_enabled():
            dx, again = _differentiable_mlp(dy, x, projections, ctx.activation, need_dx, needs)
            return dx, None, None, None, *ctx.saved.gradients(again)
        first = need_dx or any(any(need) for need in needs[:2])
        h = gated_fwd(gate, up, ctx.activation)
        dh, down = ops.shared_linear_bwd(
            [dy], h, projections[2:], [S_down], first, needs[2:], backend=backend
        )
        del h
        dx = None
        grads: Sequence[_Gradients] = ((None,) * 3,) * 2
        if dh is not None:
            dgate, dup = gated_bwd(dh, gate, up, ctx.activation)
            del dh
            dx, grads = ops.shared_linear_bwd(
                [dgate, dup],
                x,
                projections[:2],
                [S_gate, S_up],
                need_dx,
                needs[:2],
                backend=backend,
            )
        return dx, None, None, None, *ctx.saved.gradients((*grads, *down))


def _differentiable_mlp(
    dy: Tensor,
    x: Tensor,
    projections: Sequence[Projection],
    activation: str,
    need_dx: bool,
    needs: Sequence[_Needs],
) -> tuple[Tensor | None, Sequence[_Gradients]]:
    """dx and each (dA, dB, dbias) with a graph, in plain torch."""
    trained = ("lora_A", "lora_B", "bias")
    names = [[name for name in trained if getattr(p, name) is not None] for p in projections]

    def run(x: Tensor, *flat: Tensor) -> list[Tensor]:
        rest = iter(flat)
        layers = []
        for p, own in zip(projections, names, strict=True):
            fields: dict[str, Any] = {name: next(rest) for name in own}
            layers.append(p._replace(**fields))
        (gate, up), _ = ops.shared_linear_fwd(x, layers[:2], backend="reference")
        wide = gate.to(torch.promote_types(gate.dtype, torch.float32))
        h = (activate(wide, activation) * up).to(gate.dtype)
        ys, _ = ops.shared_linear_fwd(h, layers[2:], backend="reference")
        return [ys[0]]

    inputs, flags = [x], [need_dx]
    for p, own, need in zip(projections, names, needs, strict=True):
        inputs += [getattr(p, name) for name in own]
        flags += [asked for name, asked in zip(trained, need, strict=True) if name in own]
    dx, *flat = differentiable_gradients(run, inputs, flags, (dy,))
    rest = iter(flat)
    found = [{name: next(rest) for name in own} for own in names]
    return dx, [tuple(grads.get(name) for name in trained) for grads in found]


def shared_linear(
    x: Tensor, projections: Sequence[Projection], *, backend: str | None = None
) -> tuple[Tensor, ...]:
    """`y_i = x W_i^T + bias_i + scaling_i * drop_i(x) A_i^T B_i^T` for each i, as one node.

    x is saved once for all gradients, and dx is summed in fp32 and rounded once.

    Args:
        x: [..., K], fp32, bf16 or fp16.
        projections: see `reference.Projection`; all dense or all 4-bit, with the same dtypes, with
            frozen weights. A seed that dropout needs and lacks is drawn, in the order of the
            projections.
        backend: "native", "triton" or "reference"; the device's best when None.

    Returns:
        Each y_i [..., N_i] in x's dtype. Autocast is not looked at.

    Raises:
        ValueError, TypeError: a shape or dtype does not fit; a weight requires a gradient.
        RuntimeError: the backend asked for can't run here; the message says why.
    """
    projections, rows, backend = _prepared(x, projections, backend)
    if _wants_gradient(rows, projections):
        statics = tuple(_hollow(p) for p in projections)
        ys = SharedLinearFunction.apply(rows, statics, backend, *_flat(projections))
    else:
        ys, _ = ops.shared_linear_fwd(rows, projections, backend=backend)
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in ys)


def gated_mlp(
    x: Tensor,
    gate: Projection,
    up: Projection,
    down: Projection,
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

    Returns:
        y [..., N] in x's dtype. Autocast is not looked at.

    Raises:
        As `shared_linear`.
    """
    projections, rows, backend = _prepared(x, (gate, up, down), backend)
    if _wants_gradient(rows, projections):
        statics = tuple(_hollow(p) for p in projections)
        y = GatedMLPFunction.apply(rows, activation, statics, backend, *_flat(projections))
    else:
        (g, u), _ = ops.shared_linear_fwd(rows, projections[:2], backend=backend)
        h = gated_fwd(g, u, activation)
        del g, u
        (y,), _ = ops.shared_linear_fwd(h, projections[2:], backend=backend)
    return y.view(*x.shape[:-1], y.shape[-1])


def _prepared(
    x: Tensor, projections: Sequence[Projection], backend: str | None
) -> tuple[list[Projection], Tensor, str | None]:
    """The projections with their seeds, x as a matrix, and the backend of the backward, too."""
    seeded = []
    for p in projections:
        check_frozen(p.weight)
        state = None if p.quant_state is None else as_quant_state(p.quant_state)
        seeded.append(p._replace(seed=draw_seed(x, p.dropout_p, p.seed), quant_state=state))
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return seeded, rows, forced_backend(backend)


def _wants_gradient(x: Tensor, projections: Sequence[Projection]) -> bool:
    if not torch.is_grad_enabled():
        return False
    return any(t is not None and t.requires_grad for t in (x, *_flat(projections)))
