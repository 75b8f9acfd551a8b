"""Several LoRA linears of one input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import choose_linear
from ..layer import Grads, Layer, Needs
from .checks import check_backward, check_layer


def shared_linear_fwd(
    x: Tensor, layers: Sequence[Layer], *, backend: str | None = None
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Several LoRA linears of one x: all y_i, all S_i; see `reference.shared_linear_fwd`.

    Raises:
        ValueError: no layer, or dense and 4-bit ones mixed.
        TypeError: a dtype differs from that of the first layer.
    """
    layers = _check_layers(x, layers)
    # A backend that has the op of a single layer runs several of them, too.
    b = choose_linear("lora_linear_fwd", x, layers[0], backend)
    return b.shared_linear_fwd(x, layers)


def shared_linear_bwd(
    dys: Sequence[Tensor | None],
    x: Tensor,
    layers: Sequence[Layer],
    Ss: Sequence[Tensor],
    needs: Sequence[Needs],
    *,
    backend: str | None = None,
) -> tuple[Tensor | None, tuple[Grads, ...]]:
    """`dx` and the other gradients of each layer; see `reference.shared_linear_bwd`.

    Triton, CUDA, and CPUs whose kernel can't take all layers at once round each layer's part of dx,
    and sum these parts in fp32.

    Raises:
        ValueError, TypeError: as `shared_linear_fwd`; an argument has not one entry for each layer;
            the layers don't agree on whether dx is needed.
    """
    layers = _check_layers(x, layers)
    for name, given in (("dys", dys), ("Ss", Ss), ("needs", needs)):
        if len(given) != len(layers):
            raise ValueError(
                f"{name} must have {len(layers)} entries, one for each layer, got {len(given)}"
            )
    if len({need.x for need in needs}) != 1:
        raise ValueError("needs must have the same x in all layers, whose dx is one sum, got both")
    for dy, layer, S in zip(dys, layers, Ss, strict=True):
        if dy is not None:
            check_backward(dy, x, layer, S)
    b = choose_linear("lora_linear_bwd", x, layers[0], backend)
    return b.shared_linear_bwd(dys, x, layers, Ss, needs)


def _check_layers(x: Tensor, layers: Sequence[Layer]) -> list[Layer]:
    """The layers as `check_layer` returns them, after checking that one call can take them all."""
    if not layers:
        raise ValueError("layers must name at least one linear, got none")
    checked: list[Layer] = []
    for layer in layers:
        if (layer.quant_state is None) != (layers[0].quant_state is None):
            raise ValueError("layers must be all dense or all 4-bit, got both")
        checked.append(check_layer(x, layer))
        for name, dtype in _dtypes(layer).items():
            if dtype != (first := _dtypes(checked[0])[name]):
                raise TypeError(f"{name} must be the same in all layers, {first}, got {dtype}")
    return checked


def _dtypes(layer: Layer) -> dict[str, torch.dtype | None]:
    """The dtypes in which layers of one call have to agree."""
    compute = None if layer.quant_state is None else layer.compute_dtype
    return {"adapter_dtype": layer.lora_A.dtype, "compute_dtype": compute}
