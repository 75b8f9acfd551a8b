"""`S = drop(x) A^T`: the tokens are read once from memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....reference import dropout_threshold
from ..launch import Launcher
from .dropout import BLOCK, keep_tile
from .products import dot_wide
from .sum_partials import sum_partials


@triton.jit(do_not_specialize=["M", "steps", "threshold"])
def shrink_kernel(
    x,
    lora_A,
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
    DROPOUT: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    # Programs that share tokens are neighbours: all but the first find them in the L2 cache.
    chunks = tl.cdiv(R, BR)
    tile, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    split = tl.program_id(1)
    rows = tile.to(tl.int64) * BM + tl.arange(0, BM)
    ranks = chunk * BR + tl.arange(0, BR)
    row_ok, rank_ok = rows < M, ranks < R
    x_rows = x + rows[:, None] * stride_xm
    A_rows = lora_A + ranks.to(tl.int64)[None, :] * K
    acc = tl.zeros([BM, BR], tl.float32)
    for step in range(split * steps, min((split + 1) * steps, tl.cdiv(K, BK))):
        columns = step * BK + tl.arange(0, BK)
        column_ok = columns < K
        tokens = tl.load(
            x_rows + columns.to(tl.int64)[None, :] * stride_xk,
            mask=row_ok[:, None] & column_ok[None, :],
            other=0.0,
        )
        if DROPOUT:
            keep = keep_tile(tl.load(seed), rows, step * (BK // 128), threshold, BK)
            tokens = tl.where(keep, tokens, tl.zeros_like(tokens))
        A = tl.load(
            A_rows + columns[:, None], mask=column_ok[:, None] & rank_ok[None, :], other=0.0
        )
        acc = dot_wide(tokens, A, acc, lora_A.dtype.element_ty == tl.float32)
    at = (split.to(tl.int64) * M + rows)[:, None] * R + ranks[None, :]
    tl.store(out + at, acc * scale, mask=row_ok[:, None] & rank_ok[None, :])


def shrink(
    gpu: Launcher, x: Tensor, lora_A: Tensor, dropout_p: float, seed: Tensor | None
) -> Tensor:
    """`S = drop(x) A^T`.

    For few tokens the sum over K is split and the parts are added in a second launch, in a fixed
    order.

    Args:
        x: [M, K], any strides.
        lora_A: [R, K], contiguous, fp32 or x's dtype.
        dropout_p: 0 to 1.
        seed: int64 [1] on x's device, read by the kernel; None when dropout_p is 0.

    Returns:
        S [M, R] in fp32, unscaled.
    """
    (M, K), R = x.shape, len(lora_A)
    threshold, scale = dropout_threshold(dropout_p)
    tile = gpu.tile("shrink", x.dtype, M=M, K=K, R=R)
    jobs = triton.cdiv(M, tile.BM) * triton.cdiv(R, tile.BN)
    steps, splits = gpu.split(jobs, triton.cdiv(K, BLOCK))
    S = x.new_empty((splits, M, R), dtype=torch.float32)
    gpu.run(
        shrink_kernel,
        (jobs, splits),
        x,
        lora_A,
        seed,
        S,
        M,
        K,
        R,
        steps,
        x.stride(0),
        x.stride(1),
        threshold,
        scale,
        DROPOUT=dropout_p > 0.0,
        BM=tile.BM,
        BR=tile.BN,
        BK=BLOCK,
        tile=tile,
    )
    return S[0] if splits == 1 else sum_partials(gpu, S, S.new_empty((M, R)), 1.0)
