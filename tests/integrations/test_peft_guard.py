"""Every case in which `fast_path` sends a call to PEFT's own code, one by one.

Each case starts from a layer for which the fast path holds, changes one thing, and wants the one
sentence that names it. A condition that is taken out of the guard fails its case here. The
changes stand in `layer_changes.py` and `tensor_changes.py`.

A layer keeps the answer of its latest call (`plan/kept.py`). So every test here runs twice: on a
layer that nobody has called, and on one that has been called before the change. `test_case` then
takes the change back, too.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import fastlora
from fastlora.integrations.peft import fast_path
from fastlora.integrations.peft.plan.call import Casts, Parts
from fastlora.integrations.peft.plan.casts import casts
from fastlora.integrations.peft.plan.parts import layer_parts
from fastlora.integrations.peft.plan.reasons import LAST_REASON
from tests.integrations import calls, layer_changes, tensor_changes
from tests.integrations.calls import Call, Case, bf16, dense, four_bit
from tests.integrations.layer_changes import alora, by_swift, harmlessly_hooked
from tests.integrations.tensor_changes import BF16_AUTOCAST

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
CASES = layer_changes.CASES + tensor_changes.CASES


@pytest.fixture(autouse=True, params=["first call", "later call"])
def called_before(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "CALL_FIRST", request.param == "later call")


def stock_forward(call: Call) -> Any:
    """PEFT's own forward, on the same layer."""
    return type(call.layer).__bases__[-1].forward(call.layer, call.x, *call.args, **call.kwargs)


def under_autocast(call: Call) -> Call:
    call.around = lambda: torch.autocast(**BF16_AUTOCAST)
    return call


def without_bias() -> Call:
    call = dense()
    call.base.bias = None
    return call


def fp32_bias_under_autocast() -> Call:
    call = bf16()
    call.base.bias.data = call.base.bias.data.float()
    return under_autocast(call)


HOLDS: dict[str, Case] = {
    "dense": dense,
    "bf16": bf16,
    "no bias": without_bias,
    "4-bit": four_bit,
    "4-bit nested": lambda: four_bit(nested=True),
    "device hook": lambda: harmlessly_hooked(),
    "ms-swift": lambda: by_swift(),
    "dense, autocast": lambda: under_autocast(bf16()),
    "dense, fp32 bias, autocast": fp32_bias_under_autocast,
    "4-bit, x in fp32, autocast": lambda: under_autocast(four_bit(compute_dtype=BF16)),
    "rank-stabilised": lambda: dense(use_rslora=True),
    "dropout": lambda: dense(lora_dropout=0.5),
    "aLoRA": alora,
}


@pytest.mark.parametrize("make", HOLDS.values(), ids=list(HOLDS))
def test_the_fast_path_holds(make: Case) -> None:
    call = make()
    with call.around():
        assert fast_path(call.layer, call.x) == (True, "")
        nothing = {"adapter_names": None, "alora_offsets": None}
        assert fast_path(call.layer, call.x, (), nothing) == (True, "")
        call.layer(call.x, **nothing).sum().backward()
    assert call.layer.__dict__[LAST_REASON] == ""


# ---- no adapter at work ------------------------------------------------------------------------


def disabled(call: Call) -> None:
    call.layer.enable_adapters(False)


def merged(call: Call) -> None:
    call.layer.merge()


def none_active(call: Call) -> None:
    call.layer.set_adapter([])


@pytest.mark.parametrize("make", [dense, bf16, lambda: four_bit(nested=True)])
@pytest.mark.parametrize("idle", [disabled, merged, none_active])
def test_the_base_product_alone(idle: Any, make: Case) -> None:
    """The bits of an adapter of zeros, and PEFT's result."""
    call = make()
    for weight in (call.A.weight, call.B.weight):
        weight.data.zero_()
    zeros = call.result()
    x = call.x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(call.layer(x).sum(), x)
    idle(call)
    assert fast_path(call.layer, call.x) == (True, "")
    y = call.result()
    (alone,) = torch.autograd.grad(call.layer(x).sum(), x)
    assert call.layer.__dict__[LAST_REASON] == ""
    torch.testing.assert_close(y, stock_forward(call).detach(), rtol=2e-2, atol=2e-2)
    if idle is not merged or type(call.base) is nn.Linear:  # 4 bits are quantised again
        assert torch.equal(y, zeros) and torch.equal(alone, dx)


def test_a_merged_layer_that_is_disabled() -> None:
    """PEFT takes the adapter out of it first."""
    call = dense()
    merged(call)
    disabled(call)
    assert fast_path(call.layer, call.x) == (False, "the adapters are disabled")
    torch.testing.assert_close(call.result(), call.base(call.x))
    assert not call.layer.merged and fast_path(call.layer, call.x) == (True, "")


def test_names_of_a_layer_whose_adapters_are_disabled() -> None:
    call = dense()
    disabled(call)
    names = {"adapter_names": ["default"] * len(call.x)}
    assert fast_path(call.layer, call.x, (), names) == (False, "the adapters are disabled")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "reason", "make"), CASES, ids=[name for name, _, _ in CASES])
def test_case(name: str, reason: str, make: Case) -> None:
    """The reason, from `fast_path` and in the layer; and PEFT's result, or PEFT's error."""
    call = make()
    with call.around():
        assert fast_path(call.layer, call.x, call.args, call.kwargs) == (False, reason)
        if call.stock_raises is not None:
            with pytest.raises(call.stock_raises):
                stock_forward(call)
            with pytest.raises(call.stock_raises):
                call.layer(call.x, *call.args, **call.kwargs)
        else:
            ours, theirs = call.layer(call.x, *call.args, **call.kwargs), stock_forward(call)
            pairs = [(ours, theirs)]
            if ours.is_nested:
                pairs = list(zip(ours.unbind(), theirs.unbind(), strict=True))
            for our, their in pairs:
                torch.testing.assert_close(our, their, rtol=0, atol=0)
        assert call.layer.__dict__[LAST_REASON] == reason
    if call.snapshot is not None:
        call = call.snapshot.restore()
        assert fast_path(call.layer, call.x) == (True, "")
        assert torch.equal(call.result(), call.first)
        assert call.layer.__dict__[LAST_REASON] == ""


@pytest.mark.filterwarnings("ignore")
def test_jit_trace() -> None:
    call = dense()
    traced = torch.jit.trace(call.layer, (call.x,), check_trace=False)
    reason = "torch.export or torch.jit.trace is recording a graph"
    assert call.layer.__dict__[LAST_REASON] == reason
    assert "fastlora::" not in str(traced.inlined_graph)
    x = torch.randn(3, 37)
    assert torch.equal(traced(x), stock_forward(Call(call.layer, x)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    """An exported program runs without fastlora."""
    call = dense()
    program = torch.export.export(call.layer, (call.x,), strict=strict)
    graphs = [m for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert not [target for target in targets if target.startswith("fastlora.")]
    assert "aten.linear.default" in targets
    torch.testing.assert_close(program.module()(call.x), stock_forward(call))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "name", "reason"),
    [
        (four_bit, "native", ""),
        (dense, "reference", "torch.compile does not trace the reference"),
        (alora, "native", "torch.compile does not trace which tokens aLoRA serves"),
    ],
    ids=["4-bit", "reference", "variant"],
)
def test_reasons_while_compiling(make: Case, name: str, reason: str) -> None:
    call = make()
    found = []

    def run(x: Tensor) -> Tensor:
        found.append(fast_path(call.layer, x)[1])
        return x + 1

    torch._dynamo.reset()
    with fastlora.use_backend(name):
        torch.compile(run, backend="eager", fullgraph=True)(call.x)
    assert found == [reason]


TRANSFORM = "the call is inside a torch.func transform (vmap, grad, jvp)"


def test_vmap() -> None:
    call = dense()
    ours = torch.func.vmap(call.layer)(call.x)
    assert call.layer.__dict__[LAST_REASON] == TRANSFORM
    torch.testing.assert_close(ours, stock_forward(call))


def test_functional_gradient() -> None:
    call = dense()

    def loss(x: Tensor) -> Tensor:
        return call.layer(x).square().sum()

    ours = torch.func.grad(loss)(call.x)
    assert call.layer.__dict__[LAST_REASON] == TRANSFORM
    x = call.x.clone().requires_grad_()
    stock_forward(Call(call.layer, x)).square().sum().backward()
    torch.testing.assert_close(ours, x.grad)


def test_forward_mode() -> None:
    call = dense()
    tangent = torch.randn_like(call.x)
    with forward_ad.dual_level():
        out = call.layer(forward_ad.make_dual(call.x, tangent))
        assert call.layer.__dict__[LAST_REASON] == "forward-mode AD is active"
        ours = forward_ad.unpack_dual(out).tangent
    x = stock_forward(Call(call.layer, tangent)) - stock_forward(Call(call.layer, 0 * tangent))
    torch.testing.assert_close(ours, x)
    call.layer(call.x)
    assert call.layer.__dict__[LAST_REASON] == ""


def test_functional_call() -> None:
    """Plain tensors in the place of parameters are no reason."""
    call = dense()
    values = {name: t.detach() * 2 for name, t in call.layer.state_dict().items()}
    ours = torch.func.functional_call(call.layer, values, (call.x,))
    assert call.layer.__dict__[LAST_REASON] == ""
    call.layer.load_state_dict(values)
    torch.testing.assert_close(ours, stock_forward(call))


def test_devices() -> None:
    """x, weight, bias, adapters and absmax have to be in one place; asked without a GPU."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    for make in (dense, four_bit):
        parts = layer_parts(make().layer)
        assert isinstance(parts, Parts)
        assert isinstance(casts(parts, FP32, cpu, None), Casts)
        reason = "x is on cuda:0 and the layer, or a part of it, on cpu"
        assert casts(parts, FP32, cuda, None) == reason
        reason = "x is on cpu and the layer, or a part of it, on meta"
        adapter = parts.adapters[0]
        moved = [parts._replace(**{n: getattr(parts, n).to("meta")}) for n in ("weight", "bias")]
        for name in ("lora_A", "lora_B", "bias", "magnitude"):
            other = adapter._replace(**{name: adapter.lora_A.to("meta")})
            moved.append(parts._replace(adapters=(adapter, other)))
        for elsewhere in moved:
            assert casts(elsewhere, FP32, cpu, None) == reason
    parts.quant_state.absmax = parts.quant_state.absmax.to("meta")
    assert casts(parts, FP32, cpu, None) == reason


def test_what_a_user_would_rather_know_is_said_once() -> None:
    call = four_bit(compute_dtype=FP16)
    with pytest.warns(UserWarning, match="own code: compute_dtype is float16") as record:
        for _ in range(3):
            with torch.autocast(**BF16_AUTOCAST):
                call.layer(call.x)
    assert len(record) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call.layer(call.x)
        call.layer.enable_adapters(False)
        call.layer(call.x)


DENSE, FOUR_BIT = None, BF16  # the compute_dtype of the product with the base weight


@pytest.mark.parametrize(
    ("base", "adapter", "x", "autocast", "expected"),
    [
        (DENSE, FP32, FP32, None, Casts(FP32, FP32, None)),
        (DENSE, BF16, FP32, None, Casts(FP32, FP32, None)),
        (FOUR_BIT, FP32, FP32, None, Casts(FP32, FP32, BF16)),
        (FOUR_BIT, FP32, BF16, None, Casts(BF16, FP32, BF16)),
        (FOUR_BIT, BF16, BF16, None, Casts(BF16, BF16, BF16)),
        (FOUR_BIT, FP16, BF16, None, Casts(BF16, FP32, BF16)),
        (FOUR_BIT, FP32, BF16, BF16, Casts(BF16, BF16, BF16)),
        (FOUR_BIT, FP32, FP32, BF16, Casts(FP32, FP32, BF16)),
        (FOUR_BIT, BF16, FP32, BF16, Casts(FP32, FP32, BF16)),
    ],
)
def test_dtype_policy(
    base: torch.dtype | None,
    adapter: torch.dtype,
    x: torch.dtype,
    autocast: torch.dtype | None,
    expected: Casts,
) -> None:
    call = dense() if base is None else four_bit(compute_dtype=base)
    call.A.to(adapter)
    call.B.to(adapter)
    parts = layer_parts(call.layer)
    assert isinstance(parts, Parts)
    assert casts(parts, x, torch.device("cpu"), autocast) == expected


@pytest.mark.parametrize("adapter", [FP32, BF16])
@pytest.mark.parametrize("x", [FP32, BF16])
def test_dtype_policy_of_dense_layers_under_autocast(x: torch.dtype, adapter: torch.dtype) -> None:
    call = bf16()
    call.A.to(adapter)
    call.B.to(adapter)
    parts = layer_parts(call.layer)
    assert isinstance(parts, Parts)
    assert casts(parts, x, torch.device("cpu"), BF16) == Casts(BF16, BF16, None)


def test_float64_compute_dtype() -> None:
    """bitsandbytes takes it, and returns memory that nobody wrote to."""
    parts = layer_parts(four_bit().layer)
    assert isinstance(parts, Parts)
    parts.base.compute_dtype = torch.float64  # type: ignore[assignment]
    reason = "compute_dtype is float64; fastlora takes fp32, bf16 and fp16"
    assert casts(parts, FP32, torch.device("cpu"), None) == reason


def test_autocast_that_is_off_is_none() -> None:
    call = four_bit(compute_dtype=FP16)
    with torch.autocast("cpu", dtype=BF16, enabled=False):
        assert fast_path(call.layer, call.x) == (True, "")
    with torch.autocast("cpu", dtype=BF16):
        assert not fast_path(call.layer, call.x)[0]
        with torch.autocast("cpu", enabled=False):
            assert fast_path(call.layer, call.x) == (True, "")


def test_no_fallback_on_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error inside the fast path reaches the caller; nothing hides it."""
    from fastlora.integrations.peft.run import linear

    def broken(*args: object, **kwargs: object) -> Tensor:
        raise RuntimeError("broken kernel")

    call = dense()
    monkeypatch.setattr(linear, "linear", broken)
    with pytest.raises(RuntimeError, match="broken kernel"):
        call.layer(call.x)


def test_a_layer_pickled_by_an_older_peft_has_fewer_attributes() -> None:
    call = dense()
    for name in ("lora_variant", "cast_input_dtype_enabled", "use_dora", "fan_in_fan_out"):
        del call.layer.__dict__[name]
    assert fast_path(call.layer, call.x) == (True, "")
