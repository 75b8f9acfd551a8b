"""aLoRA's choice of tokens, and the variants that make their A and B, beside PEFT's own code."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import pytest
import torch
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, VeloraConfig
from torch import Tensor, nn

import fastlora
from fastlora.integrations.peft.run import linear as peft_run
from tests.integrations.models import (
    MLP,
    MLP4bit,
    Results,
    assert_all_close,
    exact,
    gradients,
    last_reasons,
    lora_layers,
    peft_model,
    replay_dropout,
    replaying,
)

ROWS, LENGTH, K = 3, 6, 37
Trio = tuple[Any, Any, Any]


def layers(base: nn.Module | None = None, **options: Any) -> Trio:
    """The first layer of a model: on fastlora, in float64, and on PEFT's code."""
    stock = peft_model(base or MLP(), **options)
    fast = fastlora.accelerate(copy.deepcopy(stock), verbose=False)
    return tuple(lora_layers(model)[0] for model in (fast, exact(stock), replaying(stock)))


def alora(**options: Any) -> Trio:
    return layers(alora_invocation_tokens=[1], **options)


def step(layer: Any, x: Tensor, offsets: Any) -> Results:
    layer.zero_grad()
    torch.manual_seed(0)
    wide = next(layer.lora_A.parameters()).dtype == torch.float64
    x = x.detach().to(torch.float64 if wide else x.dtype).requires_grad_()
    y = layer(x, alora_offsets=offsets)
    weights = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape)
    (y * weights.to(y.dtype)).sum().backward()
    assert x.grad is not None
    return {"y": y.detach(), "dx": x.grad, **gradients(layer)}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    "offsets",
    [[None, 2, LENGTH], [LENGTH + 9, 0, 1], [-4, 3, None], [LENGTH] * ROWS, [1] * ROWS],
    ids=str,
)
def test_offsets_are_treated_as_by_peft(offsets: list[int | None], dropout: float) -> None:
    trio = alora(lora_dropout=dropout)
    x = torch.randn(ROWS, LENGTH, K)
    # The tokens that are gathered for the adapter have a mask of their own.
    with mock.patch("torch.nn.functional.dropout", replay_dropout):
        results = [step(layer, x, offsets) for layer in trio]
    assert last_reasons(trio[0]) == {""}
    assert_all_close(*results)


@pytest.mark.parametrize("offsets", [[1, None, 7], [1, 1, 1]], ids=str)
def test_rows_without_a_length(offsets: list[int | None]) -> None:
    trio, x = alora(), torch.randn(ROWS, K)
    assert_all_close(*(step(layer, x, offsets) for layer in trio))
    assert last_reasons(trio[0]) == {""}


@pytest.mark.parametrize("offsets", [None, [None] * ROWS, [0] * ROWS], ids=str)
def test_nothing_invoked_is_the_base_layer(offsets: Any) -> None:
    """The gradients of A and B then are zeros, and not missing."""
    fast, _, stock = alora()
    x = torch.randn(ROWS, LENGTH, K)
    mine, theirs = step(fast, x, offsets), step(stock, x, offsets)
    torch.testing.assert_close(mine["y"], fast.base_layer(x))
    torch.testing.assert_close(mine["dx"], theirs["dx"])
    for name in ("lora_A.default.weight", "lora_B.default.weight"):
        assert mine[name].count_nonzero() == theirs[name].count_nonzero() == 0
    assert last_reasons(fast) == {""}


def test_only_invoked_tokens_meet_the_adapter() -> None:
    """An infinite A reaches no other token."""
    fast, *_ = alora()
    fast.lora_A["default"].weight.data[0, 0] = torch.inf
    with torch.no_grad():
        y = fast(torch.randn(ROWS, LENGTH, K), alora_offsets=[2, None, 0])
    assert not y[0, -2:].isfinite().all(-1).any()
    assert y[0, :-2].isfinite().all() and y[1:].isfinite().all()


def test_every_token_is_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, *_ = alora()

    def refuse(*args: object) -> None:
        raise AssertionError("tokens were gathered")

    monkeypatch.setattr(peft_run, "invoke", refuse)
    fast(torch.randn(ROWS, LENGTH, K), alora_offsets=[LENGTH, LENGTH + 1, LENGTH])
    with pytest.raises(AssertionError, match="gathered"):
        fast(torch.randn(ROWS, LENGTH, K), alora_offsets=[LENGTH, LENGTH, 1])


def test_trains_on_4_bit() -> None:
    """PEFT's code can't; the same layer with decoded weights in fp32 stands for it."""
    fast, wide, _ = layers(MLP4bit(), alora_invocation_tokens=[1])
    stock = copy.deepcopy(wide).float()
    x = torch.randn(ROWS, LENGTH, 64)
    assert_all_close(*(step(layer, x, [2, None, 9]) for layer in (fast, wide, stock)))
    assert last_reasons(fast) == {""}


def test_offsets_mean_nothing_to_other_adapters() -> None:
    fast, *_ = layers()
    x = torch.randn(ROWS, LENGTH, K)
    assert torch.equal(fast(x, alora_offsets=[1, None, 2]), fast(x))
    assert last_reasons(fast) == {""}


def test_mixed_batches_train() -> None:
    trio = alora(lora_bias=True)
    x = torch.randn(ROWS, LENGTH, K)
    options = {"adapter_names": ["default", "__base__", "default"], "alora_offsets": [4, 2, None]}

    def mixed(layer: Any) -> Results:
        y = layer(x.to(layer.lora_A["default"].weight.dtype), **options)
        y.square().sum().backward()
        return {"y": y.detach(), **gradients(layer)}

    assert_all_close(*(mixed(layer) for layer in trio))
    assert last_reasons(trio[0]) == {""}


def test_another_default_device() -> None:
    """It is where new tensors go, also those that a call needs for its rows and tokens."""
    fast, *_ = alora()
    x = torch.randn(ROWS, LENGTH, K)
    for options in (
        {"alora_offsets": [4, 2, None]},
        {"adapter_names": ["default", "__base__", "default"], "alora_offsets": [4, 2, None]},
    ):
        want = fast(x, **options)
        with torch.device("meta"):
            got = fast(x, **options)
        assert torch.equal(got, want) and last_reasons(fast) == {""}


# ---- variants that make their A or B -------------------------------------------------------------


BLOCKS = {
    "A": BdLoraConfig(target_modules_bd_a=["up"], target_modules_bd_b=["down"], nblocks=3),
    "B": BdLoraConfig(target_modules_bd_a=["down"], target_modules_bd_b=["up"], nblocks=3),
}


@pytest.mark.parametrize("side", BLOCKS)
def test_block_diagonal_layers(side: str) -> None:
    trio = layers(MLP(K=36, H=54, N=27), use_bdlora=BLOCKS[side], r=6)
    made = getattr(trio[0], f"lora_{side}")["default"]
    assert type(made).__name__ == "BlockDiagonalLinear"
    x = torch.randn(ROWS, LENGTH, 36)
    assert_all_close(*(step(layer, x, None) for layer in trio))
    assert last_reasons(trio[0]) == {""}


def test_kasa_beside_a_second_call() -> None:
    """`diag` may change between calls: nothing that was made of it is kept."""
    trio = layers(kasa_config=KasaConfig())
    x = torch.randn(ROWS, LENGTH, K)
    for factor in (1.0, -3.0):
        for layer in trio:
            layer.lora_diag["default"].data *= factor
        assert_all_close(*(step(layer, x, None) for layer in trio))
    assert last_reasons(trio[0]) == {""}


def test_kasa_that_waits_for_its_weight_is_pefts() -> None:
    fast, _, stock = layers(kasa_config=KasaConfig())
    for layer in (fast, stock):
        layer._lora_kasa_truncation_deferred.add("default")
    x = torch.randn(ROWS, K)
    with torch.no_grad():
        assert torch.equal(fast(x), stock(x))
        reason = "KaSA truncates the base weight in the first call after loading"
        assert last_reasons(fast) == {reason}
        torch.testing.assert_close(fast(x), stock(x))
    assert last_reasons(fast) == {""}


def test_velora_is_lora_without_a_backward() -> None:
    fast, _, stock = layers(velora_config=VeloraConfig())
    x = torch.randn(ROWS, K)
    for layer in (fast, stock):
        layer.train()
    torch.testing.assert_close(fast(x), stock(x), rtol=0, atol=0)
    (reason,) = last_reasons(fast)
    assert reason is not None and reason.startswith("VeLoRA trains A on compressed activations")
    with torch.no_grad():
        torch.testing.assert_close(fast(x), stock(x))
    assert last_reasons(fast) == {""}
    torch.testing.assert_close(fast.eval()(x), stock.eval()(x))
    assert last_reasons(fast) == {""}
