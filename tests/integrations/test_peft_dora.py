"""What DoRA has apart from other layers; docs/peft.md's cases hold the layers to PEFT's."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import fastlora
from fastlora import ops
from fastlora.backends import use_backend
from fastlora.integrations.peft.run import dora as peft_run
from fastlora.integrations.peft.run.dora import expanded_norms, weight_norms
from fastlora.layer import Layer
from fastlora.quant import QuantState
from fastlora.reference import plain
from tests.integrations.models import gradients, last_reasons, linear4bit
from tests.tolerance import assert_close_to_exact

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
N, K, R, SCALING = 41, 72, 3, 0.7


class Owner:
    """In the place of bitsandbytes' quant state, which keeps |W|^2."""


def norms_of(W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return plain.dora_norm(W, A, B, SCALING)


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
    layer = Layer(weight, A, B, SCALING, quant_state=state)
    norms = weight_norms(layer, Owner())
    assert_close_to_exact(norms, exact, norms_of(W.float(), A, B), what=kind)
    if state is not None:
        norms = expanded_norms(layer, Owner())
        assert_close_to_exact(norms, exact, norms_of(W.float(), A, B), what=f"{kind}, expanded")


def test_kept_squares_follow_the_bytes() -> None:
    A, B, owner = torch.zeros(R, K), torch.zeros(N, R), Owner()
    packed, state = ops.quantize_4bit(torch.randn(N, K))
    layer = Layer(packed, A, B, SCALING, quant_state=state)
    first = expanded_norms(layer, owner)
    ((_, squares),) = vars(owner).values()
    torch.testing.assert_close(expanded_norms(layer, owner), first)
    ((_, again),) = vars(owner).values()
    assert again is squares
    packed.copy_(packed.flip(0))
    W = ops.dequantize_4bit(packed, state, FP32)
    second = expanded_norms(layer, owner)
    torch.testing.assert_close(second, W.norm(dim=1))
    assert not torch.allclose(first, second)


def layers(base: nn.Module, dropout: float) -> tuple[nn.Module, nn.Module]:
    """A model of one layer of DoRA with an update: PEFT's, and fastlora's."""
    model = nn.Sequential()
    model.up = base
    config = LoraConfig(r=4, target_modules=["up"], use_dora=True, lora_dropout=dropout)
    stock = get_peft_model(model, config)
    nn.init.normal_(stock.base_model.model.up.lora_B["default"].weight, std=0.05)
    fast = copy.deepcopy(stock)
    fastlora.accelerate(fast)
    return stock, fast


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    x = x.clone().requires_grad_()
    y = model(x)
    y.float().square().mean().backward()
    assert x.grad is not None
    return {"y": y.detach(), "dx": x.grad, **gradients(model)}


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_without_a_kernel_for_dropout_the_masks_are_torchs(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: then they are PEFT's, too."""
    monkeypatch.setattr(peft_run, "_DORA_MASKS", ())
    stock, fast = layers(nn.Linear(64, 48).to(dtype), 0.3)
    exact = copy.deepcopy(stock).double()
    x = torch.randn(2, 20, 64).to(dtype)
    # The mask is drawn in x's dtype.
    monkeypatch.setattr(
        torch.nn.Dropout,
        "forward",
        lambda self, x: (
            x
            * (torch.nn.functional.dropout(torch.ones(x.shape, dtype=dtype), self.p) != 0)
            / (1 - self.p)
        ),
    )
    got, plain, want = step(fast, x), step(stock, x), step(exact, x.double())
    assert last_reasons(fast) == {""}
    for name, out in got.items():
        assert_close_to_exact(out, want[name], plain[name], what=name)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_4bit_layers_in_any_storage(dropout: float) -> None:
    """FSDP shards floats alone, so packed bytes may be stored as such: to the same results."""
    results = []
    for storage in (torch.uint8, BF16):
        torch.manual_seed(0)
        base = linear4bit(64, 48, compute_dtype=FP32, storage=storage)
        stock, fast = layers(base, dropout)
        assert base.weight.dtype == storage
        x = torch.randn(2, 20, 64)
        results.append(step(fast, x))
        assert last_reasons(fast) == {""}
        if dropout == 0.0:
            for name, out in step(stock, x).items():
                torch.testing.assert_close(results[-1][name], out, rtol=1e-4, atol=1e-5)
    for name, out in results[0].items():
        assert torch.equal(results[1][name], out), name


def test_masks_do_not_depend_on_the_backend() -> None:
    """So a backward may recompute a forward on another one."""
    _, fast = layers(nn.Linear(64, 48), 0.3)
    x = torch.randn(2, 20, 64)
    got = step(fast, x)
    with use_backend("reference"):
        for name, out in step(fast, x).items():
            torch.testing.assert_close(out, got[name], rtol=1e-4, atol=1e-5)
