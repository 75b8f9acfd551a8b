"""`accelerate(model, fuse=...)`: layers joined into one node compute what PEFT's layers compute."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Phi3Config,
    Qwen3Config,
)
from transformers.activations import ACT2FN

import fastlora
from fastlora.autograd.gated import GatedMLPFunction
from fastlora.autograd.shared import SharedLinearFunction
from fastlora.backends import reference as torch_reference
from fastlora.integrations.peft.fuse import shared as peft_shared
from fastlora.integrations.peft.fuse.join import Fusion
from fastlora.integrations.peft.fuse.mlp import GATED
from fastlora.integrations.peft.merge.layer import copy_of
from fastlora.integrations.peft.plan.reasons import SHARED
from tests.integrations.models import (
    VOCAB,
    assert_all_close,
    assert_network_close,
    exact,
    fill_adapters,
    gradients,
    last_reasons,
    linear4bit,
    lora_layers,
    replaying,
    train_step,
)

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**GROUPED),
    "qwen3": lambda: Qwen3Config(**GROUPED, head_dim=8),
    "gemma2": lambda: Gemma2Config(**GROUPED, head_dim=8, attn_implementation="eager"),
    "phi3": lambda: Phi3Config(**GROUPED, pad_token_id=0),
    "gpt_neox": lambda: GPTNeoXConfig(**SIZES),
}
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj", "down_proj")


def network(name: str, four_bit: bool = False, **options: Any) -> nn.Module:
    """A tiny language model with a LoRA adapter on every linear, B not zero."""
    model = AutoModelForCausalLM.from_config(CONFIGS[name]())
    if four_bit:
        for module in list(model.base_model.modules()):
            for key, child in module.named_children():
                if type(child) is nn.Linear:
                    bias = child.bias is not None
                    packed = linear4bit(child.in_features, child.out_features, bias=bias)
                    setattr(module, key, packed)
        model.is_loaded_in_4bit = True
    settings: dict[str, Any] = {"r": 3, "lora_alpha": 5, "target_modules": "all-linear"}
    return fill_adapters(get_peft_model(model, LoraConfig(**settings, **options))).train()


def fused(model: nn.Module, fuse: str = "mlp", **options: Any) -> nn.Module:
    return fastlora.accelerate(copy.deepcopy(model), fuse=fuse, verbose=False, **options)


def fusions(model: nn.Module) -> list[Fusion]:
    return fastlora.explain(model).fusions


def joined(model: nn.Module) -> set[tuple[str, ...]]:
    """The layers that `explain` names as fused, in their latest call, too."""
    return {each.layers for each in fusions(model) if each.fused and not each.last_call}


class Nodes:
    """Counts the calls of the joined nodes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        run, mlp = peft_shared.run_together, GatedMLPFunction.apply

        def together(plans: Any, x: Tensor) -> tuple[Tensor, ...]:
            self.sizes.append(len(plans))
            return run(plans, x)

        def gated(*args: Any) -> Tensor:
            self.sizes.append(0)
            return mlp(*args)

        monkeypatch.setattr(peft_shared, "run_together", together)
        monkeypatch.setattr(GatedMLPFunction, "apply", gated)

    def take(self) -> list[int]:
        """Layers in each node since the last time; 0 is an MLP."""
        sizes, self.sizes = self.sizes, []
        return sizes


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Nodes:
    return Nodes(monkeypatch)


# ---- networks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("four_bit", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("fuse", ["inputs", "mlp"])
@pytest.mark.parametrize("name", CONFIGS)
def test_networks(name: str, fuse: str, four_bit: bool, p: float, nodes: Nodes) -> None:
    stock = network(name, four_bit, lora_dropout=p)
    fast = fused(stock, fuse)
    inputs = torch.randint(0, VOCAB, (2, 7))
    got = train_step(fast, inputs)
    assert last_reasons(fast) == {""}
    assert_network_close(
        got, train_step(exact(stock), inputs), train_step(replaying(stock), inputs)
    )
    if name in ("phi3", "gpt_neox"):  # one layer for q, k and v, and one for gate and up
        assert nodes.take() == [] and joined(fast) == set()
        assert {each.reason for each in fusions(fast)} == {"none of these layers share an input"}
    elif fuse == "inputs":
        assert nodes.take() == [3, 2] * 2 and joined(fast) == {ATTENTION, MLP[:2]}
    else:
        assert nodes.take() == [3, 0] * 2 and joined(fast) == {ATTENTION, MLP}


@pytest.mark.parametrize("fuse", ["inputs", "mlp"])
def test_by_an_example(fuse: str, nodes: Nodes) -> None:
    """One call shows who shares an input, and leaves no trace."""
    stock = network("llama", lora_dropout=0.3)
    inputs = torch.randint(0, VOCAB, (2, 7))
    torch.manual_seed(3)
    fast = fused(stock, fuse, example={"input_ids": inputs[:1, :2]})
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1)) and fast.training
    assert not any(m._forward_pre_hooks for m in fast.modules()) and nodes.take() == []
    got = train_step(fast, inputs)
    assert nodes.take() == [3, 2 if fuse == "inputs" else 0] * 2
    read = train_step(fused(stock, fuse), inputs)
    assert all(torch.equal(t, read[name]) for name, t in got.items())
    by_tuple = fused(stock, fuse, example=(inputs[:1, :2],))
    by_tensor = fused(stock, fuse, example=inputs[:1, :2])
    assert [e.layers for e in fusions(by_tuple)] == [e.layers for e in fusions(fast)]
    assert [e.layers for e in fusions(by_tensor)] == [e.layers for e in fusions(fast)]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("fuse", ["inputs", "mlp"])
def test_checkpointing(fuse: str, reentrant: bool, nodes: Nodes) -> None:
    """The recomputation replays the masks, and stops early inside of joined layers."""
    stock = network("llama", lora_dropout=0.3)
    fast, inputs = fused(stock, fuse), torch.randint(0, VOCAB, (2, 7))
    want = train_step(fast, inputs)
    assert len(nodes.take()) == 4
    fast.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    fast.enable_input_require_grads()
    got = train_step(fast, inputs)
    assert all(torch.equal(t, want[name]) for name, t in got.items())
    # Each node runs twice, but for a reentrant forward, which has no gradients and no MLP node.
    assert len(nodes.take()) == (6 if fuse == "mlp" and reentrant else 8)


@pytest.mark.parametrize("fuse", ["inputs", "mlp"])
def test_autocast(fuse: str, nodes: Nodes) -> None:
    stock = network("llama").to(torch.bfloat16)
    fill_adapters(stock)
    fast, inputs = fused(stock, fuse), torch.randint(0, VOCAB, (2, 7))
    with torch.autocast("cpu", torch.bfloat16):
        got, plain = train_step(fast, inputs), train_step(stock, inputs)
    assert len(nodes.take()) == 4 and last_reasons(fast) == {""}
    assert_network_close(got, train_step(exact(stock), inputs), plain)


def test_ways_out_and_copies(nodes: Nodes) -> None:
    """Copies and pickles are joined like the original; `restore` leaves PEFT's own model."""
    stock = network("llama", lora_dropout=0.3)
    before = {name: type(module) for name, module in stock.named_modules()}
    fast, inputs = fused(stock), torch.randint(0, VOCAB, (2, 7))
    want = train_step(fast, inputs)
    assert list(fast.state_dict()) == list(stock.state_dict())
    assert repr(fast) == repr(stock)
    for again in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        nodes.take()
        got = train_step(again, inputs)
        assert nodes.take() == [3, 0] * 2
        assert all(torch.equal(t, want[name]) for name, t in got.items())
    assert fusions(fastlora.accelerate(fast, verbose=False)) == []
    fastlora.accelerate(fast, fuse="mlp", verbose=False)
    fastlora.accelerate(fast, fuse="mlp", verbose=False)  # twice is once
    assert joined(fast) == {ATTENTION, MLP}
    fastlora.restore(fast)
    assert {name: type(module) for name, module in fast.named_modules()} == before
    assert not any({SHARED, GATED} & set(module.__dict__) for module in fast.modules())


def test_names_are_checked() -> None:
    model = network("llama")
    with pytest.raises(ValueError, match=r"fuse must be None or one of inputs, mlp, got 'all'"):
        fastlora.accelerate(model, fuse="all", verbose=False)  # type: ignore[arg-type]
    assert not any(fastlora.explain(model).rows[i].fast for i in range(2))


def test_explain_prints_a_line_for_each_kind() -> None:
    text = str(fastlora.explain(fused(network("llama"))))
    assert "fused: x2 model.layers.*.self_attn: q_proj + k_proj + v_proj" in text
    assert "fused: x2 model.layers.*.mlp: gate_proj + up_proj + down_proj" in text
    text = str(fastlora.explain(fused(network("phi3"), "inputs")))
    assert "not fused: x2 model.layers.*.mlp: gate_up_proj, down_proj: none of these" in text


def test_torch_compile_runs_each_layer_alone(nodes: Nodes) -> None:
    stock = network("llama")
    fast, inputs = fused(stock), torch.randint(0, VOCAB, (2, 7))
    mlp = fast.base_model.model.model.layers[0].mlp
    x = torch.randn(3, 32)
    want = mlp(x)
    nodes.take()
    compiled = torch.compile(mlp, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), want)
    assert nodes.take() == []
    train_step(fast, inputs)
    assert nodes.take() == [3, 0] * 2


# ---- calls that are not what was expected ------------------------------------------------------


class Trio(nn.Module):
    """Three layers of one x, whose calls a test makes as it likes."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(20, 24), nn.Linear(20, 9), nn.Linear(20, 17)
        self.between: Callable[[Tensor], Tensor] = lambda x: x

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.q(x), self.k(x)
        x = self.between(x)
        v = self.v(x)
        return torch.cat([q, k, v], dim=-1)


def trio(p: float = 0.3, **options: Any) -> tuple[nn.Module, nn.Module]:
    """(stock, fast), q, k and v joined by an example: the source has a new x for v."""
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q", "k", "v"], lora_dropout=p)
    stock = fill_adapters(get_peft_model(Trio(), config)).train()
    return stock, fused(stock, "inputs", example=torch.randn(1, 20), **options)


def check(stock: nn.Module, fast: nn.Module, x: Tensor | None = None) -> None:
    x = torch.randn(4, 20) if x is None else x
    got = train_step(fast, x)
    assert_all_close(got, train_step(exact(stock), x), train_step(replaying(stock), x))


def test_one_node_and_one_x(nodes: Nodes) -> None:
    stock, fast = trio()
    check(stock, fast)
    assert nodes.take() == [3]
    x = torch.randn(4, 20)
    layers = fast.base_model.model
    ys = [layer(x) for layer in (layers.q, layers.k, layers.v)]
    base = [y.grad_fn.next_functions[0][0] for y in ys]
    assert base[0] is base[1] is base[2]
    assert type(base[0]).__name__ == f"{SharedLinearFunction.__name__}Backward"


def test_x_changes_between_the_calls(nodes: Nodes) -> None:
    stock, fast = trio(p=0.0)
    for change in (lambda x: x * 2, lambda x: x.clone(), lambda x: x[:, :]):
        stock.base_model.model.between = fast.base_model.model.between = change
        check(stock, fast)
    # In place: without gradients, which would not allow it.
    stock.base_model.model.between = fast.base_model.model.between = lambda x: x.mul_(2)
    x = torch.randn(4, 20)
    with torch.no_grad():
        torch.testing.assert_close(fast(x.clone()), stock(x.clone()))
    assert nodes.take() == [3] * 4


def test_the_mode_changes_between_the_calls(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results made without gradients, or with them, are taken by nobody else."""
    _, fast = trio(p=0.0)
    layers, x = fast.base_model.model, torch.randn(4, 20, requires_grad=True)
    with torch.no_grad():
        layers.q(x)
    assert layers.k(x).requires_grad
    layers.q(x)
    with torch.no_grad():
        assert not layers.k(x).requires_grad
    layers.q(x)
    served: list[Tensor] = []
    plain = torch_reference.lora_linear_fwd
    monkeypatch.setattr(
        torch_reference, "lora_linear_fwd", lambda *a: served.append(a[1].weight) or plain(*a)
    )
    with fastlora.use_backend("reference"):
        layers.k(x)
    assert [weight.shape[0] for weight in served] == [9]
    z = torch.randn(4, 20)
    with torch.inference_mode():
        layers.q(z)
    with torch.no_grad():
        assert not layers.k(z).is_inference()
    layers.q(z)
    layers.k(z.requires_grad_()).sum().backward()
    assert z.grad is not None
    with torch.inference_mode():
        y = torch.ones(2, 20)
        assert [layer(y).shape[-1] for layer in (layers.q, layers.k, layers.v)] == [24, 9, 17]
    assert nodes.take() == [3] * 5


def test_the_layer_changes_between_the_calls() -> None:
    """Adapters switched, disabled or retrained after the first call count for the second."""
    stock, fast = trio(p=0.0)
    for model in (stock, fast):
        torch.manual_seed(5)
        model.add_adapter("other", LoraConfig(r=2, target_modules=["q", "k", "v"]))
        fill_adapters(model)

    def set_adapter(layer: Any) -> None:
        layer.set_adapter("other")

    def disable(layer: Any) -> None:
        layer.enable_adapters(False)

    def write(layer: Any) -> None:
        with torch.no_grad():
            layer.lora_B["default"].weight.mul_(2)

    def scale(layer: Any) -> None:
        layer.scaling["default"] = 7.0

    def train_bias(layer: Any) -> None:
        layer.base_layer.bias.requires_grad_(True)

    def drop(layer: Any) -> None:
        layer.lora_dropout["default"] = nn.Dropout(1.0)

    def hook(layer: Any) -> None:
        layer.register_forward_pre_hook(lambda module, args: (args[0] * 3,))

    x = torch.randn(4, 20)
    for change in (set_adapter, disable, write, scale, train_bias, drop, hook):
        results = []
        for model in (copy.deepcopy(stock), copy.deepcopy(fast)):
            layers = model.base_model.model
            model.zero_grad()
            first = layers.q(x)
            change(layers.k)
            y = layers.k(x)
            if change is not write:  # the node has saved k's weights: its backward says so
                (first.sum() + y.square().sum()).backward()
            results.append({"y": y.detach(), **gradients(model)})
        assert results[0].keys() == results[1].keys(), change
        for name, want in results[0].items():
            torch.testing.assert_close(results[1][name], want, msg=f"{change}, {name}")


@pytest.mark.parametrize("kind", ["pre", "forward", "backward"])
@pytest.mark.parametrize("place", ["q", "v"])
def test_hooks_on_the_layers(place: str, kind: str, nodes: Nodes) -> None:
    """Hooks that may give a layer another x leave it out; those on the output see it."""
    stock, fast = trio()

    def halve_input(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0] * 0.5,)

    def halve_output(module: nn.Module, args: Any, y: Tensor) -> Tensor:
        return y * 0.5

    def halve_gradient(module: nn.Module, dx: Any, dy: Any) -> Any:
        return (dx[0] * 0.5,)

    for model in (stock, fast):
        layer = getattr(model.base_model.model, place)
        if kind == "pre":
            layer.register_forward_pre_hook(halve_input)
        elif kind == "forward":
            layer.register_forward_hook(halve_output)
        else:
            layer.register_full_backward_hook(halve_gradient)
    check(stock, fast)
    expected = [3] if kind == "forward" else [] if place == "q" else [2]
    assert nodes.take() == expected
    note = next(each.note for each in fusions(fast))
    assert ("hooks" in note) == (kind != "forward")


def test_an_exception_between_the_calls(nodes: Nodes) -> None:
    stock, fast = trio()
    kept = fast.base_model.model.between

    def fail(x: Tensor) -> Tensor:
        raise KeyboardInterrupt

    fast.base_model.model.between = fail
    with pytest.raises(KeyboardInterrupt):
        fast(torch.randn(4, 20))
    fast.base_model.model.between = kept
    check(stock, fast)
    assert nodes.take() == [3, 3]


def test_results_that_nobody_takes_are_let_go() -> None:
    """They live until a group of the model is called again, and `explain` counts them."""
    _, fast = trio()
    layers = fast.base_model.model
    slot = layers.q.__dict__[SHARED].slot
    layers.q(torch.randn(4, 20))
    first = weakref.ref(slot.held.x)
    layers.k(slot.held.x)
    assert set(slot.held.results) == {2}
    layers.q(torch.randn(4, 20))
    gc.collect()
    assert first() is None
    assert "1 of 3 results were not used" in fusions(fast)[0].note
    check_x = torch.randn(4, 20)
    fast(check_x)
    fast(check_x)
    assert slot.held is None and fusions(fast)[0].note == ""


def test_a_call_in_a_checkpointed_region_is_its_own(nodes: Nodes) -> None:
    """k and v save what they need where their recomputation looks for it."""
    stock, fast = trio(p=0.0)
    x = torch.randn(4, 20)

    def run(model: nn.Module) -> dict[str, Tensor]:
        model.zero_grad()
        torch.manual_seed(0)
        layers, leaf = model.base_model.model, x.clone().requires_grad_()
        q = layers.q(leaf)
        k, v = checkpoint(
            lambda x: (layers.k(x).tanh(), layers.v(x).tanh()), leaf, use_reentrant=False
        )
        (q.sum() + k.square().sum() + v.square().sum()).backward()
        return {"q": q.detach(), "dx": leaf.grad, **gradients(model)}

    got = run(fast)
    assert nodes.take() == [3]
    want = run(stock)
    assert got.keys() == want.keys() and len(got) == 8
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5)


def test_threads(nodes: Nodes) -> None:
    """Each thread has results of its own."""
    _, fast = trio(p=0.0)
    xs = [torch.randn(4, 20) for _ in range(2)]
    want = [fast(x) for x in xs]
    got: dict[int, Tensor] = {}
    gate = threading.Barrier(2)

    def wait(x: Tensor) -> Tensor:
        gate.wait(timeout=60)
        return x

    fast.base_model.model.between = wait

    def call(i: int) -> None:
        with torch.no_grad():
            got[i] = fast(xs[i])

    threads = [threading.Thread(target=call, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got[i], want[i]) for i in range(2))
    assert nodes.take() == [3] * 4


def test_layers_that_fall_back_to_peft(nodes: Nodes) -> None:
    """The others stay joined, and the node has what remains."""
    for place, expected in (("q", []), ("k", [2])):
        stock, fast = trio()
        for model in (stock, fast):
            layer = getattr(model.base_model.model, place)
            layer.lora_dropout["default"] = nn.Sequential(layer.lora_dropout["default"])
        x = torch.randn(4, 20)
        fast.eval(), stock.eval()
        torch.testing.assert_close(fast(x), stock(x))
        assert nodes.take() == expected


def test_several_adapters(nodes: Nodes) -> None:
    """Adapters that drop nothing are stacked inside a joined layer, each mask needs its launch."""
    for p, expected in ((0.0, [3]), (0.3, [])):
        stock, fast = trio(p)
        for model in (stock, fast):
            torch.manual_seed(5)
            config = LoraConfig(r=2, target_modules=["q", "k", "v"], lora_dropout=p)
            model.add_adapter("other", config)
            fill_adapters(model).base_model.set_adapter(["default", "other"])
        if p == 0.0:
            check(stock, fast)
        else:
            fast(torch.randn(4, 20))
        assert nodes.take() == expected


def test_dora_and_merged_layers_run_alone(nodes: Nodes) -> None:
    config = LoraConfig(r=3, target_modules=["q", "k", "v"], use_dora=True)
    stock = fill_adapters(get_peft_model(Trio(), config)).train()
    fast = fused(stock, "inputs")
    assert [each.layers for each in fusions(fast)] == [("q", "k")]
    x = torch.randn(4, 20)
    torch.testing.assert_close(fast(x), stock(x))
    assert "more than one launch" in fusions(fast)[0].note
    _, fast = trio(p=0.0)
    want = fast(x)
    assert nodes.take() == [3]
    fast.merge_adapter()
    torch.testing.assert_close(fast(x), want)
    assert nodes.take() == []
    fast.unmerge_adapter()
    torch.testing.assert_close(fast(x), want)
    assert nodes.take() == [3]


def adalora(model: nn.Module, targets: list[str]) -> nn.Module:
    config = AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=targets)
    model = fill_adapters(get_peft_model(model, config)).train()
    for name, parameter in model.named_parameters():
        if "lora_E" in name:  # zero at first, as lora_B is
            parameter.data.normal_()
    return model


def test_adalora_runs_alone(nodes: Nodes) -> None:
    """A joined node would be computed for nobody: the A of a call is not that of the next."""
    stock = adalora(Trio(), ["q", "k", "v"])
    fast = fused(stock, "inputs")
    check(stock, fast)
    assert nodes.take() == [] and last_reasons(fast) == {""}
    assert "its A or B is made anew at each call" in fusions(fast)[0].note


@pytest.mark.parametrize("example", [None, torch.ones(1, 20)], ids=["source", "example"])
def test_layers_around_a_parameter_are_left_out(example: Tensor | None, nodes: Nodes) -> None:
    config = LoraConfig(r=3, target_modules=["q", "v"], target_parameters=["k.weight"])
    stock = fill_adapters(get_peft_model(Trio(), config)).train()
    fast = fused(stock, "inputs", example=example)
    check(stock, fast)
    # The source has a new x for v, the example has not.
    assert nodes.take() == ([] if example is None else [2]) and last_reasons(fast) == {""}


# ---- MLPs --------------------------------------------------------------------------------------


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
    assert nodes.take() == [0] and joined(fast) == {("gate", "up", "down")}


@pytest.mark.parametrize("kind", [UpFirst, Functional])
def test_forms(kind: type[Gated], nodes: Nodes) -> None:
    """Other ways to write it; each mask is drawn when PEFT's would be."""
    stock, fast = gated(kind())
    check(stock, fast)
    assert nodes.take() == [0]


@pytest.mark.parametrize("kind", [Clamped, Branching, Swapped, Watching])
def test_what_is_no_gated_mlp(kind: type[Gated], nodes: Nodes) -> None:
    stock, fast = gated(kind())
    check(stock, fast)
    assert getattr(fast.base_model.model, "seen", 1) == 1
    assert nodes.take() == ([] if kind is Swapped else [2])


@pytest.mark.parametrize(
    "act", [nn.ReLU(), nn.PReLU(), ACT2FN["quick_gelu"], nn.Sequential(nn.SiLU(), nn.Dropout(0.1))]
)
def test_other_activations_are_left_alone(act: nn.Module, nodes: Nodes) -> None:
    stock, fast = gated(Gated(act))
    fast.eval(), stock.eval()
    x = torch.randn(4, 20)
    torch.testing.assert_close(fast(x), stock(x))
    assert nodes.take() == [2]
    assert "its activation is neither SiLU nor GELU" in {each.reason for each in fusions(fast)}


def test_an_mlp_with_hooks_runs_its_own_forward(nodes: Nodes) -> None:
    for place in ("act", "gate", "down"):
        _, fast = gated(Gated())
        seen: list[nn.Module] = []
        module = getattr(fast.base_model.model, place)
        module.register_forward_hook(lambda module, args, y, seen=seen: seen.append(module))
        fast(torch.randn(4, 20))
        assert nodes.take() == [2] and seen == [module]
        assert "hooks" in fusions(fast)[0].note


def test_an_mlp_that_has_changed_runs_its_own_forward(nodes: Nodes) -> None:
    x = torch.randn(4, 20)
    stock, fast = gated(Gated(), p=0.0)
    for model in (stock, fast):
        model.base_model.model.act = nn.ReLU()
    torch.testing.assert_close(fast(x), stock(x))
    assert nodes.take() == [2] and "replaced" in fusions(fast)[0].note
    stock, fast = gated(Gated(), p=0.0)
    with stock.disable_adapter(), fast.disable_adapter():
        torch.testing.assert_close(fast(x), stock(x))
    assert nodes.take() == [] and "disabled" in fusions(fast)[0].note
    torch.testing.assert_close(fast(x), stock(x))
    assert nodes.take() == [0] and fusions(fast)[0].note == ""


def test_a_patched_class_counts(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before joining, though a model of the class was read before, and after it."""

    class Patched(Gated):
        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.act(self.gate(x)) * self.up(x))

    x = torch.randn(4, 20)
    stock, fast = gated(Patched(), p=0.0)
    fast(x)
    assert nodes.take() == [0]
    monkeypatch.setattr(Patched, "forward", Clamped.forward)
    torch.testing.assert_close(fast(x), stock(x))
    assert nodes.take() == [2] and "another forward" in fusions(fast)[0].note
    stock, fast = gated(Patched(), p=0.0)
    torch.testing.assert_close(fast(x), stock(x))
    assert nodes.take() == [2]
    stock, fast = gated(Gated(), p=0.0)
    for model in (stock, fast):
        model.base_model.model.act.forward = torch.tanh
    torch.testing.assert_close(fast(x), stock(x))
    assert nodes.take() == [2] and "activation has another forward" in fusions(fast)[0].note


def test_source_that_cannot_be_read() -> None:
    space: dict[str, Any] = {"Trio": Trio}
    exec(
        "class Made(Trio):\n    def forward(self, x):\n        return self.q(x) + self.q(x)", space
    )
    model = get_peft_model(space["Made"](), LoraConfig(r=2, target_modules=["q", "k", "v"]))
    assert "can't be read" in fusions(fused(model, "inputs"))[0].note


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
    assert 0 not in nodes.take()


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
    assert nodes.take() == [2]
    stock, fast = gated(Named(), p=0.0)
    torch.testing.assert_close(fast(x), stock(x))
    assert nodes.take() == [0]
    monkeypatch.setitem(globals(), "SILU", F.relu)
    torch.testing.assert_close(fast(x), stock(x))
    assert nodes.take() == [2] and "replaced" in fusions(fast)[0].note


def test_a_merged_mlp_is_its_own_class_again() -> None:
    _, fast = gated(Gated(), p=0.0)
    merged = fast.merge_and_unload()
    merged(torch.randn(4, 20))
    assert type(merged) is Gated


def test_a_copy_of_a_layer_is_alone() -> None:
    _, fast = trio()
    layers = fast.base_model.model
    copied = copy_of(layers.q)
    assert copied.__dict__[SHARED] is None and SHARED in layers.q.__dict__
    torch.testing.assert_close(copied.eval()(torch.ones(2, 20)), layers.q.eval()(torch.ones(2, 20)))


def test_adalora_in_an_mlp(nodes: Nodes) -> None:
    stock = adalora(Gated(), ["gate", "up", "down"])
    check(stock, fused(stock))
    assert nodes.take() == [0]


def test_an_mlp_with_an_adapter_on_a_parameter_runs_its_own_forward(nodes: Nodes) -> None:
    config = LoraConfig(r=3, target_modules=["up", "down"], target_parameters=["gate.weight"])
    stock = fill_adapters(get_peft_model(Gated(), config)).train()
    fast = fused(stock)
    check(stock, fast)
    assert nodes.take() == [] and last_reasons(fast) == {""}
    (left,) = fusions(fast)
    assert not left.fused


def test_an_mlp_without_an_adapter_on_down() -> None:
    config = LoraConfig(r=3, target_modules=["gate", "up"])
    fast = fused(fill_adapters(get_peft_model(Gated(), config)))
    assert joined(fast) == {("gate", "up")}
    assert [each.layers for each in fusions(fast)] == [("gate", "up")]


@pytest.mark.parametrize("bias", ["all", "none"])
def test_biases_train(bias: str, nodes: Nodes) -> None:
    stock, fast = gated(Gated(), bias=bias, lora_bias=bias == "none")
    check(stock, fast)
    assert nodes.take() == [0]


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
