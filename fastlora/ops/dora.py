"""The stateless ops of DoRA: check the arguments once, choose a backend, call it.

They have the names, arguments and results of `reference`, which has the formulas. A backend without
a kernel for one of them leaves it to the reference, and still runs the products of the layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import BACKENDS, choose, forced_backend
from ..backends.contract import Backend, Request
from ..layer import Layer
from ..quant import as_quant_state
from .checks import check_stored

_Trio = tuple[Tensor | None, Tensor | None, Tensor | None]


def dora_norm(layer: Layer, *, backend: str | None = None) -> Tensor:
    """`norms[n] = |W_n + scaling * (B A)_n|`, without a gradient; see `reference.dora_norm`."""
    weight = layer.weight.detach()
    if layer.quant_state is not None:
        state = as_quant_state(layer.quant_state)
        if len(state.shape) != 2:
            raise ValueError(f"quant_state.shape must be [N, K], got {tuple(state.shape)}")
        weight = check_stored("weight's", weight.device, weight, state)
        (N, K), dtype = state.shape, state.dtype
        layer = layer._replace(quant_state=state)
    else:
        if weight.dim() != 2:
            raise ValueError(f"weight must be [N, K], got {tuple(weight.shape)}")
        (N, K), dtype = weight.shape, weight.dtype
    A, B = layer.lora_A.detach(), layer.lora_B.detach()
    _check_adapter(weight, A, B, N, K)
    b = _choose("dora_norm", weight, dtype, backend, A.dtype)
    return b.dora_norm(layer._replace(weight=weight, lora_A=A, lora_B=B))


def dora_magnitude_fwd(
    z: Tensor, factor: Tensor, rest: Tensor | None, *, backend: str | None = None
) -> Tensor:
    """`y = factor * z + rest`; see `reference.dora_magnitude_fwd`."""
    _check_magnitude(z, factor)
    if rest is not None:
        _check_like(z, "rest", rest, z.shape if rest.dim() == 2 else z.shape[1:])
    rest_dtype = z.dtype if rest is None else rest.dtype
    b = _choose("dora_magnitude_fwd", z, z.dtype, backend, rest_dtype)
    return b.dora_magnitude_fwd(z, factor, rest)


def dora_magnitude_bwd(
    dy: Tensor,
    z: Tensor,
    factor: Tensor,
    needs: tuple[bool, bool, bool] = (True, True, False),
    *,
    backend: str | None = None,
) -> _Trio:
    """`(dz, dfactor, drest)` of `dora_magnitude_fwd`; see `reference.dora_magnitude_bwd`."""
    _check_magnitude(z, factor)
    _check_like(z, "dy", dy, z.shape, z.dtype)
    b = _choose("dora_magnitude_bwd", z, z.dtype, backend)
    return b.dora_magnitude_bwd(dy, z, factor, needs)


def dora_dropout_fwd(
    x: Tensor, dropout_p: float, seed: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """`kept = mask * x`, `rest = x - drop(x)`, dropout_p > 0; see `reference.dora_dropout_fwd`."""
    _check_dropout("x", x, dropout_p, seed)
    b = _choose("dora_dropout_fwd", x, x.dtype, backend)
    return b.dora_dropout_fwd(x, dropout_p, seed)


def dora_dropout_bwd(
    dkept: Tensor, drest: Tensor, dropout_p: float, seed: Tensor, *, backend: str | None = None
) -> Tensor:
    """`dx` of `dora_dropout_fwd`; see `reference.dora_dropout_bwd`."""
    _check_dropout("dkept", dkept, dropout_p, seed)
    _check_like(dkept, "drest", drest, dkept.shape, dkept.dtype)
    b = _choose("dora_dropout_bwd", dkept, dkept.dtype, backend)
    return b.dora_dropout_bwd(dkept, drest, dropout_p, seed)


def _choose(
    op: str,
    x: Tensor,
    dtype: torch.dtype,
    backend: str | None,
    adapter_dtype: torch.dtype | None = None,
) -> Backend:
    request = Request(op, x.device.type, x.device.index, dtype, adapter_dtype)
    name = forced_backend(backend)
    if name is not None and BACKENDS[name].unsupported(request):
        name = "reference"
    return choose(request, name)


def _check_adapter(weight: Tensor, lora_A: Tensor, lora_B: Tensor, N: int, K: int) -> None:
    if lora_A.dim() != 2 or lora_A.shape[0] == 0 or lora_A.shape[1] != K:
        raise ValueError(f"lora_A must be [R, {K}], R >= 1, got {tuple(lora_A.shape)}")
    _check_like(weight, "lora_A", lora_A, lora_A.shape)
    _check_like(weight, "lora_B", lora_B, (N, lora_A.shape[0]), lora_A.dtype)


def _check_magnitude(z: Tensor, factor: Tensor) -> None:
    if z.dim() != 2:
        raise ValueError(f"z must be [M, N], got {tuple(z.shape)}")
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    _check_like(z, "factor", factor, z.shape[1:], wide)


def _check_dropout(name: str, x: Tensor, dropout_p: float, seed: Tensor) -> None:
    if x.dim() != 2:
        raise ValueError(f"{name} must be [M, K], got {tuple(x.shape)}")
    if not 0.0 < dropout_p <= 1.0:
        raise ValueError(f"dropout_p must be above 0 and at most 1, got {dropout_p}")
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise ValueError(
            f"seed must be an int64 tensor of one element, got {seed.dtype} {tuple(seed.shape)}"
        )
    _check_like(x, "seed", seed, seed.shape)


def _check_like(
    first: Tensor,
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype | None = None,
) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} must be {list(shape)}, got {tuple(tensor.shape)}")
    if dtype is not None and tensor.dtype != dtype:
        raise TypeError(f"{name} must be in {dtype}, got {tensor.dtype}")
    if tensor.device != first.device:
        raise ValueError(f"{name} must be on {first.device}, got {tensor.device}")
