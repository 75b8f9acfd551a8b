"""A checkpointed forward that runs again draws the dropout masks of the first, also without RNG."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import LoraLinear, QLoraLinear
from tests.integrations.models import MLP4bit, fill_adapters

Run = Callable[[nn.Module, Tensor], Tensor]


class Block(nn.Module):
    """A gated MLP, which `fuse="mlp"` can join."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


def adapted(block: nn.Module, targets: list[str], fuse: Any = None, **options: Any) -> nn.Module:
    config = LoraConfig(r=2, target_modules=targets, lora_dropout=0.5, **options)
    model = get_peft_model(nn.ModuleDict({"block": block}), config)
    fastlora.accelerate(fill_adapters(model), fuse=fuse, verbose=False)
    return model.base_model.model["block"]


def own(kind: Any, **options: Any) -> nn.Module:
    layer = kind(64, 64, r=2, lora_dropout=0.5, **options)
    layer.lora_B.default.weight.data.normal_()
    return layer


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "LoRA": (lambda: adapted(Block(), ["gate", "up", "down"]), 16),
    "gated MLP": (lambda: adapted(Block(), ["gate", "up", "down"], fuse="mlp"), 16),
    "DoRA": (lambda: adapted(Block(), ["gate", "down"], use_dora=True), 16),
    "4-bit": (lambda: adapted(MLP4bit(), ["up", "down"]), 64),
    "LoraLinear": (partial(own, LoraLinear), 64),
    "QLoraLinear": (partial(own, QLoraLinear), 64),
}
WAYS: dict[str, Run] = {
    f"{name}, {'RNG' if rng else 'no RNG'}": partial(way, rng)
    for rng in (True, False)
    for name, way in {
        "reentrant": lambda rng, m, x: checkpoint(m, x, use_reentrant=True, preserve_rng_state=rng),
        "not reentrant": lambda rng, m, x: checkpoint(
            m, x, use_reentrant=False, preserve_rng_state=rng
        ),
        "wrapper": lambda rng, m, x: checkpoint_wrapper(m, preserve_rng_state=rng)(x),
    }.items()
}


def gradients(model: nn.Module, K: int, run: Run, steps: int = 1) -> list[Tensor]:
    torch.manual_seed(1)
    x = torch.randn(5, K, requires_grad=True)
    for _ in range(steps):
        run(model, x).square().sum().backward()
    found = [x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]
    model.zero_grad()
    return [g.clone() for g in found if g is not None]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore")
def test_gradients_are_those_without_checkpoints(name: str, way: str) -> None:
    make, K = MODELS[name]
    # Without RNG, the recomputation draws further numbers, so that a second step differs.
    steps = 1 if "no RNG" in way else 2
    torch.manual_seed(0)
    want = gradients(make(), K, lambda m, x: m(x), steps)
    assert len(want) > 2
    torch.manual_seed(0)
    model = make()
    for _ in range(2):
        got = gradients(model, K, WAYS[way], steps)
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def twice(rng: bool, model: nn.Module, x: Tensor) -> Tensor:
    parts = [checkpoint(model, x, use_reentrant=False, preserve_rng_state=rng) for _ in range(2)]
    return parts[0] + 2 * parts[1]


def test_several_forwards_before_a_backward() -> None:
    """With the random state each gets its own mask back; without it is not known which."""
    make, K = MODELS["LoRA"]
    torch.manual_seed(0)
    want = gradients(make(), K, lambda m, x: m(x) + 2 * m(x))
    torch.manual_seed(0)
    model = make()
    for one, other in zip(gradients(model, K, partial(twice, True)), want, strict=True):
        torch.testing.assert_close(one, other)
    with pytest.raises(RuntimeError, match="2 forwards may be meant; checkpoint with preserve_rng"):
        gradients(model, K, partial(twice, False))


def test_forwards_without_a_backward_are_forgotten() -> None:
    make, K = MODELS["LoRA"]
    model: Any = make()
    for _ in range(40):
        model(torch.randn(2, K))
    pending = model.up.lora_dropout["default"].__dict__["_fastlora_pending_seeds"]
    assert len(pending) == 16
