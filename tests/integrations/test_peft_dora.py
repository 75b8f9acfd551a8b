"""DoRA's norms, alone; docs/peft.md's cases hold the layers to PEFT's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastlora import ops
from fastlora.integrations.peft_dora import expanded_norms, weight_norms
from fastlora.quant import QuantState
from tests.tolerance import assert_close_to_exact

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
N, K, R, SCALING = 41, 72, 3, 0.7


class Owner:
    """Stands for bitsandbytes' quant state, which keeps |W|^2."""


def norms_of(W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """PEFT's `get_weight_norm`."""
    return torch.linalg.norm(W + SCALING * (B @ A), dim=1)


@pytest.mark.parametrize("size", [0.1, 3.0], ids=["small", "large"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("kind", ["dense", "nf4", "nf4 nested", "fp4"])
def test_norms(kind: str, dtype: torch.dtype, size: float) -> None:
    torch.manual_seed(0)
    W = torch.randn(N, K).div(K**0.5).to(dtype)
    A, B = torch.randn(R, K) * size, torch.randn(N, R) * size
    state: QuantState | None = None
    weight = W
    if kind != "dense":
        weight, state = ops.quantize_4bit(W, 64, kind.split()[0], kind.endswith("nested"))
        W = ops.dequantize_4bit(weight, state, dtype)
    exact = norms_of(W.double(), A.double(), B.double())
    norms = weight_norms(weight, Owner(), state, A, B, SCALING)
    assert_close_to_exact(norms, exact, norms_of(W.float(), A, B), what=kind)
    if state is not None:
        norms = expanded_norms(weight, Owner(), state, A, B, SCALING)
        assert_close_to_exact(norms, exact, norms_of(W.float(), A, B), what=f"{kind}, expanded")


def test_kept_squares_follow_the_bytes() -> None:
    A, B, owner = torch.zeros(R, K), torch.zeros(N, R), Owner()
    packed, state = ops.quantize_4bit(torch.randn(N, K))
    first = expanded_norms(packed, owner, state, A, B, SCALING)
    ((_, squares),) = vars(owner).values()
    torch.testing.assert_close(expanded_norms(packed, owner, state, A, B, SCALING), first)
    ((_, again),) = vars(owner).values()
    assert again is squares
    packed.copy_(packed.flip(0))
    W = ops.dequantize_4bit(packed, state, FP32)
    second = expanded_norms(packed, owner, state, A, B, SCALING)
    torch.testing.assert_close(second, W.norm(dim=1))
    assert not torch.allclose(first, second)
