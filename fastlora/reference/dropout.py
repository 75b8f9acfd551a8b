"""Dropout by counters: the same mask on every backend, and never stored."""

from __future__ import annotations

import torch
from torch import Tensor

PHILOX_ROUNDS = 7
_PHILOX_M0, _PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
_PHILOX_W0, _PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
_MASK32 = 0xFFFFFFFF


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
    so that forward and backward both compute the mask in the order in which they read x.

    Args:
        M, K: shape of the mask.
        p: probability of dropping an element.
        seed: int64, one element.
        device: of the mask.
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


def drop(x: Tensor, p: float, seed: Tensor | int | None, first_row: int = 0) -> Tensor:
    """`x * mask / (1 - p)`, or x itself when p = 0; x's rows are `first_row` and on of a batch."""
    if p == 0.0:
        return x
    if seed is None:
        raise ValueError("seed must be an int64 tensor of one element when dropout_p > 0, got None")
    _, scale = dropout_threshold(p)
    mask = dropout_mask(x.shape[0], x.shape[1], p, seed, x.device, first_row)
    return torch.where(mask, x * scale, 0.0)
