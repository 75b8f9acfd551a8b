"""The definition of every op, in plain torch. All backends are checked against these functions.

Sizes: M tokens, N out_features, K in_features, R rank. Sums are taken in fp32 (fp64 for fp64
inputs) and each result is rounded once, at the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .quant import (
    BLOCKSIZES,
    NESTED_BLOCKSIZE,
    QuantState,
    as_quant_state,
    code_table,
    dynamic_code,
    packed_bytes,
    quantize_bounds,
)

PHILOX_ROUNDS = 7
_PHILOX_M0, _PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
_PHILOX_W0, _PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
_MASK32 = 0xFFFFFFFF

# ---- dropout ---------------------------------------------------------------------------------


def dropout_threshold(p: float) -> tuple[int, float]:
    """`(t, 1 / (1 - t / 65536))` with `t = round(65536 p)`: the integer form of a dropout rate.

    An element is kept where its 16 random bits, read as an unsigned integer, are >= t.

    Args:
        p: probability of dropping an element, 0 <= p <= 1.

    Returns:
        The threshold, 0 to 65536, and the scale of the kept elements (0 when all are dropped).

    Raises:
        ValueError: p is outside [0, 1].
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout_p must be between 0 and 1, got {p}")
    threshold = round(p * 65536)
    return threshold, 0.0 if threshold == 65536 else 1.0 / (1.0 - threshold / 65536)


def dropout_mask(
    M: int,
    K: int,
    p: float,
    seed: Tensor | int,
    device: torch.device | str | None = None,
    first_row: int = 0,
) -> Tensor:
    """`mask[m, k] = philox16(m, k) >= threshold(p)`, the same bits on every backend.

    Element (m, k) lies in pair `q = (k % 128) // 2` of block `k // 128`. Its 16 bits are half
    `k % 2` (0: the low half) of output word `q // 16` of Philox4x32-7 with

        counter = (q % 16, k // 128, m mod 2^32, m // 2^32),   key = (seed mod 2^32, seed // 2^32).

    Sixteen neighbouring counters fill one vector along k (fixed m) and also one along m (fixed k),
    so that forward and backward both make the mask in the order in which they read x.

    Args:
        M, K: shape of the mask.
        p: probability of dropping an element.
        seed: int64, one element.
        device: where the mask is made.
        first_row: m of the mask's first row: these are rows of a larger batch.

    Returns:
        bool [M, K], True where the element is kept.

    Source: J. K. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    threshold, _ = dropout_threshold(p)
    key = int(seed) & 0xFFFFFFFFFFFFFFFF
    k0, k1 = key & _MASK32, key >> 32
    blocks = (K + 127) // 128
    m = torch.arange(first_row, first_row + M, dtype=torch.int64, device=device).view(M, 1, 1)
    block = torch.arange(blocks, dtype=torch.int64, device=device).view(1, blocks, 1)
    lane = torch.arange(16, dtype=torch.int64, device=device).view(1, 1, 16)
    shape = (M, blocks, 16)
    c0, c1 = lane.expand(shape), block.expand(shape)
    c2, c3 = (m & _MASK32).expand(shape), (m >> 32).expand(shape)
    for _ in range(PHILOX_ROUNDS):
        hi0, lo0 = _mul_32x32(c0, _PHILOX_M0)
        hi1, lo1 = _mul_32x32(c2, _PHILOX_M1)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _PHILOX_W0) & _MASK32, (k1 + _PHILOX_W1) & _MASK32
    words = torch.stack((c0, c1, c2, c3), dim=2)  # [M, blocks, 4 words, 16 lanes]
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=-1)  # pairs (k even, k odd)
    return (halves.reshape(M, blocks * 128) >= threshold)[:, :K]


def _mul_32x32(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b, for int64 tensors holding unsigned 32-bit values."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def _dropout(x: Tensor, p: float, seed: Tensor | int | None, first_row: int = 0) -> Tensor:
    """`x * mask / (1 - p)`, or x itself when p = 0; x's rows are `first_row` and on of a batch."""
    if p == 0.0:
        return x
    if seed is None:
        raise ValueError("seed must be an int64 tensor of one element when dropout_p > 0, got None")
    _, scale = dropout_threshold(p)
    mask = dropout_mask(x.shape[0], x.shape[1], p, seed, x.device, first_row)
    return torch.where(mask, x * scale, 0.0)


# ---- LoRA on a dense base --------------------------------------------------------------------


def _acc(x: Tensor) -> torch.dtype:
    """The dtype of all sums: fp64 for fp64 inputs, fp32 for all others."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def lora_linear_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
) -> tuple[Tensor, Tensor]:
    """`S = drop(x) A^T`, `y = x W^T + bias + scaling * S B^T`.

    Args:
        x: [M, K], fp32, bf16 or fp16 (fp64 for checks).
        weight: [N, K], x's dtype, frozen.
        bias: [N] or None.
        lora_A: [R, K], fp32 or x's dtype.
        lora_B: [N, R], lora_A's dtype.
        scaling: factor of the LoRA term (alpha / r in PEFT).
        dropout_p: probability of dropping an element of x on the LoRA path, 0 to 1.
        seed: int64, one element; needed when dropout_p > 0.

    Returns:
        y [M, N] in x's dtype; S [M, R] in fp32 (fp64 for fp64), unscaled, saved for the backward.
    """
    return _fwd(x, x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)


def shrink(
    x: Tensor, lora_A: Tensor, dropout_p: float, seed: Tensor | int | None, first_row: int = 0
) -> Tensor:
    """`S = drop(x) A^T`, `[M, R]` in fp32 (fp64 for fp64); arguments as in `lora_linear_fwd`."""
    acc = _acc(x)
    return _dropout(x.to(acc), dropout_p, seed, first_row) @ lora_A.to(acc).T


def _fwd(
    x: Tensor,
    x_base: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | int | None,
    first_row: int = 0,
) -> tuple[Tensor, Tensor]:
    acc = _acc(x)
    S = shrink(x, lora_A, dropout_p, seed, first_row)
    y = x_base.to(acc) @ weight.to(acc).T + scaling * (S @ lora_B.to(acc).T)
    if bias is not None:
        y = y + bias.to(acc)
    return y.to(x.dtype), S


def lora_linear_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    S: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    needs: tuple[bool, bool, bool, bool] = (True, True, True, False),
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `lora_linear_fwd`, for `dy = dL/dy`:

        dS = scaling * dy B            dx    = dy W + drop'(dS A)
        dA = dS^T drop(x)              dB    = scaling * dy^T S
                                       dbias = sum over m of dy

    Args:
        dy: [M, N], x's dtype.
        x, weight, lora_A, lora_B, scaling, dropout_p, seed: as given to the forward.
        S: [M, R], as returned by the forward.
        needs: which of (dx, dA, dB, dbias) to compute.

    Returns:
        dx [M, K] in x's dtype, dA [R, K] and dB [N, R] in the adapter's dtype, dbias [N] in fp32
        (fp64 for fp64); None for what was not asked for.
    """
    return _bwd(dy, dy, x, weight, lora_A, lora_B, S, scaling, dropout_p, seed, needs)


def _bwd(
    dy: Tensor,
    dy_base: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    S: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | int | None,
    needs: tuple[bool, bool, bool, bool],
    first_row: int = 0,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    dx, *grads = _wide_bwd(
        dy, dy_base, x, weight, lora_A, lora_B, S, scaling, dropout_p, seed, needs, first_row
    )
    return None if dx is None else dx.to(dy.dtype), grads[0], grads[1], grads[2]


def _wide_bwd(
    dy: Tensor,
    dy_base: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    S: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | int | None,
    needs: tuple[bool, bool, bool, bool],
    first_row: int = 0,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """`_bwd` with dx not yet rounded."""
    acc = _acc(dy)
    dS, dA, dB, dbias = skinny_bwd(
        dy, x, lora_A, lora_B, S, scaling, dropout_p, seed, needs[1:], first_row
    )
    dx = None
    if needs[0]:
        lora = expand_dx(dS, lora_A, dropout_p, seed, first_row)
        dx = dy_base.to(acc) @ weight.to(acc) + lora
    return dx, dA, dB, dbias


def skinny_bwd(
    dy: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    S: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | int | None,
    needs: tuple[bool, ...],
    first_row: int = 0,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """All of `lora_linear_bwd` that does not touch W: `dS`, `[M, R]` in fp32, then dA, dB, dbias.

    Arguments as in `lora_linear_bwd`; `needs` says which of dA, dB and dbias to compute.
    """
    acc = _acc(dy)
    need_dA, need_dB, need_dbias = needs
    g = dy.to(acc)
    dS = scaling * (g @ lora_B.to(acc))
    dA = dB = dbias = None
    if need_dA:
        dA = (dS.T @ _dropout(x.to(acc), dropout_p, seed, first_row)).to(lora_A.dtype)
    if need_dB:
        dB = (scaling * (g.T @ S)).to(lora_B.dtype)
    if need_dbias:
        dbias = g.sum(0)
    return dS, dA, dB, dbias


def expand_dx(
    dS: Tensor, lora_A: Tensor, dropout_p: float, seed: Tensor | int | None, first_row: int = 0
) -> Tensor:
    """`drop'(dS A)`, `[M, K]` in dS's dtype: the LoRA term of dx."""
    return _dropout(dS @ lora_A.to(dS.dtype), dropout_p, seed, first_row)


# ---- LoRA on a 4-bit base --------------------------------------------------------------------


def qlora_linear_fwd(
    x: Tensor,
    weight: Tensor,
    quant_state: QuantState,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`S = drop(x) A^T`, `y = x W^T + bias + scaling * S B^T`, `W = dequantize_4bit(weight)`.

    Args:
        x: [M, K], fp32, bf16 or fp16 (fp64 for checks).
        weight: uint8, ceil(N K / 2) bytes, two codes a byte, high nibble first.
        quant_state: absmax, code, blocksize and, for nested absmax, offset and state2.
        bias, lora_A, lora_B, scaling, dropout_p, seed: as in `lora_linear_fwd`.
        compute_dtype: dtype to which W is decoded and x rounded for the base product, as
            bitsandbytes' Linear4bit.compute_dtype; x's dtype when None. The LoRA path always reads
            x as it came, and y keeps x's dtype.

    Returns:
        y [M, N] in x's dtype; S [M, R] in fp32 (fp64 for fp64).
    """
    dtype = compute_dtype or x.dtype
    W = dequantize_4bit(weight, quant_state, dtype)
    return _fwd(x, x.to(dtype), W, bias, lora_A, lora_B, scaling, dropout_p, seed)


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
    seed: Tensor | int | None = None,
    compute_dtype: torch.dtype | None = None,
    needs: tuple[bool, bool, bool, bool] = (True, True, True, False),
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `qlora_linear_fwd`: those of `lora_linear_bwd` with the decoded W.

    Arguments as in `qlora_linear_fwd` and `lora_linear_bwd`; returns as `lora_linear_bwd`.
    """
    dtype = compute_dtype or x.dtype
    W = dequantize_4bit(weight, quant_state, dtype)
    return _bwd(dy, dy.to(dtype), x, W, lora_A, lora_B, S, scaling, dropout_p, seed, needs)


# ---- several linears of one input ------------------------------------------------------------


class Projection(NamedTuple):
    """One of several LoRA linears that read the same x; fields as the arguments of the single ops.

    `weight` is dense where `quant_state` is None, else packed 4-bit bytes.
    """

    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    dropout_p: float = 0.0
    seed: Tensor | None = None
    quant_state: QuantState | None = None
    compute_dtype: torch.dtype | None = None


def shared_linear_fwd(
    x: Tensor, projections: Sequence[Projection]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """`y_i = x W_i^T + bias_i + scaling_i * S_i B_i^T`, `S_i = drop_i(x) A_i^T`, for each i.

    Args:
        x: [M, K], fp32, bf16 or fp16 (fp64 for checks).
        projections: all dense or all 4-bit, with the same dtypes; their own N, R and dropout.

    Returns:
        All y_i [M, N_i] in x's dtype, and all S_i [M, R_i] in fp32 (fp64 for fp64).
    """
    results = [_projection_fwd(x, p) for p in projections]
    return tuple(y for y, _ in results), tuple(S for _, S in results)


def _projection_fwd(x: Tensor, p: Projection) -> tuple[Tensor, Tensor]:
    lora = (p.bias, p.lora_A, p.lora_B, p.scaling, p.dropout_p, p.seed)
    if p.quant_state is None:
        return lora_linear_fwd(x, p.weight, *lora)
    return qlora_linear_fwd(x, p.weight, p.quant_state, *lora, p.compute_dtype)


def shared_linear_bwd(
    dys: Sequence[Tensor | None],
    x: Tensor,
    projections: Sequence[Projection],
    Ss: Sequence[Tensor],
    need_dx: bool,
    needs: Sequence[tuple[bool, bool, bool]],
) -> tuple[Tensor | None, tuple[tuple[Tensor | None, Tensor | None, Tensor | None], ...]]:
    """Gradients of `shared_linear_fwd`: those of the single ops, and their sum for x,

        dx = sum over i of dy_i W_i + drop_i'(dS_i A_i)

    which is taken in fp32 and rounded once.

    Args:
        dys: dL/dy_i [M, N_i] in x's dtype; None where y_i has no gradient.
        x, projections: as given to the forward.
        Ss: as returned by the forward.
        need_dx: whether to compute dx.
        needs: which of (dA_i, dB_i, dbias_i) to compute.

    Returns:
        dx [M, K] in x's dtype, and for each i (dA_i, dB_i, dbias_i) as in `lora_linear_bwd`; None
        for what was not asked for, and for all of an i without dy_i.
    """
    total: Tensor | None = None
    grads: list[tuple[Tensor | None, Tensor | None, Tensor | None]] = []
    for dy, p, S, need in zip(dys, projections, Ss, needs, strict=True):
        if dy is None:
            grads.append((None, None, None))
            continue
        W, dtype = p.weight, x.dtype
        if p.quant_state is not None:
            dtype = p.compute_dtype or x.dtype
            W = dequantize_4bit(p.weight, p.quant_state, dtype)
        lora = (p.lora_A, p.lora_B, S, p.scaling, p.dropout_p, p.seed)
        dx, dA, dB, dbias = _wide_bwd(dy, dy.to(dtype), x, W, *lora, (need_dx, *need))
        grads.append((dA, dB, dbias))
        if dx is not None:
            total = dx if total is None else total + dx
    return None if total is None else total.to(x.dtype), tuple(grads)


# ---- the gate of an MLP ----------------------------------------------------------------------

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
# Elements that are widened to fp32 at a time: they stay in a cache, and are never many.
_BLOCK = 2**18


def activate(x: Tensor, activation: str) -> Tensor:
    """`x sigmoid(x)` for "silu"; `x Phi(x)` for "gelu", with Phi by tanh for "gelu_tanh"."""
    if activation == "silu":
        return torch.nn.functional.silu(x)
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return torch.nn.functional.gelu(x, approximate=approximate)


def gated_fwd(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """`h = act(gate) * up`, taken in fp32 and rounded once.

    Args:
        gate, up: [M, I], fp32, bf16 or fp16 (fp64 for checks).
        activation: one of `ACTIVATIONS`.

    Returns:
        h [M, I] in gate's dtype.

    Source: GLU variants, arXiv:2002.05202.
    """
    acc, h = _acc(gate), torch.empty_like(gate)
    for g, u, out in _blocks(gate, up, h):
        out.copy_(activate(g.to(acc), activation) * u)
    return h


def gated_bwd(dh: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Gradients of `gated_fwd`: `dgate = dh * up * act'(gate)`, `dup = dh * act(gate)`.

    Args:
        dh: [M, I] in gate's dtype.
        gate, up, activation: as given to the forward.

    Returns:
        dgate and dup, [M, I] in gate's dtype.
    """
    acc, dgate, dup = _acc(gate), torch.empty_like(gate), torch.empty_like(up)
    for d, g, u, dg, du in _blocks(dh, gate, up, dgate, dup):
        wide, d_wide = g.to(acc), d.to(acc)
        du.copy_(d_wide * activate(wide, activation))
        da = d_wide * u
        if activation == "silu":
            dg.copy_(torch.ops.aten.silu_backward(da, wide))
        else:
            approximate = "tanh" if activation == "gelu_tanh" else "none"
            dg.copy_(torch.ops.aten.gelu_backward(da, wide, approximate=approximate))
    return dgate, dup


def _blocks(*matrices: Tensor) -> Iterator[tuple[Tensor, ...]]:
    rows = max(1, _BLOCK // max(1, matrices[0].shape[1]))
    return zip(*(matrix.split(rows) for matrix in matrices), strict=True)


# ---- a stack of experts ----------------------------------------------------------------------


def segments(offsets: Tensor) -> Iterator[tuple[int, int, int]]:
    """`(e, begin, end)`: the rows of each expert that has any, from the ends in `offsets`."""
    begin = 0
    for e, end in enumerate(offsets.tolist()):
        if end > begin:
            yield e, begin, end
        begin = end


def grouped_lora_linear_fwd(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
) -> tuple[Tensor, Tensor]:
    """Each row of x times the weight of its expert: `lora_linear_fwd` on every segment of rows.

        S[m] = drop(x)[m] A[e]^T,   y[m] = x[m] W[e]^T + scaling * S[m] B[e]^T
        for offsets[e - 1] <= m < offsets[e]

    The dropout's mask is that of all of x: a row's bits do not depend on its expert. Rows from
    offsets[-1] on have no expert, and zeros in y and S.

    Args:
        x: [M, K], rows sorted by expert.
        weight: [E, N, K], x's dtype, frozen.
        offsets: [E], int32 or int64, ascending: where the rows of each expert end, at most M.
        lora_A: [E, R, K], fp32 or x's dtype.
        lora_B: [E, N, R], lora_A's dtype.
        scaling, dropout_p, seed: as in `lora_linear_fwd`.

    Returns:
        y [M, N] in x's dtype; S [M, R] in fp32 (fp64 for fp64).
    """
    return _grouped_fwd(x, x, weight, offsets, lora_A, lora_B, scaling, dropout_p, seed)


def grouped_qlora_linear_fwd(
    x: Tensor,
    weight: Tensor,
    quant_state: QuantState,
    offsets: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`grouped_lora_linear_fwd` with `W = dequantize_4bit(weight)`, `[E, N, K]`.

    Args:
        weight: uint8, the stack's E N K / 2 bytes; N K is a multiple of the blocksize, so that the
            blocks of one expert are its own.
        compute_dtype: as in `qlora_linear_fwd`.
    """
    dtype = compute_dtype or x.dtype
    W = dequantize_4bit(weight, quant_state, dtype)
    return _grouped_fwd(x, x.to(dtype), W, offsets, lora_A, lora_B, scaling, dropout_p, seed)


def _grouped_fwd(
    x: Tensor,
    x_base: Tensor,
    weight: Tensor,
    offsets: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | int | None,
) -> tuple[Tensor, Tensor]:
    y = x.new_zeros(x.shape[0], lora_B.shape[1])
    S = x.new_zeros(x.shape[0], lora_A.shape[1], dtype=_acc(x))
    for e, begin, end in segments(offsets):
        rows = slice(begin, end)
        lora = (lora_A[e], lora_B[e], scaling, dropout_p, seed, begin)
        y[rows], S[rows] = _fwd(x[rows], x_base[rows], weight[e], None, *lora)
    return y, S


def grouped_lora_linear_bwd(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    offsets: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    S: Tensor | None,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `grouped_lora_linear_fwd`: `lora_linear_bwd` on every segment of rows.

    Args:
        dy: [M, N], x's dtype.
        x: [M, K]; may be None where dA is not asked for.
        S: [M, R]; may be None where dB is not asked for.
        weight, offsets, lora_A, lora_B, scaling, dropout_p, seed: as given to the forward.
        needs: which of (dx, dA, dB) to compute.

    Returns:
        dx [M, K] in dy's dtype, dA [E, R, K] and dB [E, N, R] in the adapter's dtype; None for what
        was not asked for. Zeros for experts without rows, and for rows without an expert.
    """
    return _grouped_bwd(
        dy, dy, x, weight, offsets, lora_A, lora_B, S, scaling, dropout_p, seed, needs
    )


def grouped_qlora_linear_bwd(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    quant_state: QuantState,
    offsets: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    S: Tensor | None,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    compute_dtype: torch.dtype | None = None,
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `grouped_qlora_linear_fwd`: those of `grouped_lora_linear_bwd`."""
    dtype = compute_dtype or dy.dtype
    W = dequantize_4bit(weight, quant_state, dtype)
    return _grouped_bwd(
        dy, dy.to(dtype), x, W, offsets, lora_A, lora_B, S, scaling, dropout_p, seed, needs
    )


def _grouped_bwd(
    dy: Tensor,
    dy_base: Tensor,
    x: Tensor | None,
    weight: Tensor,
    offsets: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    S: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | int | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    need_dx, need_dA, need_dB = needs
    dx = dy.new_zeros(dy.shape[0], lora_A.shape[2]) if need_dx else None
    dA = torch.zeros_like(lora_A) if need_dA else None
    dB = torch.zeros_like(lora_B) if need_dB else None
    for e, begin, end in segments(offsets):
        rows = slice(begin, end)
        # What is not needed is not read.
        x_rows, S_rows = (dy if t is None else t[rows] for t in (x, S))
        lora = (lora_A[e], lora_B[e], S_rows, scaling, dropout_p, seed, (*needs, False), begin)
        grads = _bwd(dy[rows], dy_base[rows], x_rows, weight[e], *lora)
        for out, place, grad in ((dx, rows, grads[0]), (dA, e, grads[1]), (dB, e, grads[2])):
            if out is not None and grad is not None:
                out[place] = grad
    return dx, dA, dB


# ---- 4-bit -----------------------------------------------------------------------------------

# Below this, the reciprocal of absmax would be infinite.
_ABSMAX_MIN = 1e-38


def quantize_4bit(
    weight: Tensor,
    blocksize: int = 64,
    quant_type: str = "nf4",
    compress_statistics: bool = False,
) -> tuple[Tensor, QuantState]:
    """`nibble[i] = argmin_c |weight[i] / absmax[i // blocksize] - code[c]|`, two to a byte.

    absmax is the largest magnitude of the block. A value midway between two codes gets the lower.
    Bit-exact with bitsandbytes on the CPU: full blocks are multiplied by the reciprocal of absmax,
    a short last block is divided by it; absmax is held above 1e-38 for the scaling, and for a
    short last block also in what is returned.

    Args:
        weight: any shape, fp32, bf16 or fp16.
        blocksize: elements per absmax, one of `quant.BLOCKSIZES`.
        quant_type: "nf4" or "fp4".
        compress_statistics: store absmax in 8 bits (double quantisation).

    Returns:
        The packed bytes, uint8 `[(n + 1) // 2, 1]`, and the state to decode them.

    Raises:
        ValueError: for another blocksize or quant_type.
        TypeError: for another dtype.

    Source: QLoRA, arXiv:2305.14314; bitsandbytes 0.50, `quantize_4bit`.
    """
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize must be one of {BLOCKSIZES}, got {blocksize}")
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"weight must be fp32, bf16 or fp16, got {weight.dtype}")
    code = code_table(quant_type, weight.device)

    flat = weight.detach().reshape(-1).float()
    n = flat.numel()
    full = n - n % blocksize
    blocks = flat[:full].view(-1, blocksize)
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * absmax.clamp(min=_ABSMAX_MIN).reciprocal()[:, None]).view(-1)
    if full < n:
        last = flat[full:].abs().max().clamp(min=_ABSMAX_MIN)
        absmax = torch.cat([absmax, last[None]])
        scaled = torch.cat([scaled, flat[full:] / last])
    if n % 2:
        scaled = torch.nn.functional.pad(scaled, (0, 1))

    midpoints, order = quantize_bounds(code)
    nibbles = order[torch.bucketize(scaled.clamp(-1, 1), midpoints)].to(torch.uint8)
    packed = (nibbles[::2] << 4 | nibbles[1::2])[:, None]

    state = QuantState(absmax, weight.shape, code, weight.dtype, blocksize, quant_type)
    return packed, nested(state) if compress_statistics else state


def nested(state: QuantState) -> QuantState:
    """`state` with absmax stored in 8 bits: `offset = mean(absmax)`, then `absmax - offset` coded.

    Args:
        state: a state with fp32 absmax.
    """
    offset = state.absmax.mean()
    absmax, state2 = _quantize_absmax(state.absmax - offset)
    return replace(state, absmax=absmax, offset=offset, state2=state2)


def dequantize_4bit(
    packed: Tensor,
    quant_state: QuantState,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`weight[i] = code[nibble[i]] * absmax[i // blocksize]`, an fp32 product rounded once.

    Args:
        packed: `(n + 1) // 2` bytes, any shape, uint8 or a float dtype used as storage.
        quant_state: what `quantize_4bit` returned, or bitsandbytes' own.
        dtype: of the result; `out.dtype`, else `quant_state.dtype`, when None. fp64 gives the fp32
            product, widened.
        out: where the result goes; `quant_state.shape`, `dtype`.

    Returns:
        The weight, `quant_state.shape`.

    Raises:
        ValueError: when packed holds too few bytes or out does not fit.

    Source: bitsandbytes 0.50, `dequantize_4bit`.
    """
    state = as_quant_state(quant_state)
    n = state.shape.numel()
    if dtype is None:
        dtype = state.dtype if out is None else out.dtype
    data = packed_bytes(packed)
    if data.numel() < (n + 1) // 2:
        raise ValueError(f"packed must hold {(n + 1) // 2} bytes, got {data.numel()}")
    if out is not None and (out.shape != state.shape or out.dtype != dtype):
        raise ValueError(
            f"out must be {tuple(state.shape)} {dtype}, got {tuple(out.shape)} {out.dtype}"
        )
    nibbles = torch.stack([data >> 4, data & 15], dim=1).view(-1)[:n]
    scale = dequantize_absmax(state).repeat_interleave(state.blocksize)[:n]
    weight = (state.code.float()[nibbles.int()] * scale).view(state.shape).to(dtype)
    return weight if out is None else out.copy_(weight)


def dequantize_absmax(quant_state: QuantState) -> Tensor:
    """`absmax[b] = state2.code[absmax_u8[b]] * state2.absmax[b // 256] + offset`, when nested.

    Product and sum are rounded one after the other, without a fused multiply-add. A plain absmax is
    returned as it is.

    Args:
        quant_state: the state of a 4-bit weight.

    Returns:
        fp32 `[nblocks]`.

    Source: bitsandbytes 0.50, `dequantize_blockwise`.
    """
    state = as_quant_state(quant_state)
    if state.state2 is None or state.offset is None:
        return state.absmax.float()
    inner = state.state2
    scale = inner.absmax.float().repeat_interleave(inner.blocksize)[: state.absmax.numel()]
    return inner.code[state.absmax.int()] * scale + state.offset


def _quantize_absmax(values: Tensor) -> tuple[Tensor, QuantState]:
    """8-bit codes of `values [nblocks]` on `dynamic_code`, with one absmax per 256 of them.

    bitsandbytes rounds the scaled value to a grid of 2^16 points first (its table has one entry for
    each), then takes the code nearest to that grid point. Where absmax has no finite reciprocal, as
    in an all-zero block, zero gets code 0, not the code of zero.
    """
    code = dynamic_code().to(values.device)
    n = values.numel()
    padded = torch.nn.functional.pad(values, (0, -n % NESTED_BLOCKSIZE)).view(-1, NESTED_BLOCKSIZE)
    absmax = padded.abs().amax(dim=1)
    scaled = (padded * absmax.reciprocal()[:, None]).clamp(-1, 1)
    # A fused multiply-add in fp32: the product is exact in fp64, and the sum is rounded once.
    # NaN is 0 times an infinite reciprocal.
    grid = (((scaled + 1) * 0.5).double() * 65535 + 0.5).float().nan_to_num(0.0).int()
    midpoints = (code[:-1] + code[1:]) * 0.5
    # Divided by a tensor, as CUDA multiplies by the reciprocal of a number.
    nearest = 2.0 * grid.float() / torch.full_like(absmax, 65535)[:, None] - 1.0
    index = torch.bucketize(nearest, midpoints).to(torch.uint8)
    shape = torch.Size((n,))
    state2 = QuantState(absmax, shape, code, torch.float32, NESTED_BLOCKSIZE, "dynamic")
    return index.view(-1)[:n].contiguous(), state2


# ---- merging ---------------------------------------------------------------------------------


def merge_weight(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """`W + scaling * B A`, not yet rounded to W's dtype.

    Args:
        weight: [N, K], dense.
        lora_A: [R, K].
        lora_B: [N, R].
        scaling: factor of the LoRA term.

    Returns:
        [N, K] in fp32 (fp64 for fp64).
    """
    acc = _acc(weight)
    return weight.to(acc) + scaling * (lora_B.to(acc) @ lora_A.to(acc))
