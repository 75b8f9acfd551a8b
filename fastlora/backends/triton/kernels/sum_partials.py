"""Second stage of the deterministic reductions: partial sums added in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch import Launcher
from .products import rounded

_BLOCK = 1024


@triton.jit(do_not_specialize=["PARTS"])
def sum_partials_kernel(parts, out, count, PARTS, scale, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    total = tl.zeros([BLOCK], tl.float32)
    part_at = parts + at
    for _ in range(PARTS):
        total += tl.load(part_at, mask=mask, other=0.0)
        part_at += count
    tl.store(out + at, rounded(total * scale, out.dtype.element_ty), mask=mask)


def sum_partials(gpu: Launcher, parts: Tensor, out: Tensor, scale: float) -> Tensor:
    """`out = scale * sum over p of parts[p]`, rounded once.

    Args:
        parts: fp32 [P, ...], contiguous.
        out: parts' shape without P, contiguous, any float dtype; written.
    """
    count = out.numel()
    gpu.run(
        sum_partials_kernel,
        (triton.cdiv(count, _BLOCK),),
        parts,
        out,
        count,
        parts.shape[0],
        scale,
        BLOCK=_BLOCK,
    )
    return out
