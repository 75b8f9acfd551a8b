"""QLoRA under torch.compile: one graph, on fastlora's ops, with eager mode's results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import fastlora
from fastlora.backends import native
from tests.integrations.models import MLP4bit, peft_model

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(native.build_info() is None, reason=str(native.unavailable_reason())),
]


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    counters.clear()


def qlora(nested: bool = True, **options: Any) -> Any:
    torch.manual_seed(0)
    return fastlora.accelerate(peft_model(MLP4bit(nested=nested), **options), verbose=False)


def results(call: Callable[[Tensor], Tensor], model: nn.Module, rows: int = 3) -> list[Tensor]:
    torch.manual_seed(1)
    x = torch.randn(rows, 64, requires_grad=True)
    y = call(x)
    y.float().square().sum().backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    assert x.grad is not None
    return [y.detach(), x.grad, *grads]


def ops_of(call: Callable[[], object]) -> dict[str, int]:
    """How often fastlora's and bitsandbytes' ops run."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    found = {event.key: event.count for event in profile.key_averages()}
    return {k: n for k, n in found.items() if k.startswith(("fastlora::", "bitsandbytes::"))}


@pytest.mark.parametrize(
    "options", [{}, {"use_dora": True}, {"nested": False}], ids=["LoRA", "DoRA", "plain absmax"]
)
def test_compiled_is_eager(options: dict[str, Any]) -> None:
    model = qlora(**options)
    want = results(model, model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for one, other in zip(results(compiled, model), want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    counts = ops_of(lambda: results(compiled, model))
    assert counts and all(key.startswith("fastlora::") for key in counts), counts


def test_inductor() -> None:
    model = qlora()
    want = results(model, model)
    compiled = torch.compile(model, fullgraph=True)
    for one, other in zip(results(compiled, model), want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_dropout_draws_masks() -> None:
    model = qlora(lora_dropout=0.5)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 64)
    assert not torch.equal(compiled(x), compiled(x))
    model.eval()
    torch.testing.assert_close(compiled(x), model(x))


def test_changed_weights_are_seen() -> None:
    """Another absmax, other codes and another adapter: what was compiled reads them."""
    model = qlora()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 64)
    before = compiled(x)
    fastlora.merge_adapter(model, compare=False)
    fastlora.unmerge_adapter(model)
    after = compiled(x)
    assert not torch.equal(before, after) and torch.equal(after, model(x))
    model.base_model.model.up.lora_B["default"].weight.data.mul_(2)
    assert torch.equal(compiled(x), model(x))
    with model.disable_adapter():
        torch.testing.assert_close(compiled(x), model(x))


def test_lengths_are_dynamic() -> None:
    model = qlora()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for rows in (3, 5, 8, 13, 21, 34):
        x = torch.randn(rows, 64)
        assert torch.equal(compiled(x), model(x))
    assert counters["stats"]["unique_graphs"] <= 2
