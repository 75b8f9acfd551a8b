"""LoraLinear and QLoraLinear against PEFT's own layers: results, gradients and training."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastlora import LoraLinear, QLoraLinear, reference
from fastlora.nn import Linear4bit
from tests.peft_layers import (
    DTYPES,
    NESTED,
    K,
    N,
    R,
    Replay,
    assert_results,
    bnb,
    copy_adapters,
    exact_results,
    fill_B,
    linear4bit,
    peft_layer,
    run,
)
from tests.tolerance import assert_close_to_exact

# ---- forward and gradients ---------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES)
@pytest.mark.parametrize("bias", ["absent", "none", "lora_only"])
@pytest.mark.parametrize("shape", [(K,), (17, K), (2, 7, K)], ids=str)
def test_dense_matches_peft(
    dtype: torch.dtype, adapter_dtype: torch.dtype, bias: str, shape: tuple[int, ...]
) -> None:
    train_bias = "none" if bias == "absent" else bias
    dense = nn.Linear(K, N, bias=bias != "absent", dtype=dtype)
    options = {"r": R, "lora_alpha": 24, "use_rslora": True}
    ours = LoraLinear.from_linear(
        copy.deepcopy(dense), adapter_dtype=adapter_dtype, train_bias=train_bias, **options
    )
    fill_B(ours)
    theirs = peft_layer(dense, adapter_dtype, bias=train_bias, **options)
    copy_adapters(ours, theirs)
    assert ours.scaling == theirs.scaling["default"] == 24 / math.sqrt(R)
    x, dy = torch.randn(shape).to(dtype), torch.randn(*shape[:-1], N).to(dtype)
    got = run(ours, ours, x, dy)
    expected = run(theirs, theirs, x, dy)
    assert_results(got, exact_results(ours, dense.weight.detach(), x, dy), expected)


@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@NESTED
def test_4bit_matches_peft(
    dtype: torch.dtype, adapter_dtype: torch.dtype, quant_type: str, nested: bool
) -> None:
    dense = nn.Linear(K, N, dtype=dtype)
    theirs = peft_layer(linear4bit(dense, nested, quant_type), adapter_dtype, r=R, bias="all")
    assert type(theirs).__module__ == "peft.tuners.lora.bnb"
    fill_B(theirs)
    ours = QLoraLinear.from_linear4bit(
        theirs.base_layer, r=R, adapter_dtype=adapter_dtype, train_bias="all"
    )
    copy_adapters(theirs, ours)
    x, dy = torch.randn(19, K).to(dtype), torch.randn(19, N).to(dtype)
    expected = run(theirs, theirs, x, dy)
    ours.base_layer.compute_dtype = None
    got = run(ours, ours, x, dy)
    weight = reference.dequantize_4bit(ours.weight, ours.base_layer.quant_state, dtype)
    assert_results(got, exact_results(ours, weight, x, dy), expected)


def test_4bit_compute_dtype_matches_peft() -> None:
    dense = nn.Linear(K, N, dtype=torch.bfloat16)
    base = linear4bit(dense)
    base.compute_dtype, base.compute_type_is_set = torch.bfloat16, True
    theirs = peft_layer(base, r=R)
    fill_B(theirs)
    ours = QLoraLinear.from_linear4bit(base, r=R)
    copy_adapters(theirs, ours)
    assert ours.base_layer.compute_dtype == torch.bfloat16
    x, dy = torch.randn(19, K), torch.randn(19, N)
    expected = run(theirs, theirs, x, dy)
    got = run(ours, ours, x, dy)
    weight = reference.dequantize_4bit(ours.weight, ours.base_layer.quant_state, torch.bfloat16)
    assert_results(got, exact_results(ours, weight, x, dy), expected)
    ours.base_layer.compute_dtype = None
    wide = run(ours, ours, x, dy)
    assert not torch.equal(got["y"], wide["y"])  # type: ignore[arg-type]
    assert not torch.equal(got["dx"], wide["dx"])  # type: ignore[arg-type]


@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES)
@pytest.mark.parametrize("quantised", [False, True], ids=["dense", "4bit"])
def test_dropout_matches_peft_with_the_same_mask(
    dtype: torch.dtype, adapter_dtype: torch.dtype, quantised: bool
) -> None:
    p = 0.25
    dense = nn.Linear(K, N, dtype=dtype)
    options = {"r": R, "lora_dropout": p}
    base = linear4bit(dense) if quantised else dense
    theirs = peft_layer(copy.deepcopy(base), adapter_dtype, **options)
    fill_B(theirs)
    build = QLoraLinear.from_linear4bit if quantised else LoraLinear.from_linear
    ours = build(base, adapter_dtype=adapter_dtype, **options)
    copy_adapters(theirs, ours)
    x, dy = torch.randn(3, 11, K).to(dtype), torch.randn(3, 11, N).to(dtype)
    torch.manual_seed(5)
    got = run(ours, ours, x, dy)
    torch.manual_seed(5)
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64)
    theirs.lora_dropout["default"] = Replay(p, seed)
    expected = run(theirs, theirs, x, dy)
    weight = dense.weight.detach()
    if quantised:
        weight = reference.dequantize_4bit(ours.weight, ours.base_layer.quant_state, dtype)
    exact = exact_results(ours, weight, x, dy, p, seed)
    assert_results(got, exact, expected)
    without = exact_results(ours, weight, x, dy)
    for name in ("y", "dx", "dA", "dB"):
        assert not torch.allclose(exact[name], without[name], rtol=0.1), name  # type: ignore[arg-type]


def test_eval_and_p_zero_switch_dropout_off() -> None:
    layer = LoraLinear(K, N, r=R, lora_dropout=0.5)
    fill_B(layer)
    x = torch.randn(5, K)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_base_is_frozen_and_gradients_follow_requires_grad() -> None:
    layer = LoraLinear(K, N, r=R)
    names = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert names == {"lora_A.default.weight", "lora_B.default.weight"}
    fill_B(layer)
    layer.lora_A["default"].weight.requires_grad_(False)
    layer(torch.randn(5, K)).sum().backward()
    assert layer.lora_A["default"].weight.grad is None
    assert layer.lora_B["default"].weight.grad is not None
    trained = LoraLinear(K, N, r=R, train_bias="all")
    assert trained.bias is not None and trained.bias.requires_grad
    with torch.no_grad():
        assert not layer(torch.randn(5, K)).requires_grad


@pytest.mark.parametrize("quantised", [False, True], ids=["dense", "4bit"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_replays_the_dropout_mask(quantised: bool, reentrant: bool) -> None:
    build = QLoraLinear if quantised else LoraLinear
    layer = build(K, N, r=R, lora_dropout=0.3)
    fill_B(layer)
    x, dy = torch.randn(23, K), torch.randn(23, N)
    torch.manual_seed(1)
    plain = run(layer, layer, x, dy)
    torch.manual_seed(1)
    again = run(lambda x: checkpoint(layer, x, use_reentrant=reentrant), layer, x, dy)
    torch.manual_seed(2)
    other = run(layer, layer, x, dy)
    for name in ("y", "dx", "dA", "dB"):
        assert torch.equal(plain[name], again[name]), name  # type: ignore[arg-type]
        assert not torch.equal(plain[name], other[name]), name  # type: ignore[arg-type]


def test_autocast_matches_peft() -> None:
    dense = nn.Linear(K, N)
    ours = LoraLinear.from_linear(copy.deepcopy(dense), r=R)
    fill_B(ours)
    theirs = peft_layer(dense, r=R)
    copy_adapters(ours, theirs)
    x, dy = torch.randn(17, K), torch.randn(17, N, dtype=torch.bfloat16)

    def under_autocast(layer: Any) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return layer(x)

        return forward

    got = run(under_autocast(ours), ours, x, dy)
    expected = run(under_autocast(theirs), theirs, x, dy)
    assert got["y"].dtype == torch.bfloat16  # type: ignore[union-attr]
    assert got["dA"].dtype == torch.float32  # type: ignore[union-attr]
    assert_results(got, exact_results(ours, dense.weight.detach(), x, dy), expected)


# ---- training ----------------------------------------------------------------------------------


def train(layers: list[nn.Module], dtype: torch.dtype, steps: int = 20) -> Tensor:
    """Losses of a two-layer regression, SGD with momentum, the same data whoever the layers are."""
    generator = torch.Generator().manual_seed(7)
    model = nn.Sequential(layers[0], nn.Tanh(), layers[1])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05, momentum=0.9)
    x = torch.randn(64, K, generator=generator).to(dtype)
    target = torch.randn(64, K, generator=generator).to(dtype)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x).to(target.dtype), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.parametrize("quantised", [False, True], ids=["dense", "4bit"])
def test_twenty_steps_of_training_follow_peft(quantised: bool) -> None:
    bases: list[Any] = [nn.Linear(K, N), nn.Linear(N, K)]
    if quantised:
        bases = [nn.Linear(K, 2 * K), nn.Linear(2 * K, K)]
    options = {"r": R, "lora_alpha": 16}
    theirs, ours, exact = [], [], []
    for dense in bases:
        base = linear4bit(dense) if quantised else dense
        layer = peft_layer(copy.deepcopy(base), **options)
        fill_B(layer)
        build = QLoraLinear.from_linear4bit if quantised else LoraLinear.from_linear
        own = build(base, **options)
        copy_adapters(layer, own)
        wide = nn.Linear(dense.in_features, dense.out_features).double()
        weight = dense.weight
        if quantised:
            weight = reference.dequantize_4bit(own.weight, own.base_layer.quant_state)
        wide.load_state_dict({"weight": weight.detach().double(), "bias": dense.bias.double()})
        true = peft_layer(wide, torch.float64, **options)
        copy_adapters(layer, true)
        theirs.append(layer)
        ours.append(own)
        exact.append(true)
    true_losses = train(exact, torch.float64)
    assert true_losses[-1] < 0.9 * true_losses[0]
    assert_close_to_exact(
        train(ours, torch.float32), true_losses, train(theirs, torch.float32), what="loss"
    )


# ---- arguments ---------------------------------------------------------------------------------


def test_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="r must be 1 or more, got 0"):
        LoraLinear(K, N, r=0)
    with pytest.raises(ValueError, match=r"lora_dropout must be between 0 and 1, got 1\.5"):
        LoraLinear(K, N, lora_dropout=1.5)
    with pytest.raises(ValueError, match="train_bias must be one of"):
        LoraLinear(K, N, train_bias="some")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="without a bias"):
        LoraLinear(K, N, bias=False, train_bias="all")
    with pytest.raises(ValueError, match="init_lora_weights must be True, False or 'gaussian'"):
        LoraLinear(K, N, init_lora_weights="pissa")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="rank"):
        QLoraLinear(K, N, rank=4)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="got Conv1d"):
        LoraLinear.from_linear(nn.Conv1d(3, 3, 3))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"Linear4bit; use QLoraLinear\.from_linear4bit"):
        LoraLinear.from_linear(linear4bit(nn.Linear(K, N)))
    with pytest.raises(ValueError, match="without quant_state"):
        QLoraLinear.from_linear4bit(bnb.nn.Linear4bit(K, N))
    packed, state = reference.quantize_4bit(torch.randn(64))
    with pytest.raises(ValueError, match=r"quant_state.shape must be \(N, K\), got \(64,\)"):
        Linear4bit(packed, state)


def test_repr_says_what_there_is() -> None:
    text = repr(QLoraLinear(K, N, r=4, lora_alpha=8, lora_dropout=0.1, train_bias="all"))
    for part in ("r=4", "scaling=2", "lora_dropout=0.1", "train_bias=True", "quant_type=nf4"):
        assert part in text
    layer = LoraLinear(K, N)
    layer.merge()
    assert "merged=True" in repr(layer)
