"""The definition of DoRA's additions to LoRA, in plain torch.

Sizes: M tokens, N out_features, K in_features, R rank.

Source: DoRA, arXiv:2402.09353; PEFT's `DoraLinearVariant` for what dropout means in it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..layer import Layer
from .dropout import dropout_mask, dropout_threshold
from .precision import sum_dtype
from .quantize import dequantize_4bit

# Elements of a matrix that are widened to fp32 at a time: few enough for a CPU's cache, and enough
# to keep a GPU busy.
_BLOCK, _GPU_BLOCK = 2**19, 2**25


def dora_norm(layer: Layer) -> Tensor:
    """`norms[n] = |W_n + scaling * (B A)_n|`, the sum and its norm in fp32.

    Args:
        layer: its weight, a 4-bit one decoded to `quant_state.dtype`; its adapter, in any of the
            dtypes fp32, bf16 and fp16 (fp64 for checks); its scaling. Nothing else is read.

    Returns:
        norms [N] in fp32 (fp64 where lora_A is).
    """
    weight, state = layer.weight, layer.quant_state
    if state is not None:
        weight = dequantize_4bit(weight, state)
    acc = sum_dtype(layer.lora_A)
    norms, A = layer.lora_A.new_empty(weight.shape[0], dtype=acc), layer.lora_A.to(acc)
    rows = _rows(weight)
    for W, B, out in zip(*(t.split(rows) for t in (weight, layer.lora_B, norms)), strict=True):
        whole = torch.addmm(W.to(acc), B.to(acc), A, alpha=layer.scaling)
        torch.linalg.vector_norm(whole, dim=1, out=out)
    return norms


def dora_magnitude_fwd(z: Tensor, factor: Tensor, rest: Tensor | None) -> Tensor:
    """`y = factor * z + rest`, in fp32 and rounded once.

    Args:
        z: [M, N], fp32, bf16 or fp16 (fp64 for checks).
        factor: [N], fp32 (fp64 where z is).
        rest: [N], [M, N], or None; any of z's dtypes.

    Returns:
        y [M, N] in z's dtype.
    """
    if rest is None:
        return _by_rows(lambda z: z * factor, z)
    return _by_rows(lambda z, rest: z * factor + rest, z, rest.expand(z.shape))


def dora_magnitude_bwd(
    dy: Tensor,
    z: Tensor,
    factor: Tensor,
    needs: tuple[bool, bool, bool] = (True, True, False),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`dz = factor * dy`, `dfactor = sum over m of dy * z`, `drest = sum over m of dy`.

    Args:
        dy: [M, N] in z's dtype.
        z, factor: as given to the forward.
        needs: whether dz, dfactor and drest, that of a rest [N], are wanted.

    Returns:
        dz [M, N] in z's dtype, dfactor and drest [N] in factor's; None where not wanted.
    """
    dz = _by_rows(lambda dy: dy * factor, dy) if needs[0] else None
    dfactor: Tensor | None = None
    if needs[1]:
        dfactor = torch.zeros_like(factor)
        for dy_rows, z_rows in zip(dy.split(_rows(dy)), z.split(_rows(dy)), strict=True):
            dfactor += (dy_rows.to(factor.dtype) * z_rows).sum(0)
    return dz, dfactor, dy.sum(0, dtype=factor.dtype) if needs[2] else None


def dora_dropout_fwd(x: Tensor, dropout_p: float, seed: Tensor) -> tuple[Tensor, Tensor]:
    """`kept = mask * x`, `rest = x - drop(x)`, where `drop(x) = scale * kept`.

    These are the inputs of the two products with W that DoRA takes with dropout. `kept` has no
    scale, which would round it.

    Args:
        x: [M, K], fp32, bf16 or fp16 (fp64 for checks).
        dropout_p: probability of dropping an element of x, above 0.
        seed: int64, one element; mask and scale are those of `reference.dropout_mask`.

    Returns:
        kept and rest, [M, K] in x's dtype.
    """
    mask, share = _mask_and_share(x, dropout_p, seed)
    return torch.where(mask, x, 0.0), torch.where(mask, x * share, x)


def dora_dropout_bwd(dkept: Tensor, drest: Tensor, dropout_p: float, seed: Tensor) -> Tensor:
    """`dx = mask * dkept + (1 - scale * mask) * drest`, in fp32 and rounded once.

    Args:
        dkept, drest: [M, K] in the dtype of the forward's x.
        dropout_p, seed: as given to the forward.

    Returns:
        dx [M, K] in dkept's dtype.
    """
    mask, share = _mask_and_share(dkept, dropout_p, seed)
    acc = sum_dtype(dkept)
    return _by_rows(
        lambda dkept, drest, mask: torch.where(mask, dkept.to(acc) + drest.to(acc) * share, drest),
        dkept,
        drest,
        mask,
    )


def _mask_and_share(x: Tensor, p: float, seed: Tensor) -> tuple[Tensor, float]:
    """The mask of x, and `1 - scale`."""
    _, scale = dropout_threshold(p)
    return dropout_mask(x.shape[0], x.shape[1], p, seed, x.device), 1.0 - scale


def _rows(matrix: Tensor) -> int:
    block = _BLOCK if matrix.device.type == "cpu" else _GPU_BLOCK
    return max(1, block // max(1, matrix.shape[1]))


def _by_rows(formula: Callable[..., Tensor], first: Tensor, *others: Tensor) -> Tensor:
    """`formula` of the matrices in the first one's dtype, some rows at a time.

    All rows at once where a gradient may be asked for, which writing in place would lose.
    """
    if torch.is_grad_enabled():
        return formula(first, *others).to(first.dtype)
    out, rows = first.new_empty(first.shape), _rows(first)
    for some, *inputs in zip(*(t.split(rows) for t in (out, first, *others)), strict=True):
        some.copy_(formula(*inputs))
    return out
