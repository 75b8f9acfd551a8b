"""The definition itself: gradients against finite differences and autograd, dropout's mask."""

from __future__ import annotations

import math

import pytest
import torch

from fastlora import reference
from fastlora.autograd.linear import LoraLinearFunction
from fastlora.layer import Needs
from tests.cases import BASES, Base, Case, make_inputs

FP64 = (torch.float64, torch.float64, None)


@pytest.mark.parametrize("base", BASES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gradcheck(base: Base, dropout_p: float) -> None:
    case = base.fit(Case("", M=3, N=5, K=7, R=2, dropout_p=dropout_p))
    inputs = make_inputs(case, base, FP64)
    leaves = [
        t.clone().requires_grad_() for t in (inputs.x, inputs.bias, inputs.lora_A, inputs.lora_B)
    ]

    def function(x, bias, lora_A, lora_B):
        layer = inputs.layer._replace(bias=bias, lora_A=lora_A, lora_B=lora_B)
        return LoraLinearFunction.apply(x, layer, "reference", bias, lora_A, lora_B)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_backward_is_autograd_of_forward(dropout_p: float) -> None:
    inputs = make_inputs(Case("", M=9, N=11, K=140, R=3, dropout_p=dropout_p), Base(), FP64)
    leaves = [inputs.x, inputs.bias, inputs.lora_A, inputs.lora_B]
    x, bias, A, B = (t.clone().requires_grad_() for t in leaves)
    layer = inputs.layer._replace(bias=bias, lora_A=A, lora_B=B)
    y, S = reference.lora_linear_fwd(x, layer)
    y.backward(inputs.dy)
    with torch.no_grad():
        got = reference.lora_linear_bwd(inputs.dy, x, layer, S, Needs(bias=True))
    for name, ours, autograd in zip(["x", "A", "B", "bias"], got, (x, A, B, bias), strict=True):
        torch.testing.assert_close(ours, autograd.grad, rtol=1e-12, atol=1e-12, msg=name)


def philox4x32(counter: tuple[int, ...], key: int) -> tuple[int, ...]:
    """Philox4x32-7 on plain integers, written from the paper's definition."""
    c0, c1, c2, c3 = counter
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(7):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            (p1 >> 32) ^ c1 ^ k0,
            p1 & 0xFFFFFFFF,
            (p0 >> 32) ^ c3 ^ k1,
            p0 & 0xFFFFFFFF,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


@pytest.mark.parametrize("seed", [0, 1, -1, 0x1234_5678_9ABC_DEF, -(2**63)])
def test_dropout_mask_is_philox_at_the_stated_counters(seed: int) -> None:
    M, K, p = 3, 300, 0.4
    mask = reference.dropout_mask(M, K, p, torch.tensor([seed]))
    threshold, _ = reference.dropout_threshold(p)
    for m in range(M):
        for k in range(K):
            pair = k % 128 // 2
            words = philox4x32((pair % 16, k // 128, m, 0), seed & 0xFFFFFFFFFFFFFFFF)
            bits = words[pair // 16] >> (16 * (k % 2)) & 0xFFFF
            assert mask[m, k] == (bits >= threshold), (m, k)


def test_dropout_bits_look_random() -> None:
    """Keep rate, and no correlation between neighbours, rows, blocks or seeds, within 5 sigma."""
    M, K, p = 512, 1024, 0.25
    n = M * K
    first = reference.dropout_mask(M, K, p, 7)
    other = reference.dropout_mask(M, K, p, 8)
    sigma = math.sqrt(p * (1 - p) / n)
    assert abs(first.double().mean().item() - (1 - p)) < 5 * sigma
    centred = first.double() - (1 - p)
    variance = p * (1 - p)
    shifted = {
        "next element": (centred[:, :-1], centred[:, 1:]),
        "next pair": (centred[:, :-2], centred[:, 2:]),
        "next word": (centred[:, :-32], centred[:, 32:]),
        "next block": (centred[:, :-128], centred[:, 128:]),
        "next row": (centred[:-1], centred[1:]),
        "next seed": (centred, other.double() - (1 - p)),
    }
    for name, (a, b) in shifted.items():
        correlation = (a * b).mean().item() / variance
        assert abs(correlation) < 5 / math.sqrt(a.numel()), name
    # Each row and each column keeps its share.
    for dim, size in ((0, M), (1, K)):
        rates = first.double().mean(dim)
        assert (rates - (1 - p)).abs().max() < 5.5 * math.sqrt(variance / size)


def test_dropout_threshold_limits() -> None:
    assert reference.dropout_threshold(0.0) == (0, 1.0)
    assert reference.dropout_threshold(1.0) == (65536, 0.0)
    assert reference.dropout_threshold(0.5) == (32768, 2.0)
    assert reference.dropout_mask(4, 130, 0.0, 1).all()
    assert not reference.dropout_mask(4, 130, 1.0, 1).any()
    with pytest.raises(ValueError, match="dropout_p must be between 0 and 1"):
        reference.dropout_threshold(1.5)
