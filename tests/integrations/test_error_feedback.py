"""Quantising with error feedback, against its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastlora import ops
from fastlora.integrations.peft.merge.feedback import DAMPING, quantize_with_feedback
from fastlora.integrations.peft.merge.report import energy
from fastlora.quant import QuantState


def case(N: int, K: int, rank: int = 12) -> tuple[Tensor, Tensor]:
    """A weight, and the moments of correlated inputs."""
    generator = torch.Generator().manual_seed(N * K)
    weight = torch.randn(N, K, generator=generator)
    x = torch.randn(400, rank, generator=generator) @ torch.randn(rank, K, generator=generator)
    x += 0.3 * torch.randn(400, K, generator=generator)
    return weight, x.T @ x


def decoded(packed: Tensor, state: QuantState) -> Tensor:
    return ops.dequantize_4bit(packed, state, torch.float32)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize(("N", "K"), [(16, 192), (13, 67), (3, 301), (5, 63)])
def test_every_row_is_better_or_the_same(N: int, K: int, quant_type: str, nested: bool) -> None:
    weight, H = case(N, K)
    plain = ops.quantize_4bit(weight, 64, quant_type, nested)
    found = quantize_with_feedback(weight, plain[1], H)
    for name in ("absmax", "code"):
        assert torch.equal(getattr(found[1], name), getattr(plain[1], name))
    assert found[0].shape == plain[0].shape and found[0].dtype == torch.uint8
    rows = [[energy(row[None], H) for row in decoded(*q) - weight] for q in (found, plain)]
    assert all(ours <= theirs * (1 + 1e-5) for ours, theirs in zip(*rows, strict=True))
    assert sum(rows[0]) < 0.8 * sum(rows[1])


def test_inputs_without_correlation_give_plain_rounding() -> None:
    weight, _ = case(12, 130)
    plain = ops.quantize_4bit(weight, 64, "nf4")
    found = quantize_with_feedback(weight, plain[1], torch.eye(130))
    assert torch.equal(found[0], plain[0])


def test_against_the_update_stated_directly() -> None:
    """Column by column, with the inverse of what is left of H taken anew each time."""
    N, K = 6, 40
    weight, H = case(N, K)
    packed, state = ops.quantize_4bit(weight, 32, "nf4")
    absmax = state.absmax.repeat_interleave(32)[: N * K].view(N, K).double()
    damped = H.double() + DAMPING * H.double().diagonal().mean() * torch.eye(K, dtype=torch.float64)
    rest, Q = weight.double().clone(), torch.empty(N, K, dtype=torch.float64)
    code = state.code.double()
    for i in range(K):
        nearest = ((rest[:, i] / absmax[:, i])[:, None] - code).abs().argmin(dim=1)
        Q[:, i] = code[nearest] * absmax[:, i]
        inverse = torch.linalg.inv(damped[i:, i:])
        error = (rest[:, i] - Q[:, i]) / inverse[0, 0]
        rest[:, i:] -= error[:, None] * inverse[0]
    found = decoded(*quantize_with_feedback(weight, state, H)).double()
    plain = decoded(packed, state).double()
    better = [
        energy((Q - weight)[n : n + 1], H) < energy((plain - weight)[n : n + 1], H)
        for n in range(N)
    ]
    want = torch.where(torch.tensor(better)[:, None], Q, plain)
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)
    assert any(better)


def test_blocks_of_zeros_and_silent_inputs() -> None:
    weight, H = case(4, 128)
    weight[1, :64] = 0
    H[5], H[:, 5] = 0, 0
    state = ops.quantize_4bit(weight, 64, "nf4")[1]
    out = decoded(*quantize_with_feedback(weight, state, H))
    assert out.isfinite().all() and not out[1, :64].any()
    silent = quantize_with_feedback(weight, state, torch.zeros(128, 128))
    assert decoded(*silent).isfinite().all()
