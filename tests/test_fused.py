"""Several linears of one input, and gated MLPs: the ops and the nodes against the definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastlora import backends, ops, reference
from fastlora.autograd import gated
from fastlora.autograd.gated import gated_mlp
from fastlora.autograd.linear import linear
from fastlora.backends.composed import Composed
from fastlora.backends.contract import Request
from fastlora.layer import Layer, Needs
from fastlora.reference import ACTIVATIONS
from tests.cases import DTYPES, Base, Case, exact_results, make_inputs, plain_results
from tests.conftest import poisoned_memory
from tests.tolerance import assert_close_to_exact

NF4 = Base("nf4", 64, nested=True)
FP64 = (torch.float64, torch.float64, None)
# Rows of W, ranks and dropout rates of layers with one x; "no dropout" shares what can be shared.
GROUPS = {
    "no dropout": ((33, 8, 0.0), (17, 7, 0.0), (80, 16, 0.0)),
    "each its dropout": ((48, 8, 0.1), (65, 8, 0.5), (31, 11, 1.0)),
    "some drop": ((130, 16, 0.0), (40, 9, 0.3), (40, 16, 0.0)),
    "one": ((50, 8, 0.1),),
}
# M and K: no token, decoding, one panel, several, K past a strip and a partial sum.
SIZES = ((0, 64), (1, 65), (8, 131), (17, 96), (129, 192), (260, 576))


@pytest.fixture(params=["native", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    if reason := backends.BACKENDS[request.param].unsupported(Request("lora_linear_fwd", "cpu")):
        pytest.skip(reason)
    return request.param


class Group:
    """Layers of one x, with what the single op's cases say of each."""

    def __init__(self, M: int, K: int, layers: Any, base: Base, dtypes: Any, strided: bool = False):
        self.cases = [
            Case("", M, N, K, R, dropout_p=p, bias=i != 1, strided=strided)
            for i, (N, R, p) in enumerate(layers)
        ]
        self.inputs = [make_inputs(case, base, dtypes) for case in self.cases]
        for i, inputs in enumerate(self.inputs):
            inputs.x = self.inputs[0].x
            inputs.seed = torch.tensor([100 + i])
        self.x = self.inputs[0].x
        self.dys = [inputs.dy for inputs in self.inputs]
        self.layers = [inputs.layer for inputs in self.inputs]

    def results(self, of: Any) -> dict[str, Tensor]:
        """What `exact_results` or `plain_results` says of each layer, dx summed."""
        each = [of(case, inputs) for case, inputs in zip(self.cases, self.inputs, strict=True)]
        out = {
            f"{name}{i}": t
            for i, results in enumerate(each)
            for name, t in results.items()
            if t is not None and name != "dx" and (name != "dbias" or self.cases[i].bias)
        }
        out["dx"] = each[0].dx
        for results in each[1:]:
            out["dx"] = out["dx"] + results.dx
        return out

    def run(self, module: Any, **options: Any) -> dict[str, Tensor | None]:
        ys, Ss = module.shared_linear_fwd(self.x, self.layers, **options)
        needs = [Needs(bias=p.bias is not None) for p in self.layers]
        dx, grads = module.shared_linear_bwd(self.dys, self.x, self.layers, Ss, needs, **options)
        out: dict[str, Tensor | None] = {"dx": dx}
        for i, (y, (own, dA, dB, dbias)) in enumerate(zip(ys, grads, strict=True)):
            assert own is None
            out |= {f"y{i}": y, f"dA{i}": dA, f"dB{i}": dB, f"dbias{i}": dbias}
        return out


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("base", [Base(), Base(transposed=True), NF4], ids=str)
@pytest.mark.parametrize("layers", GROUPS, ids=str)
def test_against_definition(layers: str, base: Base, dtypes: str, backend: str) -> None:
    if base.quant_type is None and DTYPES[dtypes][2] is not None:
        pytest.skip("a dense weight has no compute dtype of its own")
    # A third of the sizes for each dtype: every size meets every group and base.
    for M, K in SIZES[list(DTYPES).index(dtypes) % 3 :: 3]:
        group = Group(M, K, GROUPS[layers], base, DTYPES[dtypes], strided=M == 17)
        exact, plain = group.results(exact_results), group.results(plain_results)
        with poisoned_memory():
            got = group.run(ops, backend=backend)
        for name, want in exact.items():
            assert_close_to_exact(got[name], want, plain[name], what=f"{name}, M={M}, K={K}")


def test_weights_stored_in_every_order(backend: str) -> None:
    group = Group(21, 100, GROUPS["some drop"], Base(), DTYPES["bf16, fp32 adapter"])
    *_, second, last = group.layers
    spread = second.weight.repeat_interleave(2, dim=1)[:, ::2]
    group.layers[-2:] = [
        second._replace(weight=spread),
        last._replace(weight=last.weight.T.contiguous().T),
    ]
    exact, plain = group.results(exact_results), group.results(plain_results)
    got = group.run(ops, backend=backend)
    for name, want in exact.items():
        assert_close_to_exact(got[name], want, plain[name], what=name)


@pytest.mark.parametrize("base", [Base(), NF4], ids=str)
def test_single_ops_in_a_row(base: Base) -> None:
    """What serves backends without an op of their own."""
    group = Group(21, 100, GROUPS["some drop"], base, DTYPES["bf16, fp32 adapter"])
    exact, plain = group.results(exact_results), group.results(plain_results)

    got = group.run(Composed())
    for name, want in exact.items():
        assert_close_to_exact(got[name], want, plain[name], what=name)


@pytest.mark.parametrize("base", [Base(), NF4], ids=str)
def test_computes_only_what_is_needed(base: Base, backend: str) -> None:
    group = Group(21, 100, GROUPS["some drop"], base, DTYPES["bf16, fp32 adapter"])
    everything = group.run(ops, backend=backend)
    _, Ss = ops.shared_linear_fwd(group.x, group.layers, backend=backend)
    for need_dx in (False, True):
        asked = ((True, False, False), (False, True, False), (False, False, True))
        needs = [Needs(need_dx, *flags) for flags in asked]
        dys = [group.dys[0], None, group.dys[2]]
        dx, grads = ops.shared_linear_bwd(dys, group.x, group.layers, Ss, needs, backend=backend)
        assert (dx is not None) == need_dx
        assert all(own.x is None for own in grads)
        got = [t for own in grads for t in own[1:]]
        for i, need in enumerate((1, 0, 0, 0, 0, 0, 0, 0, 1)):
            name = f"{('dA', 'dB', 'dbias')[i % 3]}{i // 3}"
            if need:
                assert torch.equal(got[i], everything[name]), name
            else:
                assert got[i] is None, name
        if dx is not None:  # without dy_1 the sum has two terms
            del group.cases[1], group.inputs[1]
            exact, plain = group.results(exact_results), group.results(plain_results)
            assert_close_to_exact(dx, exact["dx"], plain["dx"], what="dx")


def test_same_call_same_bits() -> None:
    group = Group(200, 700, GROUPS["some drop"], NF4, DTYPES["bf16, fp32 adapter"])
    first = group.run(ops)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            again = group.run(ops)
            for name, t in first.items():
                assert t is None or torch.equal(t, again[name]), (name, count)
    finally:
        torch.set_num_threads(threads)


def test_checks() -> None:
    group = Group(5, 64, GROUPS["some drop"], Base(), DTYPES["bf16, fp32 adapter"])
    packed = Group(5, 64, GROUPS["one"], NF4, DTYPES["bf16, fp32 adapter"])
    x, (first, *rest) = group.x, group.layers
    with pytest.raises(ValueError, match="at least one linear, got none"):
        ops.shared_linear_fwd(x, [])
    with pytest.raises(ValueError, match="all dense or all 4-bit, got both"):
        ops.shared_linear_fwd(x, [first, *packed.layers])
    with pytest.raises(ValueError, match="lora_A must be"):
        ops.shared_linear_fwd(x, [first, rest[0]._replace(lora_A=rest[0].lora_A[:, 1:])])
    narrow = rest[0]._replace(lora_A=rest[0].lora_A.bfloat16(), lora_B=rest[0].lora_B.bfloat16())
    with pytest.raises(TypeError, match="adapter_dtype must be the same in all layers"):
        ops.shared_linear_fwd(x, [first, narrow])
    _, Ss = ops.shared_linear_fwd(x, group.layers)
    with pytest.raises(ValueError, match="Ss must have 3 entries"):
        ops.shared_linear_bwd(group.dys, x, group.layers, Ss[:2], [Needs()] * 3)
    with pytest.raises(ValueError, match="needs must have the same x in all layers"):
        ops.shared_linear_bwd(group.dys, x, group.layers, Ss, [Needs(), Needs(), Needs(x=False)])
    frozen = mlp_of(Base(), DTYPES["fp32"], 0.0)
    frozen.layers[1] = frozen.layers[1]._replace(weight=frozen.layers[1].weight.requires_grad_())
    with pytest.raises(ValueError, match="weight must be frozen"):
        gated_mlp(frozen.x, *frozen.layers, "silu")


# ---- the nodes ---------------------------------------------------------------------------------


def trained(layer: Layer, bias: bool = True) -> tuple[Layer, list[Tensor]]:
    """`layer` around fresh leaves, and these."""
    own = {"lora_A": layer.lora_A, "lora_B": layer.lora_B}
    if layer.bias is not None and bias:
        own["bias"] = layer.bias
    own = {name: t.detach().clone().requires_grad_() for name, t in own.items()}
    return layer._replace(**own), list(own.values())


def mlp_of(base: Base, dtypes: Any, p: float, M: int = 9, K: int = 35, H: int = 70) -> Group:
    """gate, up [H, K] and down [K, H]; down's x is made later."""
    outer = Group(M, K, ((H, 3, p), (H, 4, p)), base, dtypes)
    outer.layers += Group(M, H, ((K, 2, p),), base, dtypes).layers
    return outer


@pytest.mark.parametrize("base", [Base(), NF4], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_mlp_gradcheck(base: Base, activation: str) -> None:
    group = mlp_of(base, FP64, 0.2, M=3, K=5, H=6)
    x = group.x.clone().requires_grad_()
    pairs = [trained(p) for p in group.layers]
    leaves = [x, *(leaf for _, own in pairs for leaf in own)]

    def mlp(*_: Tensor) -> Tensor:
        return gated_mlp(x, *(p for p, _ in pairs), activation, backend="reference")

    assert torch.autograd.gradcheck(mlp, leaves, fast_mode=True)


def plain_mlp(x: Tensor, layers: list[Layer], activation: str) -> Tensor:
    """PEFT's sequence of torch operations in the working dtypes."""
    return reference.plain.gated_mlp(x, *layers, activation)


@pytest.mark.parametrize("dtypes", ["fp32", "bf16, fp32 adapter", "bf16", "fp16, fp32 adapter"])
@pytest.mark.parametrize("base", [Base(), NF4], ids=str)
@pytest.mark.parametrize(
    ("activation", "p"), [("silu", 0.0), ("silu", 0.2), ("gelu", 0.2), ("gelu_tanh", 0.0)]
)
def test_gated_mlp(activation: str, p: float, base: Base, dtypes: str, backend: str) -> None:
    # A few large activations dominate the largest error of one draw: four draws count alike.
    draws = [mlp_of(base, DTYPES[dtypes], p, M=40) for _ in range(4)]
    dys = [torch.randn_like(group.x) for group in draws]

    def run(function: Any, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        each = [
            mlp_results(function, group, dy, dtype) for group, dy in zip(draws, dys, strict=True)
        ]
        return {name: torch.stack([results[name] for results in each]) for name in each[0]}

    with poisoned_memory():
        got = run(lambda x, ps: gated_mlp(x, *ps, activation, backend=backend))
    exact = run(lambda x, ps: plain_mlp(x, ps, activation), torch.float64)
    plain = run(lambda x, ps: plain_mlp(x, ps, activation))
    for name, out in got.items():
        assert out.dtype == plain[name].dtype, name
        each = exact[name].flatten(1).abs().amax(1).log2().ceil().exp2()  # exact to divide by
        scale = each.view(-1, *[1] * (out.dim() - 1))
        out, base = ((t / scale).to(t.dtype) for t in (out, plain[name]))
        assert_close_to_exact(out, exact[name] / scale, base, what=name)


def mlp_results(
    function: Any, group: Group, dy: Tensor, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """y and all gradients of `function(x, layers)`, in the working dtypes or in `dtype`."""
    x = group.x.to(dtype or group.x.dtype, copy=True).requires_grad_()
    layers, named = [], {"dx": x}
    for i, layer in enumerate(group.layers):
        if dtype is not None:
            fields = {n: getattr(layer, n) for n in ("bias", "lora_A", "lora_B")}
            wide = {n: None if t is None else t.to(dtype) for n, t in fields.items()}
            layer = layer._replace(compute_dtype=None, **wide)
            if layer.quant_state is None:
                layer = layer._replace(weight=layer.weight.to(dtype))
        layer, own = trained(layer)
        layers.append(layer)
        named |= {f"{i}.{j}": leaf for j, leaf in enumerate(own)}
    y = function(x, layers)
    y.backward(dy.to(y.dtype))
    return {"y": y.detach()} | {name: leaf.grad for name, leaf in named.items()}


def saved_bytes(make: Any) -> int:
    """Bytes of the distinct memory that the graph of `make()` keeps, parameters left out."""
    seen: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        make()
    return sum(seen.values())


def test_what_is_saved() -> None:
    """x once, S, and for an MLP the outputs of gate and up: nothing else that grows with M."""
    M, K, H = 512, 64, 96
    group = mlp_of(NF4, DTYPES["bf16, fp32 adapter"], 0.1, M=M, K=K, H=H)
    pairs = [trained(p) for p in group.layers]
    layers = [p for p, _ in pairs]
    x = group.x.clone().requires_grad_()
    fixed = sum(
        t.untyped_storage().nbytes()
        for p in layers
        for t in (p.weight, p.bias, p.lora_A, p.lora_B, p.seed, *p.quant_state.tensors())
        if t is not None
    )
    S = M * 4 * sum(p.lora_A.shape[0] for p in layers)
    both = saved_bytes(lambda: gated_mlp(x, *layers, "silu"))
    assert both <= fixed + S + 2 * M * (K + 2 * H)


def test_frozen_gate_and_up_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only down trains, and x needs nothing: no gradient of h is taken."""
    group = mlp_of(NF4, DTYPES["fp32"], 0.0)
    down, own = trained(group.layers[2])
    calls: list[bool] = []
    backward = ops.shared_linear_bwd

    def spy(dys: Any, x: Any, layers: Any, Ss: Any, needs: Any, **options: Any):
        calls.append(needs[0].x)
        return backward(dys, x, layers, Ss, needs, **options)

    monkeypatch.setattr(gated.ops, "shared_linear_bwd", spy)
    gated_mlp(group.x, *group.layers[:2], down, "silu").sum().backward()
    assert calls == [False] and all(leaf.grad.any() for leaf in own)


def test_no_gradient_no_node() -> None:
    group = mlp_of(NF4, DTYPES["fp32"], 0.0)
    pairs = [trained(p) for p in group.layers]
    layers = [p for p, _ in pairs]
    x = group.x.view(3, 3, 35)
    want = gated_mlp(x, *layers, "gelu")
    assert want.shape == (3, 3, 35) and isinstance(want.grad_fn, torch.autograd.graph.Node)
    with torch.no_grad():
        got = gated_mlp(x, *layers, "gelu")
    assert torch.equal(got, want) and got.grad_fn is None


@pytest.mark.parametrize("constant", [False, True])
def test_an_mlp_is_differentiated_twice(constant: bool) -> None:
    """Also where the first dy has no graph, as with a frozen linear head behind the MLP."""
    group = mlp_of(Base(), DTYPES["fp32"], 0.1)

    def mlp(joined: bool) -> list[Tensor]:
        pairs = [trained(p) for p in group.layers]
        layers = [p for p, _ in pairs]
        x = group.x.clone().requires_grad_()
        if joined:
            y = gated_mlp(x, *layers, "silu")
        else:
            gate, up = (linear(x, p, backend="reference") for p in layers[:2])
            y = linear(F.silu(gate) * up, layers[2], backend="reference")
        loss = y.sum() if constant else y.sin().sum()
        (dx,) = torch.autograd.grad(loss, x, create_graph=True)
        tensors = [x, *(t for p in layers for t in (p.lora_A, p.lora_B, p.bias) if t is not None)]
        grads = torch.autograd.grad((dx.norm(dim=1) - 1).square().sum(), tensors, allow_unused=True)
        return [torch.zeros(()) if t is None else t for t in grads]

    for got, want in zip(mlp(True), mlp(False), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5 * float(want.abs().max() + 1))
