"""LoRA on a linear layer, dense or in 4 bits."""

from __future__ import annotations

from torch import Tensor

from ..backends import choose_linear
from ..layer import Grads, Layer, Needs
from .checks import check_backward, check_layer


def lora_linear_fwd(
    x: Tensor, layer: Layer, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """`S = drop(x) A^T`, `y = x W^T + bias + scaling * S B^T`; see `reference.lora_linear_fwd`."""
    layer = check_layer(x, layer)
    return choose_linear("lora_linear_fwd", x, layer, backend).lora_linear_fwd(x, layer)


def lora_linear_bwd(
    dy: Tensor,
    x: Tensor,
    layer: Layer,
    S: Tensor,
    needs: Needs = Needs(),
    *,
    backend: str | None = None,
) -> Grads:
    """`(dx, dA, dB, dbias)` of `lora_linear_fwd`; see `reference.lora_linear_bwd`."""
    layer = check_layer(x, layer)
    check_backward(dy, x, layer, S)
    b = choose_linear("lora_linear_bwd", x, layer, backend)
    return b.lora_linear_bwd(dy, x, layer, S, needs)
