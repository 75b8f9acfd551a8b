"""LoRA on a linear layer, dense or in 4 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import choose
from ..backends.machine.tuned import preferred
from ..quant import QuantState, as_quant_state
from .checks import check_backward, check_common, check_packed, check_weight

_Grads = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def lora_linear_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`S = drop(x) A^T`, `y = x W^T + bias + scaling * S B^T`; see `reference.lora_linear_fwd`.

    Raises:
        ValueError: a shape, or the seed, does not fit. TypeError: a dtype does not fit.
        RuntimeError: the backend asked for can't run the op; the message says why.
    """
    check_weight(x, weight, lora_B)
    check_common(x, bias, lora_A, lora_B, dropout_p, seed)
    b = choose(
        "lora_linear_fwd",
        x.device.type,
        backend,
        dtype=x.dtype,
        adapter_dtype=lora_A.dtype,
        index=x.device.index,
    )
    return b.lora_linear_fwd(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)


def lora_linear_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    S: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    needs: tuple[bool, bool, bool, bool] = (True, True, True, False),
    *,
    backend: str | None = None,
) -> _Grads:
    """`(dx, dA, dB, dbias)` of `lora_linear_fwd`; see `reference.lora_linear_bwd`.

    Raises:
        ValueError: a shape, or the seed, does not fit. TypeError: a dtype does not fit.
        RuntimeError: the backend asked for can't run the op; the message says why.
    """
    check_weight(x, weight, lora_B)
    check_common(x, None, lora_A, lora_B, dropout_p, seed)
    check_backward(dy, x, lora_B, S)
    b = choose(
        "lora_linear_bwd",
        x.device.type,
        backend,
        dtype=x.dtype,
        adapter_dtype=lora_A.dtype,
        index=x.device.index,
    )
    return b.lora_linear_bwd(dy, x, weight, lora_A, lora_B, S, scaling, dropout_p, seed, needs)


def qlora_linear_fwd(
    x: Tensor,
    weight: Tensor,
    quant_state: QuantState,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`lora_linear_fwd` with `W = dequantize_4bit(weight)`; see `reference.qlora_linear_fwd`.

    Raises:
        ValueError: a shape, the quant_state or the seed does not fit. TypeError: a dtype does not.
        RuntimeError: the backend asked for can't run the op; the message says why.
    """
    state = as_quant_state(quant_state)
    weight = check_packed(x, weight, state, lora_B)
    check_common(x, bias, lora_A, lora_B, dropout_p, seed)
    b = choose(
        "qlora_linear_fwd",
        x.device.type,
        backend,
        prefer=preferred("qlora_linear_fwd", x, compute_dtype or x.dtype, *lora_B.shape),
        dtype=x.dtype,
        adapter_dtype=lora_A.dtype,
        compute_dtype=compute_dtype,
        index=x.device.index,
    )
    return b.qlora_linear_fwd(
        x, weight, state, bias, lora_A, lora_B, scaling, dropout_p, seed, compute_dtype
    )


def qlora_linear_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    quant_state: QuantState,
    lora_A: Tensor,
    lora_B: Tensor,
    S: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    needs: tuple[bool, bool, bool, bool] = (True, True, True, False),
    *,
    backend: str | None = None,
) -> _Grads:
    """`(dx, dA, dB, dbias)` of `qlora_linear_fwd`; see `reference.qlora_linear_bwd`.

    Raises:
        ValueError: a shape, the quant_state or the seed does not fit. TypeError: a dtype does not.
        RuntimeError: the backend asked for can't run the op; the message says why.
    """
    state = as_quant_state(quant_state)
    weight = check_packed(x, weight, state, lora_B)
    check_common(x, None, lora_A, lora_B, dropout_p, seed)
    check_backward(dy, x, lora_B, S)
    b = choose(
        "qlora_linear_bwd",
        x.device.type,
        backend,
        prefer=preferred("qlora_linear_bwd", x, compute_dtype or x.dtype, *lora_B.shape),
        dtype=x.dtype,
        adapter_dtype=lora_A.dtype,
        compute_dtype=compute_dtype,
        index=x.device.index,
    )
    return b.qlora_linear_bwd(
        dy, x, weight, state, lora_A, lora_B, S, scaling, dropout_p, seed, compute_dtype, needs
    )
