"""LoRA on parameters of models that use the weight in ways that fastlora does not know."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.nn import functional as F

import fastlora
from fastlora.integrations.peft.run.adapted_weight import AdaptedWeight, adapted_weight
from tests.integrations.conftest import BACKENDS
from tests.integrations.models import (
    assert_all_close,
    exact,
    fill_adapters,
    last_reasons,
    lora_layers,
    train_step,
)
from tests.integrations.moes import (
    IDS,
    moe,
    trio,
)
from tests.tolerance import assert_close_to_exact


def test_two_wrappers_of_one_parameter() -> None:
    """As PEFT 0.18 nests them for two adapters: both run PEFT's code, which adds both deltas."""
    torch.manual_seed(0)
    first, second = (
        LoraConfig(r=2, target_modules=[], target_parameters=["0.weight"]) for _ in range(2)
    )
    model = get_peft_model(nn.Sequential(Stack(loop, False)), first).base_model.model
    model[0] = ParamWrapper(model[0], "default", parameter_name="weight", config=second, r=2)
    stock = fill_adapters(model)
    fast = fastlora.accelerate(copy.deepcopy(stock), verbose=False)
    assert_all_close(*(train_step(model, X) for model in (fast, exact(stock), stock)))
    assert last_reasons(fast) == {
        "another wrapper adapts the parameter weight, too",
        "weight is no parameter of its module (parametrised or pruned)",
    }


class Stack(nn.Module):
    """`use(x, weight)` on a stack of three experts, as PEFT lays it out for `transposed` or not."""

    def __init__(self, use: Callable[[Tensor, Tensor], Tensor], transposed: bool) -> None:
        super().__init__()
        self.is_transposed, self.use = transposed, use
        shape = (3, 16, 12) if transposed else (3, 12, 16)
        self.weight = nn.Parameter(torch.randn(shape) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x, self.weight)


class Scale(torch.autograd.Function):
    """A custom function with a weight: it knows nothing of tensors that are more than they seem."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.einsum("tk,enk->etn", x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return torch.einsum("etn,enk->tk", dy, weight), torch.einsum("etn,tk->enk", dy, x)


def loop(x: Tensor, w: Tensor) -> Tensor:
    return sum(F.linear(x, w[e]) for e in range(len(w)))  # type: ignore[return-value]


def grouped(x: Tensor, w: Tensor) -> Tensor:
    """torch's grouped_mm; in float64, which it does not take, what it means."""
    if x.dtype != torch.float64:
        return F.grouped_mm(x, w, offs=torch.tensor([2, 2, 8], dtype=torch.int32))
    return torch.cat([x[:2] @ w[0], x[2:] @ w[2]])


ROWS = torch.tensor([2, 0, 0, 1, 2, 2, 0, 1])
SERVED = {
    "linear": loop,
    "matmul with .T": lambda x, w: x @ w[2].T + torch.matmul(x, w[torch.tensor(0)].mT),
    "mm with t()": lambda x, w: torch.mm(x, w[-1].t()) + x.mm(w[1].transpose(0, 1)),
    "iteration": lambda x, w: sum(F.linear(x, one) for one in w),
    "unbind": lambda x, w: F.linear(x, w.unbind()[1]),
    "bmm": lambda x, w: torch.bmm(x.expand(3, *x.shape), w.transpose(1, 2)).sum(0),
    "matmul of stacks": lambda x, w: (x.expand(3, *x.shape).contiguous() @ w.mT).sum(0),
    "grouped_mm": lambda x, w: grouped(x, w.mT),
    "bmm with a weight for each row": lambda x, w: torch.bmm(w[ROWS], x[..., None]).squeeze(-1),
    "matmul with a weight for each row": lambda x, w: (x[:, None] @ w[ROWS].mT).squeeze(1),
    "more dimensions": lambda x, w: F.linear(x[None], w[0])[0],
}
SERVED_TRANSPOSED = {
    "matmul": lambda x, w: x @ w[0] + torch.matmul(x, w[1]),
    "bmm": lambda x, w: torch.bmm(x.expand(3, *x.shape), w).sum(0),
    "linear with .T": lambda x, w: F.linear(x, w[2].T, torch.ones(12, dtype=x.dtype)),
    "grouped_mm": lambda x, w: grouped(x, w),
    "bmm with a weight for each row": lambda x, w: torch.bmm(x[:, None], w[ROWS]).squeeze(1),
    "more dimensions": lambda x, w: (x[None] @ w[0])[0],
}
BUILT = {
    "einsum": lambda x, w: torch.einsum("tk,enk->tn", x, w),
    "slice": lambda x, w: F.linear(x, w[1, :, :]) + F.linear(x, w[:2][0]),
    "arithmetic": lambda x, w: F.linear(x, (w * 2 - 1)[0]),
    "reshape": lambda x, w: F.linear(x, w.flatten(0, 1)),
    "index by a list": lambda x, w: torch.bmm(w[[0, 2]], x.T.expand(2, 16, 8)).sum(0).T,
    "a function of its own": lambda x, w: Scale.apply(x, w).sum(0),
    "a mean": lambda x, w: F.linear(x, torch.stack([w[0], w[1]]).mean(0)),
    "numpy": lambda x, w: x[:, :12] * float(w.detach().numpy().sum()) + 0 * F.linear(x, w[0]),
    "out=": lambda x, w: x[:, :12] * torch.mm(x.detach(), w[0].T.detach(), out=x.new_empty(8, 12)),
}  # fmt: skip


def stack_models(
    use: Callable[[Tensor, Tensor], Tensor], transposed: bool
) -> tuple[nn.Module, nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(Stack(use, transposed))
    config = LoraConfig(r=2, lora_alpha=5, target_modules=[], target_parameters=["0.weight"])
    stock = fill_adapters(get_peft_model(model, config))
    return fastlora.accelerate(copy.deepcopy(stock), verbose=False), exact(stock), stock


X = torch.randn(8, 16, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("name", SERVED)
def test_served_without_building(name: str, backend: str) -> None:
    check_use(SERVED[name], False, {""})


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("name", SERVED_TRANSPOSED)
def test_served_transposed(name: str, backend: str) -> None:
    check_use(SERVED_TRANSPOSED[name], True, {""})


def check_use(use: Callable[[Tensor, Tensor], Tensor], transposed: bool, reasons: set[str]) -> None:
    fast, wide, stock = stack_models(use, transposed)
    results = [train_step(model, X) for model in (fast, wide, stock)]
    assert_all_close(*results)
    assert last_reasons(fast) == reasons


@pytest.mark.parametrize("name", BUILT)
def test_built_for_all_else(name: str) -> None:
    fast, wide, stock = stack_models(BUILT[name], False)
    if name == "numpy":
        results = [evaluate_stack(model) for model in (fast, wide, stock)]
    else:
        results = [train_step(model, X) for model in (fast, wide, stock)]
    assert_all_close(*results)
    (reason,) = last_reasons(fast)
    assert reason is not None and reason.endswith("on the weight, so that W + BA was built")


def evaluate_stack(model: nn.Module) -> dict[str, Tensor]:
    with torch.no_grad():
        return {"y": model(X.to(next(model.parameters()).dtype))}


def test_a_linear_layers_weight() -> None:
    """A 2-D parameter, with the layer's bias."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 10), nn.SiLU(), nn.Linear(10, 7))
    targets = ["0.weight", "2.weight"]
    config = LoraConfig(r=2, lora_alpha=5, target_modules=[], target_parameters=targets)
    stock = fill_adapters(get_peft_model(model, config))
    fast, wide, stock = trio(stock)
    assert_all_close(*(train_step(model, X) for model in (fast, wide, stock)))
    assert last_reasons(fast) == {""}
    kernels = {row.kernel.split(" ")[0] for row in fastlora.explain(fast).rows}
    assert kernels == {"lora_linear"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weight_is_a_tensor(dtype: torch.dtype) -> None:
    """Shape, dtype, device and gradients are those of `W + scaling * left right`."""
    base = torch.randn(3, 6, 4).to(dtype)
    left, right = torch.randn(3, 6, 2, requires_grad=True), torch.randn(3, 2, 4, requires_grad=True)
    built: list[str] = []
    weight = adapted_weight(base, left, right, 1.5, built)
    assert isinstance(weight, Tensor) and weight.shape == base.shape and weight.dtype == dtype
    assert weight.requires_grad and weight.dim() == 3 and len(weight) == 3
    assert type(weight[1]) is type(weight.mT) is AdaptedWeight and weight[1].mT.shape == (4, 6)
    assert built == []
    want = torch.baddbmm(base, left.to(dtype), right.to(dtype), alpha=1.5)
    value = weight + 0
    assert type(value) is Tensor and built == ["aten.add.Tensor"]
    dW = torch.randn(3, 6, 4).to(dtype)
    grads = torch.autograd.grad(value, (left, right), dW)
    for got, expected in zip(grads, torch.autograd.grad(want, (left, right), dW), strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-2, atol=1e-2)
        assert got.dtype == torch.float32
    assert torch.equal(value, want)
    assert weight.data_ptr() == weight.value().data_ptr() != 0 and built[-1] == "data_ptr"


def test_no_copy_of_the_stack() -> None:
    """A training step allocates no tensor as large as the experts, where PEFT's does."""
    stock = moe("Mixtral")
    fast = fastlora.accelerate(copy.deepcopy(stock), verbose=False)
    layer = next(layer for layer in lora_layers(fast) if layer.parameter_name == "gate_up_proj")
    size = layer.get_base_layer().gate_up_proj.numel() * 4

    def largest(model: nn.Module) -> int:
        ids = IDS[:1, :2]
        with torch.profiler.profile(profile_memory=True) as profile:
            model(input_ids=ids).logits.sum().backward()
        return max(event.cpu_memory_usage for event in profile.events())

    assert largest(fast) < size <= largest(stock)


def test_errors_are_torchs() -> None:
    weight = adapted_weight(torch.randn(6, 4), torch.randn(6, 2), torch.randn(2, 4), 1.0, [])
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        F.linear(torch.randn(3, 5), weight)
    with pytest.raises(RuntimeError, match="same dtype"):
        F.linear(torch.randn(3, 4).half(), weight)
    stack = adapted_weight(
        torch.randn(2, 6, 4), torch.randn(2, 6, 2), torch.randn(2, 2, 4), 1.0, []
    )
    with pytest.raises(IndexError, match="out of bounds"):
        stack[2]
    assert_close_to_exact(stack[-1] + 0, (stack[1] + 0).double(), stack[1] + 0, what="the last")
