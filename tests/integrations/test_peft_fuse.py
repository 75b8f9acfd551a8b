"""`accelerate(model, fuse=...)`: layers joined into one node compute what PEFT's layers compute."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora.autograd.shared import SharedLinearFunction
from fastlora.backends.reference import REFERENCE
from fastlora.integrations.peft.fuse.mlp import GATED
from fastlora.integrations.peft.plan.reasons import SHARED
from tests.integrations.fusing import (
    ATTENTION,
    CONFIGS,
    MLP,
    Nodes,
    Trio,
    adalora,
    check,
    fused,
    fusions,
    joined,
    network,
    trio,
)
from tests.integrations.models import (
    VOCAB,
    assert_network_close,
    exact,
    fill_adapters,
    gradients,
    last_reasons,
    replaying,
    train_step,
)

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
    plain = REFERENCE.lora_linear_fwd
    monkeypatch.setattr(
        REFERENCE, "lora_linear_fwd", lambda *a: served.append(a[1].weight) or plain(*a)
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
