"""The answer that a layer keeps of its latest call, and all that must not escape it.

Each change starts from a layer that has been called. After it, the layer has to compute what a copy
of it computes, which has kept nothing; and what it computed before once the change is taken back.
Changes that send the call to PEFT's own code are in test_peft_guard.py.
"""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import fastlora
from fastlora.integrations.peft.plan import plan as plan_module
from fastlora.integrations.peft.plan.kept import KEPT, Kept
from fastlora.integrations.peft.plan.reasons import LAST_REASON
from tests.integrations import calls
from tests.integrations.calls import Call, begun, bf16, dense, four_bit
from tests.integrations.models import fill_adapters, linear4bit, lora_layers, peft_model

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def call_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "CALL_FIRST", True)


class Turned(nn.Module):
    """A layer that stores its weight as [K, N]."""

    def __init__(self) -> None:
        super().__init__()
        self.up = Conv1D(53, 37)


def conv1d() -> Call:
    model = peft_model(Turned(), target_modules=["up"], fan_in_fan_out=True).train()
    fastlora.accelerate(model, verbose=False)
    return begun(Call(lora_layers(model)[0], torch.randn(2, 5, 37)))


def nested() -> Call:
    return four_bit(nested=True)


def dropping() -> Call:
    return dense(lora_dropout=0.5)


def two_adapters() -> Call:
    model = peft_model(calls.MLP())
    model.add_adapter("other", LoraConfig(r=5, target_modules=["up"]))
    fill_adapters(model)
    fastlora.accelerate(model, verbose=False)
    return begun(Call(lora_layers(model)[0], torch.randn(2, 5, 37)))


# ---- changes -------------------------------------------------------------------------------------

Change = Callable[[Call], object]
CHANGES: list[tuple[str, Callable[[], Call], Change]] = []


def change(make: Callable[[], Call]) -> Callable[[Change], Change]:
    """Registers a change of the call that `make` gives, under the name of both."""

    def register(function: Change) -> Change:
        CHANGES.append((f"{function.__name__} of {make.__name__}", make, function))
        return function

    return register


def for_each(*makes: Callable[[], Call]) -> Callable[[Change], Change]:
    def register(function: Change) -> Change:
        for make in makes:
            change(make)(function)
        return function

    return register


EVERY = (dense, bf16, conv1d, four_bit, nested)


@for_each(*EVERY)
def A_in_place(call: Call) -> None:
    call.A.weight.data.mul_(2)


@for_each(*EVERY)
def data_of_B(call: Call) -> None:
    call.B.weight.data = call.B.weight.data + 1


@for_each(*EVERY)
def A_exchanged(call: Call) -> None:
    call.A.weight = nn.Parameter(call.A.weight.detach() * 2)


@for_each(*EVERY)
def another_A_and_B(call: Call) -> None:
    """Of another rank."""
    like = call.A.weight
    N, K = call.layer.out_features, call.layer.in_features
    call.layer.lora_A["default"] = nn.Linear(K, 6, bias=False, dtype=like.dtype)
    call.layer.lora_B["default"] = nn.Linear(6, N, bias=False, dtype=like.dtype)


@for_each(*EVERY)
def adapters_in_bf16(call: Call) -> None:
    call.A.to(BF16)
    call.B.to(BF16)


@for_each(*EVERY)
def scaling(call: Call) -> None:
    call.layer.set_scale("default", 3)


@for_each(*EVERY)
def scaling_as_an_int(call: Call) -> None:
    call.layer.scaling["default"] = 2


@for_each(*EVERY)
def bias_of_lora_B(call: Call) -> None:
    call.B.bias = nn.Parameter(torch.randn(call.layer.out_features))


@for_each(*EVERY)
def bias_in_place(call: Call) -> None:
    call.base.bias.data.add_(1)


@for_each(dense, bf16, four_bit, nested)
def no_bias(call: Call) -> None:
    call.base.bias = None


@for_each(*EVERY)
def dropout_module(call: Call) -> None:
    call.layer.lora_dropout["default"] = nn.Dropout(0.5)


@for_each(*EVERY)
def autocast(call: Call) -> None:
    call.around = lambda: torch.autocast("cpu", dtype=BF16)


@for_each(*EVERY)
def autocast_to_fp16(call: Call) -> None:
    call.around = lambda: torch.autocast("cpu", dtype=FP16)


@for_each(*EVERY)
def no_gradients(call: Call) -> None:
    call.around = torch.no_grad


@for_each(*EVERY)
def inference_mode(call: Call) -> None:
    call.around = torch.inference_mode


@for_each(*EVERY)
def x_of_another_shape(call: Call) -> None:
    call.x = torch.randn(3, call.x.shape[-1]).to(call.x.dtype)


@for_each(*EVERY)
def x_that_is_a_parameter(call: Call) -> None:
    call.x = nn.Parameter(call.x)


@for_each(dense, bf16, conv1d)
def data_of_the_weight(call: Call) -> None:
    call.base.weight.data = call.base.weight.data * 2


@for_each(dense, bf16, conv1d)
def weight_exchanged(call: Call) -> None:
    call.base.weight = nn.Parameter(call.base.weight.detach() * 2, requires_grad=False)


@for_each(dense, conv1d)
def all_in_bf16(call: Call) -> None:
    call.layer.to(BF16)
    call.x = call.x.to(BF16)


@change(dense)
def another_base_layer(call: Call) -> None:
    call.layer.base_layer = nn.Linear(37, 53).requires_grad_(False)


@change(dense)
def weight_that_is_a_plain_tensor(call: Call) -> None:
    call.base._parameters["weight"] = call.base.weight.detach() * 2


@for_each(dense, four_bit)
def weight_of_another_width(call: Call) -> None:
    K = call.layer.in_features + 1
    call.layer.base_layer = nn.Linear(K, call.layer.out_features).requires_grad_(False)
    call.layer.lora_A["default"] = nn.Linear(K, 3, bias=False)
    call.layer.in_features = K
    call.x = torch.randn(4, K)


@change(dropping)
def rate(call: Call) -> None:
    call.layer.lora_dropout["default"].p = 0.25


@change(dropping)
def eval_mode(call: Call) -> None:
    call.layer.eval()


@change(two_adapters)
def adapter_switched(call: Call) -> None:
    call.layer.set_adapter("other")


@change(two_adapters)
def second_adapter(call: Call) -> None:
    call.layer.set_adapter(["default", "other"])


@change(two_adapters)
def active_adapters_in_place(call: Call) -> None:
    call.layer.set_adapter(["default"])
    call.layer(call.x)
    call.layer.active_adapters[0] = "other"


@change(two_adapters)
def active_adapters_longer_in_place(call: Call) -> None:
    call.layer.set_adapter(["default"])
    call.layer(call.x)
    call.layer.active_adapters.append("other")


@for_each(four_bit, nested)
def bytes_of_the_weight(call: Call) -> None:
    call.base.weight.data = call.base.weight.data.flip(0)


@for_each(four_bit, nested)
def absmax_in_place(call: Call) -> None:
    state = call.base.weight.quant_state
    state.absmax.copy_(state.absmax.flip(0))


@for_each(four_bit, nested)
def absmax_exchanged(call: Call) -> None:
    state = call.base.weight.quant_state
    state.absmax = state.absmax.flip(0)


@change(nested)
def absmax_no_longer_nested(call: Call) -> None:
    state = call.base.weight.quant_state
    state.absmax = torch.rand(state.absmax.numel())
    state.state2 = state.offset = None
    state.nested = False


@change(nested)
def offset(call: Call) -> None:
    call.base.weight.quant_state.offset = torch.tensor(0.5)


@change(nested)
def absmax_of_absmax(call: Call) -> None:
    inner = call.base.weight.quant_state.state2
    inner.absmax = inner.absmax * 2


@for_each(four_bit, nested)
def code(call: Call) -> None:
    state = call.base.weight.quant_state
    state.code = state.code * 2


@for_each(four_bit, nested)
def quant_type(call: Call) -> None:
    state = call.base.weight.quant_state
    state.quant_type = "fp4"
    state.code = linear4bit(64, 64, quant_type="fp4").weight.quant_state.code


@for_each(four_bit, nested)
def another_quant_state(call: Call) -> None:
    call.layer.base_layer = linear4bit(64, 128, nested=True, quant_type="fp4")


@for_each(four_bit, nested)
def dense_base(call: Call) -> None:
    call.layer.base_layer = nn.Linear(64, 128).requires_grad_(False)


@for_each(four_bit, nested)
def compute_dtype(call: Call) -> None:
    call.base.compute_dtype = BF16


@for_each(four_bit, nested)
def compute_dtype_of_the_next_input(call: Call) -> None:
    call.base.compute_dtype, call.base.compute_type_is_set = None, False
    call.x = call.x.to(BF16)


@for_each(four_bit, nested)
def x_in_bf16(call: Call) -> None:
    call.x = call.x.to(BF16)


@for_each(four_bit, nested)
def weight_as_FSDP_leaves_it(call: Call) -> None:
    """A plain parameter, and the state in the module."""
    weight = call.base.weight
    call.base.quant_state = weight.quant_state
    plain = nn.Parameter(weight.data.as_subclass(Tensor).flip(0), requires_grad=False)
    call.base._parameters["weight"] = plain


def step(call: Call) -> dict[str, Tensor | None]:
    """A result and, where there are any, the gradients."""
    call.layer.zero_grad()
    torch.manual_seed(0)
    with call.around():
        y = call.layer(call.x)
    if y.requires_grad:
        y.float().square().sum().backward()
    return {"y": y.detach(), **{name: p.grad for name, p in call.layer.named_parameters()}}


def assert_same(ours: dict[str, Tensor | None], theirs: dict[str, Tensor | None]) -> None:
    assert ours.keys() == theirs.keys()
    for name, our in ours.items():
        their = theirs[name]
        if our is None or their is None:
            assert our is their, name
        else:
            torch.testing.assert_close(our, their, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize(("make", "alter"), [c[1:] for c in CHANGES], ids=[c[0] for c in CHANGES])
def test_a_change_is_seen(make: Callable[[], Call], alter: Change) -> None:
    call = make()
    assert isinstance(call.layer.__dict__[KEPT], Kept)
    assert call.snapshot is not None and call.first is not None
    snapshot, first = call.snapshot, call.first
    alter(call)
    copied = replace(call, layer=copy.deepcopy(call.layer))
    assert copied.layer.__dict__[KEPT] is None
    for _ in range(2):
        ours, anew = step(call), step(copied)
        copied.layer.__dict__[KEPT] = None
        assert_same(ours, anew)
        assert call.layer.__dict__[LAST_REASON] == copied.layer.__dict__[LAST_REASON]
    assert torch.equal(snapshot.restore().result(), first)


# ---- what is kept --------------------------------------------------------------------------------


@pytest.mark.parametrize("make", EVERY)
def test_a_layer_is_asked_once(make: Callable[[], Call], monkeypatch: pytest.MonkeyPatch) -> None:
    call = make()
    asked, ask = [], plan_module.layer_parts

    def counted(layer: Any, *rest: Any) -> Any:
        asked.append(layer)
        return ask(layer, *rest)

    monkeypatch.setattr(plan_module, "layer_parts", counted)
    call.layer(call.x)
    call.A.weight.data = call.A.weight.data * 2
    call.layer.eval()
    call.layer(call.x[:1])
    assert not asked
    adapters_in_bf16(call)
    call.layer(call.x)
    call.layer(call.x)
    assert len(asked) == 1


@pytest.mark.parametrize("make", EVERY)
def test_nothing_is_kept_alive(make: Callable[[], Call]) -> None:
    call = make()
    call.snapshot = None
    held = [call.base, call.base.weight, call.A, call.A.weight, call.layer.lora_dropout["default"]]
    state = getattr(call.base.weight, "quant_state", None)
    if state is not None:
        held += [state, state.absmax, state.code]
    refs = [weakref.ref(each) for each in held]
    held.clear()
    del state
    call.layer.base_layer = nn.Linear(1, 1)
    call.layer.lora_A["default"] = nn.Linear(1, 1)
    call.layer.lora_dropout["default"] = nn.Identity()
    gc.collect()
    assert [ref() for ref in refs] == [None] * len(refs)


@pytest.mark.parametrize("make", EVERY)
def test_copies_pickles_and_state_dicts_are_without_it(make: Callable[[], Call]) -> None:
    call = make()
    assert not [name for name in call.layer.state_dict() if "fastlora" in name]
    for again in (copy.deepcopy(call.layer), copy.copy(call.layer)):
        assert again.__dict__[KEPT] is None or again.__dict__[KEPT] is call.layer.__dict__[KEPT]
    pickled = pickle.dumps(call.layer)
    assert b"plan.kept" not in pickled
    assert pickle.loads(pickled).__dict__[KEPT] is None


def test_restore_drops_it() -> None:
    model = fastlora.accelerate(peft_model(calls.MLP()), verbose=False)
    model(torch.randn(2, 37))
    layers = lora_layers(model)
    assert all(isinstance(layer.__dict__[KEPT], Kept) for layer in layers)
    fastlora.restore(model)
    assert not any(name.startswith("_fastlora") for layer in layers for name in layer.__dict__)


def test_use_backend_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastlora.autograd import common

    call, asked = dense(), []
    forced = common.forced_backend
    monkeypatch.setattr(common, "forced_backend", lambda b: asked.append(forced(b)) or asked[-1])
    for name in ("native", "reference"):
        with fastlora.use_backend(name):
            call.layer(call.x)
    assert asked == ["native", "reference"]


def test_an_answer_for_a_forced_backend_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastlora.backends import native

    monkeypatch.setattr(calls, "CALL_FIRST", False)
    call = dense()
    monkeypatch.setattr(native, "unsupported", lambda *_, **__: "no such kernel.")
    with fastlora.use_backend("reference"):
        call.layer(call.x)
        call.layer(call.x)
    assert KEPT not in call.layer.__dict__


@pytest.mark.filterwarnings("ignore")
def test_torch_compile_does_not_look_at_it() -> None:
    from torch._dynamo.testing import CompileCounter

    call = dense()
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(call.layer, backend=counter, fullgraph=True)
    first = compiled(call.x)
    for around in (torch.no_grad, lambda: torch.autocast("cpu", dtype=BF16)):
        with around():
            call.layer(call.x)
        assert torch.equal(compiled(call.x), first)
    call.layer.__dict__[KEPT] = None
    assert torch.equal(compiled(call.x), first)
    assert counter.frame_count == 1
