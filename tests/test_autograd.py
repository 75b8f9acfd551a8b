"""The differentiable layer against torch's autograd, and how it lives with the rest of torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import backends
from fastlora.autograd.dora import dora_linear
from fastlora.autograd.gated import gated_mlp
from fastlora.autograd.linear import linear
from fastlora.backends import native
from fastlora.layer import Layer
from tests.cases import (
    DTYPES,
    Base,
    Case,
    exact_results,
    is_refused,
    make_inputs,
    plain_results,
)
from tests.tolerance import assert_close_to_exact

NF4 = Base("nf4", 64, nested=True)
CASE = Case("", M=24, N=40, K=96, R=4)


def leaves(inputs):
    """x, bias, A and B as leaves that need gradients."""
    tensors = (inputs.x, inputs.bias, inputs.lora_A, inputs.lora_B)
    return [t.detach().clone().requires_grad_() for t in tensors]


def layer(inputs, x, bias, A, B, **options):
    options = {"compute_dtype": inputs.compute_dtype} | options
    return fastlora.lora_linear(
        x, inputs.weight, bias, A, B, inputs.scaling, quant_state=inputs.quant_state, **options
    )


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("base", [Base(), NF4], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_gradients(base: Base, dtypes: str, dropout_p: float) -> None:
    if is_refused(base, dtypes):
        pytest.skip("a dense weight is in x's dtype, or beside an fp32 x")
    case = Case("", M=24, N=40, K=96, R=4, dropout_p=dropout_p)
    inputs = make_inputs(case, base, DTYPES[dtypes])
    x, bias, A, B = leaves(inputs)
    y = layer(inputs, x.view(2, 12, 96), bias, A, B, dropout_p=dropout_p, seed=inputs.seed)
    assert y.shape == (2, 12, 40)
    y.backward(inputs.dy.view(2, 12, 40))
    exact, plain = exact_results(case, inputs), plain_results(case, inputs)
    got = {"y": y.view(24, 40), "dx": x.grad, "dA": A.grad, "dB": B.grad, "dbias": bias.grad}
    for name, out in got.items():
        assert out.dtype == getattr(plain, name).dtype, name
        assert_close_to_exact(out, getattr(exact, name), getattr(plain, name), what=name)


@pytest.mark.parametrize("base", [Base(), NF4], ids=str)
@pytest.mark.parametrize("asked", range(1, 16))
def test_only_what_requires_a_gradient_gets_one(base: Base, asked: int) -> None:
    inputs = make_inputs(CASE, base, DTYPES["fp32"])
    tensors = leaves(inputs)
    layer(inputs, *tensors).backward(inputs.dy)
    some = [t.detach().clone().requires_grad_(bool(asked >> i & 1)) for i, t in enumerate(tensors)]
    layer(inputs, *some).backward(inputs.dy)
    for full, part in zip(tensors, some, strict=True):
        assert (part.grad is not None) == part.requires_grad
        if part.grad is not None:
            assert torch.equal(part.grad, full.grad)


@pytest.mark.parametrize("shape", [(96,), (5, 96), (2, 3, 96), (2, 1, 3, 96), (0, 96), (2, 0, 96)])
def test_leading_shapes(shape: tuple[int, ...]) -> None:
    inputs = make_inputs(CASE, NF4, DTYPES["fp32"])
    x = torch.randn(shape, requires_grad=True)
    _, bias, A, B = leaves(inputs)
    y = layer(inputs, x, bias, A, B)
    assert y.shape == (*shape[:-1], 40)
    y.sum().backward()  # dy is an expanded scalar: strides of 0
    assert x.grad.shape == x.shape and A.grad.shape == A.shape
    if x.numel() == 0:
        assert not A.grad.any() and not B.grad.any() and not bias.grad.any()
    else:
        W = inputs.exact_weight().float()
        effective = W + inputs.scaling * B @ A
        torch.testing.assert_close(
            x.grad, (torch.ones_like(y) @ effective).view(shape), rtol=1e-4, atol=1e-4
        )


def test_transposed_input_and_gradient() -> None:
    inputs = make_inputs(CASE, NF4, DTYPES["bf16, fp32 adapter"])
    dense, spread = leaves(inputs), leaves(inputs)
    layer(inputs, *dense).backward(inputs.dy)
    columns = spread[0].detach().T.contiguous().T.requires_grad_()
    assert columns.stride(1) != 1
    y = layer(inputs, columns, *spread[1:])
    y.backward(inputs.dy.T.contiguous().T)
    assert torch.equal(columns.grad, dense[0].grad)
    for a, b in zip(dense[1:], spread[1:], strict=True):
        assert torch.equal(a.grad, b.grad)


def test_saves_x_and_S_but_no_mask_and_no_copy() -> None:
    """At most x itself and small tensors: nothing of x's size is made for the backward."""
    case = Case("", M=512, N=256, K=256, R=8, dropout_p=0.1)
    inputs = make_inputs(case, NF4, DTYPES["bf16, fp32 adapter"])
    x, bias, A, B = leaves(inputs)
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(inputs, x, bias, A, B, dropout_p=0.1)
    given = (x, A, B, inputs.weight, *(t for t in inputs.quant_state.tensors()))
    fresh = {p: n for p, n in saved.items() if p not in {t.data_ptr() for t in given}}
    assert x.data_ptr() in saved
    assert sum(fresh.values()) <= 512 * 8 * 4 + 64  # S in fp32 and the seed


def test_dropout_is_redrawn_in_training_and_off_in_eval() -> None:
    inputs = make_inputs(CASE, NF4, DTYPES["fp32"])
    x, bias, A, B = leaves(inputs)
    first = layer(inputs, x, bias, A, B, dropout_p=0.5)
    assert not torch.equal(first, layer(inputs, x, bias, A, B, dropout_p=0.5))
    torch.manual_seed(3)
    one = layer(inputs, x, bias, A, B, dropout_p=0.5)
    torch.manual_seed(3)
    assert torch.equal(one, layer(inputs, x, bias, A, B, dropout_p=0.5))
    off = layer(inputs, x, bias, A, B, dropout_p=0.5, training=False)
    assert torch.equal(off, layer(inputs, x, bias, A, B))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_replays_the_mask(reentrant: bool) -> None:
    inputs = make_inputs(CASE, NF4, DTYPES["fp32"])
    grads = []
    for use in (False, True):
        tensors = leaves(inputs)
        torch.manual_seed(11)

        def forward(*t):
            return layer(inputs, *t, dropout_p=0.3)

        y = checkpoint(forward, *tensors, use_reentrant=reentrant) if use else forward(*tensors)
        y.backward(inputs.dy)
        grads.append([t.grad for t in tensors])
    for plain, replayed in zip(*grads, strict=True):
        assert torch.equal(plain, replayed)


@pytest.mark.parametrize("base", [Base(), NF4], ids=str)
def test_autocast_casts_as_linear_does(base: Base) -> None:
    inputs = make_inputs(CASE, base, DTYPES["fp32"])
    tensors = leaves(inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(inputs, *tensors)
    assert y.dtype == torch.bfloat16
    y.backward(inputs.dy.bfloat16())  # outside of autocast, as trainers do
    low = make_inputs(CASE, base, DTYPES["bf16"])
    for t in ("x", "bias", "lora_A", "lora_B", "dy"):
        setattr(low, t, getattr(inputs, t).bfloat16())
    low.weight = inputs.weight if base.quant_type else inputs.weight.bfloat16()
    low.quant_state = inputs.quant_state
    exact, plain = exact_results(CASE, low), plain_results(CASE, low)
    assert_close_to_exact(y, exact.y, plain.y, what="y")
    for name, leaf in zip(("dx", "dbias", "dA", "dB"), tensors, strict=True):
        assert leaf.grad.dtype == torch.float32
        assert_close_to_exact(
            leaf.grad.bfloat16(), getattr(exact, name), getattr(plain, name), what=name
        )


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_backward_is_the_same_inside_autocast(backend: str) -> None:
    inputs = make_inputs(CASE, Base(), DTYPES["fp32"])
    grads = []
    for enabled in (False, True):
        tensors = leaves(inputs)
        y = layer(inputs, *tensors, backend=backend)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            y.backward(inputs.dy)
        grads.append([t.grad for t in tensors])
    for outside, inside in zip(*grads, strict=True):
        assert torch.equal(outside, inside)


def test_autocast_keeps_no_copy_of_the_weight() -> None:
    inputs = make_inputs(CASE, Base(), DTYPES["fp32"])
    saved: list[torch.Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with hooks, torch.autocast("cpu", dtype=torch.bfloat16):
        layer(inputs, *leaves(inputs))
    sized = [t for t in saved if t.shape == inputs.weight.shape]
    assert [t.data_ptr() for t in sized] == [inputs.weight.data_ptr()]


def test_no_graph_where_nothing_needs_a_gradient() -> None:
    inputs = make_inputs(CASE, NF4, DTYPES["fp32"])
    assert layer(inputs, inputs.x, inputs.bias, inputs.lora_A, inputs.lora_B).grad_fn is None
    x, bias, A, B = leaves(inputs)
    with torch.no_grad():
        assert layer(inputs, x, bias, A, B).grad_fn is None
    assert layer(inputs, x, bias, A, B).grad_fn is not None


def test_inputs_are_never_written() -> None:
    inputs = make_inputs(CASE, NF4, DTYPES["bf16, fp32 adapter"])
    tensors = leaves(inputs)
    versions = [t._version for t in (*tensors, inputs.weight, inputs.dy)]
    before = [t.detach().clone() for t in (*tensors, inputs.weight, inputs.dy)]
    layer(inputs, *tensors, dropout_p=0.1).backward(inputs.dy)
    after = (*tensors, inputs.weight, inputs.dy)
    assert versions == [t._version for t in after]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_trainable_weight_is_refused() -> None:
    inputs = make_inputs(CASE, Base(), DTYPES["fp32"])
    inputs.weight.requires_grad_()
    with pytest.raises(ValueError, match="weight must be frozen"):
        layer(inputs, *leaves(inputs))


@pytest.mark.skipif(native.build_info() is None, reason=str(native.unavailable_reason()))
@pytest.mark.parametrize("base", [Base(), NF4], ids=str)
def test_compiles_as_one_graph(base: Base) -> None:
    inputs = make_inputs(CASE, base, DTYPES["fp32"])
    eager, compiled = leaves(inputs), leaves(inputs)
    layer(inputs, *eager).backward(inputs.dy)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def forward(x, bias, A, B):
        return layer(inputs, x, bias, A, B)

    forward(*compiled).backward(inputs.dy)
    for a, b in zip(eager, compiled, strict=True):
        assert torch.equal(a.grad, b.grad)


def compiled_functions() -> dict[str, Callable[[Tensor, list[Layer]], Tensor]]:
    """The differentiable functions of a layer, each as one of x and layers."""
    return {
        "linear": lambda x, layers: linear(x, layers[0]),
        "gated": lambda x, layers: gated_mlp(x, *layers, "silu"),
        "dora": lambda x, layers: dora_linear(x, layers[0], torch.ones(40)),
    }


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("name", compiled_functions())
def test_the_first_call_of_a_kind_compiles(
    name: str, dropout_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also before any eager call has found out which backend serves such layers."""
    monkeypatch.setattr(backends, "_serving", {})
    layers = [
        Layer(
            torch.randn(N, K) / K**0.5,
            torch.randn(3, K, requires_grad=True),
            torch.randn(N, 3, requires_grad=True),
            0.5,
            dropout_p=dropout_p,
            seed=torch.tensor([7]),
        )
        for N, K in ((40, 24), (40, 24), (24, 40))
    ]
    x, function = torch.randn(5, 24), compiled_functions()[name]
    compiled = torch.compile(lambda x: function(x, layers), fullgraph=True, backend="aot_eager")
    got = compiled(x)
    got.sum().backward()
    grad, layers[0].lora_A.grad = layers[0].lora_A.grad, None
    want = function(x, layers)
    want.sum().backward()
    assert torch.equal(got, want) and torch.equal(grad, layers[0].lora_A.grad)


def test_a_seed_without_dropout_is_not_looked_at() -> None:
    inputs = make_inputs(CASE, Base(), DTYPES["fp32"])
    tensors = (inputs.x, inputs.weight, None, inputs.lora_A, inputs.lora_B, 1.0)
    elsewhere = torch.zeros(1, dtype=torch.int64, device="meta")
    want = fastlora.lora_linear(*tensors)
    for options in ({}, {"dropout_p": 0.5, "training": False}):
        assert torch.equal(fastlora.lora_linear(*tensors, seed=elsewhere, **options), want)


def test_no_name_is_no_backend() -> None:
    inputs = make_inputs(CASE, Base(), DTYPES["fp32"])
    tensors = (inputs.x, inputs.weight, None, inputs.lora_A, inputs.lora_B, 1.0)
    with pytest.raises(ValueError, match="backend must be one of"):
        fastlora.lora_linear(*tensors, backend="")
