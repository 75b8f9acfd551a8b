"""The assertion that all other tests rest on: it passes what it should and fails what it should."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_close_to_exact


def case() -> tuple[torch.Tensor, torch.Tensor]:
    a, b = torch.randn(33, 64, dtype=torch.bfloat16), torch.randn(17, 64, dtype=torch.bfloat16)
    return a.double() @ b.double().T, a @ b.T


def test_plain_torch_passes_against_itself() -> None:
    exact, base = case()
    assert_close_to_exact(base, exact, base, what="y")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_element_that_is_not_finite_fails(value: float) -> None:
    exact, base = case()
    out = base.clone()
    out[3, 5] = value
    with pytest.raises(AssertionError, match="y"):
        assert_close_to_exact(out, exact, base, what="y")


def test_one_wrong_element_fails_by_the_largest_error() -> None:
    exact, base = case()
    out = base.float()
    out[0, 0] += 1.0
    with pytest.raises(AssertionError, match="largest error"):
        assert_close_to_exact(out, exact, base, what="y")


def test_a_bias_below_the_largest_error_fails_by_the_rms() -> None:
    exact, base = case()
    out = exact.float() + 1.5 * (base.double() - exact).abs().max().float()
    with pytest.raises(AssertionError, match="RMS"):
        assert_close_to_exact(out, exact, base, what="y")


@pytest.mark.usefixtures("poison")
def test_poisoned_memory_reaches_every_way_to_allocate() -> None:
    like = torch.zeros(2, 3)
    for fresh in (torch.empty(5), like.new_empty(4), torch.empty_like(like), like.T.new_empty(2)):
        assert fresh.isnan().all()
    assert (torch.empty(3, dtype=torch.uint8) == 255).all()
