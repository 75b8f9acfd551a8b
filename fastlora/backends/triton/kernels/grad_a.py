"""`dA = dS^T drop(x)`: one pass over x, which recomputes dropout's mask."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....reference import dropout_threshold
from ..launch import Launcher
from .dropout import BLOCK, keep_tile
from .products import dot_wide, rounded
from .sum_partials import sum_partials


@triton.jit(do_not_specialize=["M", "steps", "threshold"])
def grad_a_kernel(
    x,
    dS,
    seed,
    out,
    M,
    K,
    R,
    steps,
    stride_xm,
    stride_xk,
    threshold,
    scale,
    EXACT: tl.constexpr,
    DROPOUT: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    chunks = tl.cdiv(R, BR)
    block, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    split = tl.program_id(1)
    columns = block * BK + tl.arange(0, BK)
    ranks = chunk * BR + tl.arange(0, BR)
    column_ok, rank_ok = columns < K, ranks < R
    x_columns = x + columns.to(tl.int64)[None, :] * stride_xk
    acc = tl.zeros([BK, BR], tl.float32)
    for step in range(split * steps, min((split + 1) * steps, tl.cdiv(M, BM))):
        rows = tl.arange(0, BM).to(tl.int64) + step * BM
        row_ok = rows < M
        tokens = tl.load(
            x_columns + rows[:, None] * stride_xm,
            mask=row_ok[:, None] & column_ok[None, :],
            other=0.0,
        )
        if DROPOUT:
            keep = keep_tile(tl.load(seed), rows, block * (BK // 128), threshold, BK)
            tokens = tl.where(keep, tokens, tl.zeros_like(tokens))
        grad = tl.load(
            dS + rows[:, None] * R + ranks[None, :],
            mask=row_ok[:, None] & rank_ok[None, :],
            other=0.0,
        )
        acc = dot_wide(tl.trans(tokens), grad, acc, EXACT)
    at = (split.to(tl.int64) * R + ranks)[None, :] * K + columns.to(tl.int64)[:, None]
    total = rounded(acc * scale, out.dtype.element_ty)
    tl.store(out + at, total, mask=column_ok[:, None] & rank_ok[None, :])


def grad_a(
    gpu: Launcher,
    x: Tensor,
    dS: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`dA = dS^T drop(x)`, summed in fp32, rounded once to `dtype`, the adapter's.

    Args:
        x: [M, K], any strides.
        dS: fp32 [M, R], contiguous; scaling is in it.
        dropout_p, seed: as given to the forward.

    Returns:
        dA [R, K] in `dtype`.
    """
    (M, K), R = x.shape, dS.shape[1]
    threshold, scale = dropout_threshold(dropout_p)
    tile = gpu.tile("grad_a", x.dtype, M=M, K=K, R=R)
    jobs = triton.cdiv(K, BLOCK) * triton.cdiv(R, tile.BN)
    steps, splits = gpu.split(jobs, triton.cdiv(M, tile.BM))
    dA = x.new_empty((R, K), dtype=dtype)
    parts = dA if splits == 1 else x.new_empty((splits, R, K), dtype=torch.float32)
    gpu.run(
        grad_a_kernel,
        (jobs, splits),
        x,
        dS,
        seed,
        parts,
        M,
        K,
        R,
        steps,
        x.stride(0),
        x.stride(1),
        threshold,
        scale,
        EXACT=dtype == torch.float32,
        DROPOUT=dropout_p > 0.0,
        BM=tile.BM,
        BR=tile.BN,
        BK=BLOCK,
        tile=tile,
    )
    return dA if splits == 1 else sum_partials(gpu, parts, dA, 1.0)
