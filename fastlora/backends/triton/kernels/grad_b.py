"""`dS = scaling * dy B`, `dB = scaling * dy^T S` and `dbias = sum of dy`: one pass over dy."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Launcher
from ..tiles import Tile
from .products import column_sums, dot_wide
from .sum_partials import sum_partials

# Of dB's partial sums in memory at a time, in bytes. More tokens than that go slab by slab.
_MOST_PARTS = 64 << 20


@triton.jit(do_not_specialize=["M", "steps"])
def grad_b_kernel(
    dy,
    lora_B,
    s,
    dS,
    dB,
    dbias,
    M,
    N,
    R,
    steps,
    stride_ym,
    stride_yn,
    NEED_DS: tl.constexpr,
    NEED_DB: tl.constexpr,
    NEED_DBIAS: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BN: tl.constexpr,
):
    # A program owns BM tokens and `steps` tiles of columns: dS is summed in registers over those
    # columns, dB is complete for those tokens. `splits` and M / BM parts are left to add.
    chunks = tl.cdiv(R, BR)
    tile, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    split = tl.program_id(1)
    rows = tile.to(tl.int64) * BM + tl.arange(0, BM)
    ranks = chunk * BR + tl.arange(0, BR)
    row_ok, rank_ok = rows < M, ranks < R
    exact: tl.constexpr = lora_B.dtype.element_ty == tl.float32
    out_ok = row_ok[:, None] & rank_ok[None, :]
    at_s = rows[:, None] * R + ranks[None, :]
    if NEED_DB:
        S = tl.load(s + at_s, mask=out_ok, other=0.0)
    acc = tl.zeros([BM, BR], tl.float32)
    for step in range(split * steps, min((split + 1) * steps, tl.cdiv(N, BN))):
        columns = step * BN + tl.arange(0, BN)
        column_ok = columns < N
        wide = columns.to(tl.int64)
        grad = tl.load(
            dy + rows[:, None] * stride_ym + wide[None, :] * stride_yn,
            mask=row_ok[:, None] & column_ok[None, :],
            other=0.0,
        )
        tall_ok = column_ok[:, None] & rank_ok[None, :]
        if NEED_DS:
            B = tl.load(lora_B + wide[:, None] * R + ranks[None, :], mask=tall_ok, other=0.0)
            acc = dot_wide(grad, B, acc, exact)
        if NEED_DB:
            part = dot_wide(tl.trans(grad), S, tl.zeros([BN, BR], tl.float32), exact)
            at = (tile.to(tl.int64) * N + wide)[:, None] * R + ranks[None, :]
            tl.store(dB + at, part, mask=tall_ok)
        if NEED_DBIAS:
            if chunk == 0:
                total = column_sums(grad)
                tl.store(dbias + tile.to(tl.int64) * N + wide, total, mask=column_ok)
    if NEED_DS:
        tl.store(dS + split.to(tl.int64) * M * R + at_s, acc, mask=out_ok)


def grad_b(
    gpu: Launcher,
    dy: Tensor,
    lora_B: Tensor,
    S: Tensor,
    scaling: float,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`dS`, `dB` and `dbias` from one reading of dy, each only where `needs` asks for it.

    Args:
        dy: [M, N], any strides.
        lora_B: [N, R], contiguous. S: fp32 [M, R], contiguous.
        scaling: factor of dS and dB.
        needs: which of (dS, dB, dbias) to compute.

    Returns:
        dS [M, R] in fp32, dB [N, R] in lora_B's dtype, dbias [N] in fp32; None where not needed.
    """
    (M, N), R = dy.shape, lora_B.shape[1]
    tile = gpu.tile("grad_b", dy.dtype, M=M, K=N, R=R)
    rows = tile.BM * max(1, _MOST_PARTS // (4 * N * R))
    if M <= rows or not needs[1]:
        return _slab(gpu, tile, dy, lora_B, S, scaling, needs, lora_B.dtype)
    slabs = [
        _slab(gpu, tile, dy_rows, lora_B, S_rows, scaling, needs, torch.float32)
        for dy_rows, S_rows in zip(dy.split(rows), S.split(rows), strict=True)
    ]
    dSs, dBs, dbiases = (
        [part for part in parts if part is not None] for parts in zip(*slabs, strict=True)
    )

    def together(parts: list[Tensor], dtype: torch.dtype) -> Tensor | None:
        if not parts:
            return None
        stacked = torch.stack(parts)
        return sum_partials(gpu, stacked, stacked.new_empty(stacked.shape[1:], dtype=dtype), 1.0)

    dS = torch.cat(dSs) if dSs else None
    return dS, together(dBs, lora_B.dtype), together(dbiases, torch.float32)


def _slab(
    gpu: Launcher,
    tile: Tile,
    dy: Tensor,
    lora_B: Tensor,
    S: Tensor,
    scaling: float,
    needs: tuple[bool, bool, bool],
    dB_dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`grad_b` for tokens whose partial sums fit."""
    (M, N), R = dy.shape, lora_B.shape[1]
    tiles, chunks = triton.cdiv(M, tile.BM), triton.cdiv(R, tile.BN)
    steps, splits = gpu.split(tiles * chunks, triton.cdiv(N, tile.BK))
    need_dS, need_dB, need_dbias = needs

    def parts(need: bool, *shape: int) -> Tensor | None:
        return dy.new_empty(shape, dtype=torch.float32) if need else None

    dS, dB, dbias = (
        parts(need_dS, splits, M, R),
        parts(need_dB, tiles, N, R),
        parts(need_dbias, tiles, N),
    )
    gpu.run(
        grad_b_kernel,
        (tiles * chunks, splits),
        dy,
        lora_B,
        S,
        dS,
        dB,
        dbias,
        M,
        N,
        R,
        steps,
        dy.stride(0),
        dy.stride(1),
        NEED_DS=need_dS,
        NEED_DB=need_dB,
        NEED_DBIAS=need_dbias,
        BM=tile.BM,
        BR=tile.BN,
        BN=tile.BK,
        tile=tile,
    )

    def total(part: Tensor | None, factor: float, dtype: torch.dtype) -> Tensor | None:
        if part is None:
            return None
        return sum_partials(gpu, part, part.new_empty(part.shape[1:], dtype=dtype), factor)

    return (
        total(dS, scaling, torch.float32),
        total(dB, scaling, dB_dtype),
        total(dbias, 1.0, torch.float32),
    )
