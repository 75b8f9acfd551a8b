"""`accelerate(model, fuse="mlp")`: a gated MLP in one node computes what PEFT's layers compute."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from tests.integrations.fusing import (
    Nodes,
    adalora,
    check,
    fused,
    fusions,
    joined,
)
from tests.integrations.models import (
    fill_adapters,
    last_reasons,
    lora_layers,
)


class Gated(nn.Module):
    """A gated MLP in the usual form; the activation is a child."""

    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(20, 33), nn.Linear(20, 33), nn.Linear(33, 20)
        self.act = act or nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


class UpFirst(Gated):
    """The product the other way round, through variables."""

    def forward(self, hidden: Tensor) -> Tensor:
        up = self.up(hidden)
        gate = self.act(self.gate(hidden))
        product = up * gate
        return self.down(product)


class Functional(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.gate(x), approximate="tanh") * self.up(x))


class Clamped(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)).clamp(max=7) * self.up(x))


class Branching(Gated):
    def forward(self, x: Tensor) -> Tensor:
        if x.dim() > 5:
            x = x.flatten(0, 1)
        return self.down(self.act(self.gate(x)) * self.up(x))


class Swapped(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x * 2))


class Watching(Gated):
    """A call whose result nobody reads, as of statistics or a router's loss."""

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x)
        _ = self.watch(x)
        return self.down(self.act(gate) * self.up(x))

    def watch(self, x: Tensor) -> Tensor:
        self.seen = getattr(self, "seen", 0) + 1
        return x


def gated(model: nn.Module, p: float = 0.3, **options: Any) -> tuple[nn.Module, nn.Module]:
    targets = ["gate", "up", "down"]
    config = LoraConfig(r=3, lora_alpha=5, target_modules=targets, lora_dropout=p, **options)
    stock = fill_adapters(get_peft_model(model, config)).train()
    return stock, fused(stock)


ACTS: dict[str, Callable[[], nn.Module]] = {
    "SiLU": nn.SiLU,
    "GELU": nn.GELU,
    "GELU by tanh": lambda: nn.GELU(approximate="tanh"),
    **{
        name: lambda name=name: ACT2FN[name]
        for name in ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_python")
    },
}


@pytest.mark.parametrize("act", ACTS)
def test_activations(act: str, nodes: Nodes) -> None:
    stock, fast = gated(Gated(ACTS[act]()))
    check(stock, fast)
    assert nodes.take() == 1 and joined(fast) == {("gate", "up", "down")}


@pytest.mark.parametrize("kind", [UpFirst, Functional])
def test_forms(kind: type[Gated], nodes: Nodes) -> None:
    """Other ways to write it; each mask is drawn when PEFT's would be."""
    stock, fast = gated(kind())
    check(stock, fast)
    assert nodes.take() == 1


@pytest.mark.parametrize("kind", [Clamped, Branching, Swapped, Watching])
def test_what_is_no_gated_mlp(kind: type[Gated], nodes: Nodes) -> None:
    stock, fast = gated(kind())
    check(stock, fast)
    assert getattr(fast.base_model.model, "seen", 1) == 1
    assert nodes.take() == 0


@pytest.mark.parametrize(
    "act", [nn.ReLU(), nn.PReLU(), ACT2FN["quick_gelu"], nn.Sequential(nn.SiLU(), nn.Dropout(0.1))]
)
def test_other_activations_are_left_alone(act: nn.Module, nodes: Nodes) -> None:
    stock, fast = gated(Gated(act))
    fast.eval(), stock.eval()
    x = torch.randn(4, 20)
    torch.testing.assert_close(fast(x), stock(x))
    assert nodes.take() == 0
    assert "its activation is neither SiLU nor GELU" in {each.reason for each in fusions(fast)}


def test_an_mlp_with_hooks_runs_its_own_forward(nodes: Nodes) -> None:
    for place in ("act", "gate", "down"):
        _, fast = gated(Gated())
        seen: list[nn.Module] = []
        module = getattr(fast.base_model.model, place)
        module.register_forward_hook(lambda module, args, y, seen=seen: seen.append(module))
        fast(torch.randn(4, 20))
        assert nodes.take() == 0 and seen == [module]
        assert "hooks" in fusions(fast)[0].note


def test_an_mlp_that_has_changed_runs_its_own_forward(nodes: Nodes) -> None:
    x = torch.randn(4, 20)
    stock, fast = gated(Gated(), p=0.0)
    for model in (stock, fast):
        model.base_model.model.act = nn.ReLU()
    torch.testing.assert_close(fast(x), stock(x))
    assert nodes.take() == 0 and "replaced" in fusions(fast)[0].note
    stock, fast = gated(Gated(), p=0.0)
    with stock.disable_adapter(), fast.disable_adapter():
        torch.testing.assert_close(fast(x), stock(x))
    assert nodes.take() == 0 and "no adapter is at work" in fusions(fast)[0].note
    torch.testing.assert_close(fast(x), stock(x))
    assert nodes.take() == 1 and fusions(fast)[0].note == ""


def test_a_patched_class_counts(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before joining, though a model of the class was read before, and after it."""

    class Patched(Gated):
        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.act(self.gate(x)) * self.up(x))

    x = torch.randn(4, 20)
    stock, fast = gated(Patched(), p=0.0)
    fast(x)
    assert nodes.take() == 1
    monkeypatch.setattr(Patched, "forward", Clamped.forward)
    torch.testing.assert_close(fast(x), stock(x))
    assert nodes.take() == 0 and "another forward" in fusions(fast)[0].note
    stock, fast = gated(Patched(), p=0.0)
    torch.testing.assert_close(fast(x), stock(x))
    assert nodes.take() == 0
    stock, fast = gated(Gated(), p=0.0)
    for model in (stock, fast):
        model.base_model.model.act.forward = torch.tanh
    torch.testing.assert_close(fast(x), stock(x))
    assert nodes.take() == 0 and "activation has another forward" in fusions(fast)[0].note


def test_source_that_cannot_be_read() -> None:
    space: dict[str, Any] = {"Gated": Gated}
    exec("class Made(Gated):\n    def forward(self, x):\n        return self.up(x)", space)
    model = get_peft_model(space["Made"](), LoraConfig(r=2, target_modules=["gate", "up"]))
    with pytest.warns(UserWarning, match="so nothing is joined"):
        assert fusions(fused(model)) == []


def test_alora_on_down_alone(nodes: Nodes) -> None:
    """Where a call has no offsets, PEFT invokes nothing."""
    model = Gated()
    stock = get_peft_model(model, LoraConfig(r=2, target_modules=["gate", "up"]))
    stock.add_adapter("a", LoraConfig(r=2, target_modules=["down"], alora_invocation_tokens=[1]))
    stock = fill_adapters(stock)
    stock.base_model.set_adapter(["default", "a"])
    fast = fused(stock)
    x = torch.randn(4, 20)
    torch.testing.assert_close(fast(x), stock(x))
    assert nodes.take() == 0


SILU = F.silu


def test_a_function_that_is_another(monkeypatch: pytest.MonkeyPatch, nodes: Nodes) -> None:
    class Named(Gated):
        def forward(self, x: Tensor) -> Tensor:
            return self.down(SILU(self.gate(x)) * self.up(x))

    def hidden(SILU: Any) -> type[Gated]:
        class Closed(Gated):
            def forward(self, x: Tensor) -> Tensor:
                return self.down(SILU(self.gate(x)) * self.up(x))

        return Closed

    x = torch.randn(4, 20)
    stock, fast = gated(hidden(F.relu)(), p=0.0)
    torch.testing.assert_close(fast(x), stock(x))
    assert nodes.take() == 0
    stock, fast = gated(Named(), p=0.0)
    torch.testing.assert_close(fast(x), stock(x))
    assert nodes.take() == 1
    monkeypatch.setitem(globals(), "SILU", F.relu)
    torch.testing.assert_close(fast(x), stock(x))
    assert nodes.take() == 0 and "replaced" in fusions(fast)[0].note


def test_a_merged_mlp_is_its_own_class_again() -> None:
    _, fast = gated(Gated(), p=0.0)
    merged = fast.merge_and_unload()
    merged(torch.randn(4, 20))
    assert type(merged) is Gated


def test_a_merged_mlp_is_saved_as_its_own_class() -> None:
    """Without a forward in between, which would have changed it back."""
    _, fast = gated(Gated(), p=0.0)
    merged = fast.merge_and_unload()
    data = pickle.dumps(merged)
    assert b"fastlora" not in data and type(pickle.loads(data)) is Gated


def test_adalora_in_an_mlp(nodes: Nodes) -> None:
    stock = adalora(Gated(), ["gate", "up", "down"])
    check(stock, fused(stock))
    assert nodes.take() == 1


def test_an_mlp_with_an_adapter_on_a_parameter_runs_its_own_forward(nodes: Nodes) -> None:
    config = LoraConfig(r=3, target_modules=["up", "down"], target_parameters=["gate.weight"])
    stock = fill_adapters(get_peft_model(Gated(), config)).train()
    fast = fused(stock)
    check(stock, fast)
    assert nodes.take() == 0 and last_reasons(fast) == {""}
    (left,) = fusions(fast)
    assert not left.fused


def test_an_mlp_without_an_adapter_on_down() -> None:
    config = LoraConfig(r=3, target_modules=["gate", "up"])
    fast = fused(fill_adapters(get_peft_model(Gated(), config)))
    assert [each.note for each in fusions(fast)] == ["down: it is not on fastlora"]


@pytest.mark.parametrize("bias", ["all", "none"])
def test_biases_train(bias: str, nodes: Nodes) -> None:
    stock, fast = gated(Gated(), bias=bias, lora_bias=bias == "none")
    check(stock, fast)
    assert nodes.take() == 1


def test_replicas_run_their_own_layers(nodes: Nodes) -> None:
    """What `nn.DataParallel` makes: copies of the modules with other parameters."""
    stock, fast = gated(Gated(), p=0.0)
    replica = fast.base_model.model._replicate_for_data_parallel()
    for name, child in list(replica._modules.items()):
        twin = copy.deepcopy(child)
        replica._modules[name] = twin
        if lora_layers(twin):
            with torch.no_grad():
                twin.lora_B["default"].weight.mul_(3)
            with torch.no_grad():
                getattr(stock.base_model.model, name).lora_B["default"].weight.mul_(3)
    x = torch.randn(4, 20)
    torch.testing.assert_close(replica(x), stock(x))
