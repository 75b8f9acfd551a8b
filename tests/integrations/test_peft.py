"""The fast layers against PEFT's own: values, gradients and dtypes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import fastlora
from tests.integrations.conftest import BACKENDS
from tests.integrations.models import (
    MLP,
    VOCAB,
    MLP4bit,
    assert_all_close,
    assert_network_close,
    exact,
    fill_adapters,
    gradients,
    last_reasons,
    linear4bit,
    llama,
    lora_layers,
    peft_model,
    replaying,
    train_step,
)

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


# ---- one layer ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One layer: its base ("dense", or a quant type), dtypes, dropout rate, sizes."""

    base: str = "dense"
    weight: torch.dtype = FP32  # dense: of the weight; 4-bit: compute_dtype
    x: torch.dtype = FP32
    adapter: torch.dtype = FP32
    p: float = 0.0
    nested: bool = False
    storage: torch.dtype = torch.uint8
    bias: str = "none"  # PEFT's `bias`
    has_bias: bool = True
    shape: tuple[int, ...] = (2, 7)
    K: int = 37
    N: int = 29
    r: int = 3

    def __str__(self) -> str:
        default = Case()
        fields = {k: v for k, v in vars(self).items() if v != getattr(default, k)}
        return ",".join(f"{k}={str(v).removeprefix('torch.')}" for k, v in fields.items()) or "fp32"

    def model(self) -> nn.Module:
        if self.base == "dense":
            linear: nn.Module = nn.Linear(self.K, self.N, bias=self.has_bias).to(self.weight)
        else:
            linear = linear4bit(
                self.K,
                self.N,
                quant_type=self.base,
                nested=self.nested,
                compute_dtype=self.weight,
                storage=self.storage,
                bias=self.has_bias,
            )
        net = nn.Sequential()
        net.add_module("up", linear)
        net.is_loaded_in_4bit = self.base != "dense"  # type: ignore[assignment]
        config = LoraConfig(
            r=self.r, lora_alpha=5, target_modules=["up"], lora_dropout=self.p, bias=self.bias
        )
        model = fill_adapters(get_peft_model(net, config))
        for layer in lora_layers(model):
            layer.lora_A.to(self.adapter)
            layer.lora_B.to(self.adapter)
        return model


SIZES = {"K": 72, "N": 41}  # the last of the 64-element blocks is short
CASES = [
    Case(),
    Case(p=0.3),
    Case(p=1.0),
    Case(has_bias=False, r=1),
    Case(bias="all"),
    Case(shape=(), p=0.3),
    Case(shape=(1,), r=16, N=1),
    Case(shape=(129,), r=64, p=0.1),
    Case(weight=BF16, x=BF16),
    Case(weight=BF16, x=BF16, p=0.3, bias="all"),
    Case(weight=BF16, x=BF16, adapter=BF16, p=0.3),
    Case(weight=FP16, x=FP16, adapter=FP16),
    Case(weight=FP16, x=FP16),
    Case(adapter=BF16),
    Case(weight=BF16, x=BF16, adapter=FP16),
    Case("nf4", **SIZES),
    Case("nf4", nested=True, p=0.3, bias="all", **SIZES),
    Case("nf4", weight=BF16, nested=True, p=0.3, **SIZES),
    Case("nf4", weight=BF16, x=BF16, nested=True, **SIZES),
    Case("nf4", weight=BF16, x=BF16, adapter=BF16, p=0.3, bias="all", **SIZES),
    Case("nf4", weight=BF16, adapter=BF16, **SIZES),
    Case("nf4", weight=FP32, x=BF16, **SIZES),
    Case("nf4", weight=BF16, x=FP16, adapter=FP16, **SIZES),
    Case("nf4", weight=BF16, x=BF16, storage=BF16, nested=True, **SIZES),
    Case("fp4", has_bias=False, p=0.3, **SIZES),
    Case("fp4", weight=BF16, nested=True, shape=(), **SIZES),
]


def threesome(case: Case) -> tuple[nn.Module, nn.Module, nn.Module]:
    """(fast, exact, stock) models of `case`, in training mode."""
    stock = case.model().train()
    fast = fastlora.accelerate(copy.deepcopy(stock), verbose=False)
    return fast, exact(stock), replaying(stock)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_layer_matches_peft(case: Case, backend: str) -> None:
    """y, dx, dA, dB and dbias, with PEFT's dtypes, and dropout masks replayed in PEFT's layer."""
    x = torch.randn(*case.shape, case.K).to(case.x)
    fast, reference, stock = threesome(case)
    results = [train_step(model, x) for model in (fast, reference, stock)]
    assert last_reasons(fast) == {""}
    assert len(results[0]) == 5 if case.bias != "none" else 4
    if case.p == 1.0:  # all of x is dropped: the adapters get no gradient
        for result in results:
            assert not any(result.pop(name).any() for name in list(result) if "lora_" in name)
    assert_all_close(*results)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("case", [Case(), Case("nf4", **SIZES)], ids=str)
def test_empty_batch(case: Case, backend: str) -> None:
    fast, _, stock = threesome(case)
    x = torch.randn(0, 4, case.K)
    ours, theirs = train_step(fast, x), train_step(stock, x)
    assert last_reasons(fast) == {""}
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_strided_inputs(backend: str) -> None:
    """x and dy with odd strides, and weights that are transposed views."""
    fast, reference, stock = threesome(Case())
    for model in (fast, reference, stock):
        for layer in lora_layers(model):
            for linear in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]):
                weight = linear.weight
                linear.weight = nn.Parameter(
                    weight.detach().T.contiguous().T, requires_grad=weight.requires_grad
                )

    def step(model: nn.Module) -> dict[str, Tensor]:
        dtype = next(model.parameters()).dtype
        wide = torch.linspace(-1, 1, 37 * 28).view(37, 14, 2).to(dtype).requires_grad_()
        y = model(wide[..., 1].T)
        y.T.backward(torch.linspace(-1, 1, y.numel()).view(y.T.shape).to(dtype))
        assert wide.grad is not None
        return {"y": y.detach(), "dx": wide.grad, **gradients(model)}

    results = [step(model) for model in (fast, reference, stock)]
    assert last_reasons(fast) == {""}
    assert_all_close(*results)


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B", "both"])
def test_frozen_adapters(frozen: str) -> None:
    fast, reference, stock = threesome(Case())
    for model in (fast, reference, stock):
        for name, parameter in model.named_parameters():
            if frozen == "both" or frozen in name:
                parameter.requires_grad_(False)
    x = torch.randn(5, 37)

    def step(model: nn.Module) -> dict[str, Tensor]:
        inputs = x.clone().to(next(model.parameters()).dtype).requires_grad_()
        y = model(inputs)
        y.square().sum().backward()
        assert inputs.grad is not None
        return {"y": y.detach(), "dx": inputs.grad, **gradients(model)}

    results = [step(model) for model in (fast, reference, stock)]
    assert last_reasons(fast) == {""}
    assert len(results[0]) == (2 if frozen == "both" else 3)
    assert_all_close(*results)


def test_input_without_gradient() -> None:
    fast, reference, stock = threesome(Case())
    x = torch.randn(5, 37)

    def step(model: nn.Module) -> dict[str, Tensor]:
        y = model(x.to(next(model.parameters()).dtype))
        y.square().sum().backward()
        return {"y": y.detach(), **gradients(model)}

    assert_all_close(*[step(model) for model in (fast, reference, stock)])
    assert last_reasons(fast) == {""}


def test_result_can_be_changed_in_place() -> None:
    """Models add residuals and activations in place; the output must be a tensor of its own."""
    fast, _, _ = threesome(Case())
    x = torch.randn(5, 37, requires_grad=True)
    fast(x).mul_(2).sum().backward()
    assert x.grad is not None
    doubled = x.grad.clone()
    x.grad = None
    fast(x).mul(2).sum().backward()
    assert torch.equal(x.grad, doubled)


@pytest.mark.parametrize(
    "case", [Case(), Case(p=0.3, bias="all"), Case("nf4", p=0.3, **SIZES)], ids=str
)
def test_differentiating_twice(case: Case) -> None:
    """A gradient penalty has PEFT's gradients; its first backward runs in plain torch."""
    x = torch.randn(*case.shape, case.K)
    fast, reference, stock = threesome(case)

    def penalty(model: nn.Module) -> dict[str, Tensor]:
        torch.manual_seed(1)
        dtype = torch.float64 if model is reference else x.dtype
        inputs = x.clone().to(dtype).requires_grad_()
        y = model(inputs)
        (dx,) = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        (dx.square().sum() + y.sum()).backward()
        assert inputs.grad is not None
        return {"dx": dx.detach(), "ddx": inputs.grad, **gradients(model)}

    results = [penalty(model) for model in (fast, reference, stock)]
    assert last_reasons(fast) == {""}
    assert_all_close(*results)


# ---- autocast ----------------------------------------------------------------------------------


AUTOCAST = [
    Case(weight=BF16, x=BF16),
    Case(weight=BF16, x=FP32, p=0.3, bias="all"),
    Case(weight=BF16, x=FP32, adapter=BF16),
    Case(p=0.3, bias="all"),
    Case(x=BF16),
    Case(weight=FP16, x=FP32),
    Case("nf4", weight=BF16, x=FP32, p=0.3, bias="all", **SIZES),
    Case("nf4", p=0.3, bias="all", **SIZES),
    Case("nf4", x=BF16, **SIZES),
    Case("nf4", weight=BF16, x=BF16, nested=True, **SIZES),
    Case("nf4", weight=BF16, x=BF16, adapter=BF16, **SIZES),
    Case("nf4", weight=BF16, x=FP32, adapter=BF16, **SIZES),
]


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("backward", ["outside", "inside"])
@pytest.mark.parametrize("case", AUTOCAST, ids=str)
def test_autocast(case: Case, backward: str, backend: str) -> None:
    """bf16 autocast around the forward, with the backward outside it or inside."""
    fast, reference, stock = threesome(case)
    x = torch.randn(*case.shape, case.K).to(case.x)

    def step(model: nn.Module) -> dict[str, Tensor]:
        torch.manual_seed(0)
        double = model is reference
        inputs = x.double() if double else x.clone()
        inputs.requires_grad_()
        with torch.autocast("cpu", dtype=BF16, enabled=not double):
            y = model(inputs)
            loss = (y * torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype)).sum()
            if backward == "inside":
                loss.backward()
        if backward == "outside":
            loss.backward()
        assert inputs.grad is not None
        return {"y": y.detach(), "dx": inputs.grad, **gradients(model)}

    results = [step(model) for model in (fast, reference, stock)]
    assert last_reasons(fast) == {""}
    assert_all_close(*results)


# ---- networks ----------------------------------------------------------------------------------


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "mlp": lambda: (MLP(), torch.randn(3, 5, 37)),
    "mlp4bit": lambda: (MLP4bit(nested=True), torch.randn(3, 5, 64)),
    "mlp4bit bf16": lambda: (MLP4bit(compute_dtype=BF16), torch.randn(3, 5, 64)),
    "llama": lambda: (llama(), torch.randint(0, VOCAB, (2, 9))),
    "llama bf16": lambda: (llama().to(BF16), torch.randint(0, VOCAB, (2, 9))),
}


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("network", NETWORKS)
def test_network_matches_peft(network: str, backend: str) -> None:
    model, inputs = NETWORKS[network]()
    stock = peft_model(model, lora_dropout=0.2).train()
    fast = fastlora.accelerate(copy.deepcopy(stock), verbose=False)
    results = [train_step(m, inputs) for m in (fast, exact(stock), replaying(stock))]
    assert last_reasons(fast) == {""}
    assert_network_close(*results)


def test_training_follows_peft() -> None:
    """Losses and trained adapters after some steps with momentum and dropout."""
    stock = peft_model(MLP(), lora_dropout=0.1).train()
    fast = fastlora.accelerate(copy.deepcopy(stock), verbose=False)
    batches = torch.randn(8, 37).expand(10, 8, 37)

    def run(model: nn.Module) -> dict[str, Tensor]:
        torch.manual_seed(1)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=0.3, momentum=0.9)
        losses = []
        for batch in batches.to(parameters[0].dtype):
            loss = (model(batch) - 1).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        return {"losses": torch.stack(losses), **trained}

    results = [run(model) for model in (fast, exact(stock), replaying(stock))]
    assert results[0]["losses"][-1] < 0.8 * results[0]["losses"][0]
    assert_network_close(*results)


def test_dropout_follows_the_module_not_the_layer() -> None:
    """p and training mode are read from the dropout module at each call, as PEFT's forward does."""
    fast, _, stock = threesome(Case(p=0.4))
    (ours,), (theirs,) = lora_layers(fast), lora_layers(stock)
    x = torch.randn(6, 37)
    for layer in (ours, theirs):
        layer.lora_dropout.eval()  # the layer itself stays in training mode
    assert torch.equal(ours(x), ours(x))
    for layer in (ours, theirs):
        layer.lora_dropout.train()
        layer.eval()
        layer.lora_dropout.train()
        layer.lora_dropout["default"].p = 0.9
    outs = []
    for layer in (ours, theirs):
        torch.manual_seed(3)
        outs.append(layer(x))
    assert not torch.equal(ours(x), outs[0])
    torch.testing.assert_close(outs[0], outs[1])
    assert last_reasons(fast) == {""}
