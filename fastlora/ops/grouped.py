"""The LoRA linears of a stack of experts."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import choose
from ..backends.contract import Request
from ..layer import Grads, Layer, Needs
from ..quant import as_quant_state
from .checks import check_adapter, check_devices, check_stored


def grouped_lora_linear_fwd(
    x: Tensor, layer: Layer, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """`lora_linear_fwd` on each expert's rows; see `reference.grouped_lora_linear_fwd`."""
    layer = _check_stack(x, x.shape[-1], layer)
    b = choose(Request.of("grouped_lora_linear_fwd", x, layer), backend)
    return b.grouped_lora_linear_fwd(x, layer)


def grouped_lora_linear_bwd(
    dy: Tensor,
    x: Tensor | None,
    layer: Layer,
    S: Tensor | None,
    needs: Needs = Needs(),
    *,
    backend: str | None = None,
) -> Grads:
    """`(dx, dA, dB)` of `grouped_lora_linear_fwd`; see `reference.grouped_lora_linear_bwd`."""
    state = layer.quant_state
    K = int((layer.weight if state is None else as_quant_state(state)).shape[-1])
    _check_backward(dy, x, layer, S, needs, K)
    layer = _check_stack(dy, K, layer)
    b = choose(Request.of("grouped_lora_linear_bwd", dy, layer), backend)
    return b.grouped_lora_linear_bwd(dy, x, layer, S, needs)


def _check_stack(x: Tensor, K: int, layer: Layer) -> Layer:
    """A stack against x, or dy, and the in_features K.

    Returns:
        The layer with fastlora's quant state, the weight's bytes and int64 offsets.
    """
    weight = layer.weight
    if layer.quant_state is not None:
        state = as_quant_state(layer.quant_state)
        shape = tuple(state.shape)
        if x.dim() != 2 or len(shape) != 3 or shape[2] != K:
            raise ValueError(f"quant_state.shape must be (E, N, {K}) to match x, got {shape}")
        if (shape[1] * shape[2]) % state.blocksize:
            raise ValueError(
                f"each expert must have whole blocks of {state.blocksize} elements, "
                f"got experts of {shape[1]} x {shape[2]}"
            )
        weight = check_stored("x's", x.device, weight, state)
        layer = layer._replace(weight=weight, quant_state=state)
    else:
        shape = tuple(weight.shape)
        if weight.dim() != 3 or x.dim() != 2 or shape[2] != K:
            raise ValueError(
                f"x must be [M, K] and weight [E, N, K], got {tuple(x.shape)} and {shape}"
            )
        if weight.dtype != x.dtype:
            raise TypeError(f"weight must have x's dtype {x.dtype}, got {weight.dtype}")
        check_devices("x's", x.device, ("weight", weight))
    _check_experts(shape, layer.lora_A, layer.lora_B)
    if layer.bias is not None:
        raise ValueError("bias must be None: experts have no bias")
    layer = layer._replace(offsets=_check_offsets(layer.offsets, x.shape[0], shape[0]))
    check_adapter(x, layer)
    return layer


def _check_experts(shape: tuple[int, ...], lora_A: Tensor, lora_B: Tensor) -> None:
    E, N, K = shape
    if lora_A.dim() != 3 or (lora_A.shape[0], lora_A.shape[2]) != (E, K):
        raise ValueError(f"lora_A must be [{E}, R, {K}] to match weight, got {tuple(lora_A.shape)}")
    R = lora_A.shape[1]
    if tuple(lora_B.shape) != (E, N, R):
        raise ValueError(f"lora_B must be [{E}, {N}, {R}], got {tuple(lora_B.shape)}")


def _check_offsets(offsets: Tensor | None, M: int, E: int) -> Tensor:
    """The offsets in int64. Their values are checked on the CPU alone: elsewhere it would wait."""
    if offsets is None:
        raise ValueError(f"offsets must be int32 or int64 [{E}], got None")
    if tuple(offsets.shape) != (E,) or offsets.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"offsets must be int32 or int64 [{E}], got {tuple(offsets.shape)} in {offsets.dtype}"
        )
    if offsets.device.type == "cpu" and E > 0:
        ends = offsets.tolist()
        if ends[0] < 0 or ends[-1] > M or ends != sorted(ends):
            raise ValueError(f"offsets must ascend from 0 to at most {M}, got {ends}")
    return offsets.to(torch.int64)


def _check_backward(
    dy: Tensor, x: Tensor | None, layer: Layer, S: Tensor | None, needs: Needs, K: int
) -> None:
    M, N, R = dy.shape[0], layer.lora_B.shape[1], layer.lora_A.shape[1]
    if tuple(dy.shape) != (M, N):
        raise ValueError(f"dy must be [M, {N}], got {tuple(dy.shape)}")
    if (x is None and needs.A) or (x is not None and tuple(x.shape) != (M, K)):
        got = "None" if x is None else f"{tuple(x.shape)}"
        raise ValueError(f"x must be [{M}, {K}] where dA is needed, got {got}")
    if x is not None and x.dtype != dy.dtype:
        raise TypeError(f"dy must have x's dtype {x.dtype}, got {dy.dtype}")
    if (S is None and needs.B) or (S is not None and tuple(S.shape) != (M, R)):
        got = "None" if S is None else f"{tuple(S.shape)}"
        raise ValueError(f"S must be [{M}, {R}] where dB is needed, got {got}")
    if needs.bias:
        raise ValueError("needs.bias must be False: experts have no bias")
