"""`accelerate(model, fuse=...)`: layers joined into one node compute what PEFT's layers compute."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import fastlora
from fastlora.integrations.peft.fuse.mlp import GATED
from tests.integrations.fusing import (
    CONFIGS,
    MLP,
    Nodes,
    fused,
    fusions,
    joined,
    network,
)
from tests.integrations.models import (
    VOCAB,
    assert_network_close,
    exact,
    fill_adapters,
    last_reasons,
    replaying,
    train_step,
)

# ---- networks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("four_bit", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("name", CONFIGS)
def test_networks(name: str, four_bit: bool, p: float, nodes: Nodes) -> None:
    stock = network(name, four_bit, lora_dropout=p)
    if name in ("phi3", "gpt_neox"):  # one layer for gate and up, and an MLP that has no gate
        with pytest.warns(UserWarning, match="so nothing is joined"):
            fast = fused(stock)
        assert fusions(fast) == []
        return
    fast = fused(stock)
    inputs = torch.randint(0, VOCAB, (2, 7))
    got = train_step(fast, inputs)
    assert last_reasons(fast) == {""}
    assert_network_close(
        got, train_step(exact(stock), inputs), train_step(replaying(stock), inputs)
    )
    assert nodes.take() == 2 and joined(fast) == {MLP}


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool, nodes: Nodes) -> None:
    """The recomputation replays the masks, and stops early inside of joined layers."""
    stock = network("llama", lora_dropout=0.3)
    fast, inputs = fused(stock), torch.randint(0, VOCAB, (2, 7))
    want = train_step(fast, inputs)
    assert nodes.take() == 2
    fast.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    fast.enable_input_require_grads()
    got = train_step(fast, inputs)
    assert all(torch.equal(t, want[name]) for name, t in got.items())
    # Each node runs twice, but for a reentrant forward, which has no gradients and no node.
    assert nodes.take() == (2 if reentrant else 4)


def test_autocast(nodes: Nodes) -> None:
    stock = network("llama").to(torch.bfloat16)
    fill_adapters(stock)
    fast, inputs = fused(stock), torch.randint(0, VOCAB, (2, 7))
    with torch.autocast("cpu", torch.bfloat16):
        got, plain = train_step(fast, inputs), train_step(stock, inputs)
    assert nodes.take() == 2 and last_reasons(fast) == {""}
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
        assert nodes.take() == 2
        assert all(torch.equal(t, want[name]) for name, t in got.items())
    assert fusions(fastlora.accelerate(fast, verbose=False)) == []
    fastlora.accelerate(fast, fuse="mlp", verbose=False)
    fastlora.accelerate(fast, fuse="mlp", verbose=False)  # twice is once
    assert joined(fast) == {MLP}
    fastlora.restore(fast)
    assert {name: type(module) for name, module in fast.named_modules()} == before
    assert not any(GATED in module.__dict__ for module in fast.modules())


def test_names_are_checked() -> None:
    model = network("llama")
    with pytest.raises(ValueError, match="fuse must be None or \"mlp\", got 'all'"):
        fastlora.accelerate(model, fuse="all", verbose=False)  # type: ignore[arg-type]
    assert not any(fastlora.explain(model).rows[i].fast for i in range(2))


def test_explain_prints_a_line_for_each_kind() -> None:
    text = str(fastlora.explain(fused(network("llama"))))
    assert "fused: x2 model.layers.*.mlp: gate_proj + up_proj + down_proj" in text
    stock = network("llama")
    for layer in stock.base_model.model.model.layers:
        layer.mlp.act_fn = nn.ReLU()
    text = str(fastlora.explain(fused(stock)))
    what = "not fused: x2 model.layers.*.mlp: gate_proj, up_proj, down_proj"
    assert f"{what}: its activation is neither SiLU nor GELU" in text


def test_torch_compile_runs_each_layer_alone(nodes: Nodes) -> None:
    stock = network("llama")
    fast, inputs = fused(stock), torch.randint(0, VOCAB, (2, 7))
    mlp = fast.base_model.model.model.layers[0].mlp
    x = torch.randn(3, 32)
    want = mlp(x)
    nodes.take()
    compiled = torch.compile(mlp, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), want)
    assert nodes.take() == 0
    train_step(fast, inputs)
    assert nodes.take() == 2
