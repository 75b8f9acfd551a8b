"""Every case in which `fast_path` sends a call to PEFT's own code, one by one.

Each case starts from a layer for which the fast path holds, changes one thing, and wants the one
sentence that names it. A condition that is taken out of the guard fails its case here.

A layer keeps the answer of its latest call (`plan/kept.py`). So every test here runs twice: on a
layer that nobody has called, and on one that has been called before the change. `test_case` then
takes the change back, too.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu, has_avx512bf16
from peft import LoraConfig
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor, nn
from torch.autograd import forward_ad

import fastlora
from fastlora.integrations.peft import fast_path
from fastlora.integrations.peft.plan.call import Casts, Parts
from fastlora.integrations.peft.plan.casts import casts
from fastlora.integrations.peft.plan.parts import layer_parts
from fastlora.integrations.peft.plan.reasons import LAST_REASON
from tests.integrations import calls
from tests.integrations.calls import Call, bf16, dense, four_bit
from tests.integrations.models import MLP, MLP4bit, fill_adapters, lora_layers, peft_model

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
BF16_AUTOCAST: dict[str, Any] = {"device_type": "cpu", "dtype": BF16}


class MyTensor(Tensor):
    """A tensor subclass that changes nothing."""


class MyDropout(nn.Dropout):
    pass


class MyMagnitude(DoraLinearLayer):
    pass


class MyLinear(nn.Linear):
    pass


@pytest.fixture(autouse=True, params=["first call", "later call"])
def called_before(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "CALL_FIRST", request.param == "later call")


# ---- the cases -----------------------------------------------------------------------------------

Case = Callable[[], Call]
CASES: list[tuple[str, str, Case]] = []


def case(reason: str) -> Callable[[Case], Case]:
    """Registers a case under its function's name: it makes a call that gets this reason."""

    def register(function: Case) -> Case:
        CASES.append((function.__name__, reason, function))
        return function

    return register


# the call's other arguments


@case("the call has further positional arguments")
def positional_arguments() -> Call:
    call = dense()
    call.args, call.stock_raises = (1,), TypeError
    return call


@case("the call passes adapter_names with dropout in training")
def adapter_names_with_dropout() -> Call:
    call = dense(lora_dropout=1e-9)
    call.kwargs = {"adapter_names": ["default", "__base__"]}
    return call


@case("adapter_names has 3 names for an x of shape (2, 5, 37)")
def too_many_adapter_names() -> Call:
    call = dense()
    call.kwargs, call.stock_raises = {"adapter_names": ["default"] * 3}, ValueError
    return call


@case("the call passes adapter_names for a DoRA adapter, which PEFT refuses")
def adapter_names_with_dora() -> Call:
    call = dense(use_dora=True)
    call.kwargs, call.stock_raises = {"adapter_names": ["default", "__base__"]}, ValueError
    return call


@case("alora_offsets has 1 entries for an x of shape (2, 5, 37)")
def too_few_offsets() -> Call:
    call = alora()
    call.kwargs, call.stock_raises = {"alora_offsets": [1]}, IndexError
    return call


@case("alora_offsets is no list of ints and None")
def offsets_as_a_tensor() -> Call:
    call = alora()
    call.kwargs = {"alora_offsets": torch.tensor([1, 0])}
    return call


@case("aLoRA takes x [rows, tokens, 37], got (2, 3, 5, 37)")
def alora_of_images() -> Call:
    call = alora()
    call.x = torch.randn(2, 3, 5, 37)
    call.kwargs, call.stock_raises = {"alora_offsets": [1, 0]}, IndexError
    return call


@case("the call passes scale")
def unknown_keyword() -> Call:
    call = dense()
    call.kwargs, call.stock_raises = {"scale": None}, TypeError
    return call


# the state of the layer


@case("the adapters are disabled")
def disabled() -> Call:
    call = dense()
    call.layer.enable_adapters(False)
    return call


@case("the adapter is merged into the base weight")
def merged() -> Call:
    call = dense()
    call.layer.merge()
    return call


@case("PEFT's cast of the input to the adapter's dtype is switched off")
def input_casting_disabled() -> Call:
    call = dense()
    call.around = lambda: disable_input_dtype_casting(call.layer)
    return call


@case("PEFT's cast of the input to the adapter's dtype is switched off")
def input_casting_replaced() -> Call:
    call = dense()
    call.layer._cast_input_dtype = lambda x, dtype: x
    return call


@case("fan_in_fan_out does not say how the base weight is stored")
def fan_in_fan_out() -> Call:
    call = dense()
    call.layer.fan_in_fan_out = True
    return call


@case("DoRA is active together with other adapters")
def dora_and_another_adapter() -> Call:
    model = peft_model(MLP(), use_dora=True)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["up"]))
    fill_adapters(model)
    model.base_model.set_adapter(["default", "other"])
    fastlora.accelerate(model, verbose=False)
    return Call(lora_layers(model)[0], torch.randn(2, 37))


@case("no adapters are active on this layer")
def no_active_adapter() -> Call:
    model = peft_model(MLP())
    model.add_adapter("other", LoraConfig(r=2, target_modules=["down"]))
    model.set_adapter("other")
    fastlora.accelerate(model, verbose=False)
    return Call(lora_layers(model)[0], torch.randn(2, 37))


@case("DoRA with lora_dropout=1 has no scale for what is kept")
def dora_that_drops_all() -> Call:
    call = dense(use_dora=True, lora_dropout=0.5)
    call.layer.lora_dropout["default"].p = 1.0
    return call


@case("DoRA with lora_bias: PEFT counts lora_B's bias into the norm")
def dora_with_lora_bias() -> Call:
    call = dense(use_dora=True)
    call.B.bias = nn.Parameter(torch.ones(53))
    return call


@case("the magnitude is a MyMagnitude, not a DoraLinearLayer")
def other_magnitude() -> Call:
    call = dense(use_dora=True)
    call.layer.lora_magnitude_vector["default"].__class__ = MyMagnitude
    return call


@case("the magnitude has hooks, which fastlora would not call")
def hook_on_the_magnitude() -> Call:
    call = dense(use_dora=True)
    call.layer.lora_magnitude_vector["default"].register_forward_hook(lambda m, i, o: o * 2)
    return call


def alora() -> Call:
    call = dense(alora_invocation_tokens=[1])
    call.x = call.x[:2]
    return call


@case("the adapter is a LoRA variant (DoRA)")
def dora_before_variants() -> Call:
    """Layers pickled by a PEFT that had no variants know DoRA by `use_dora` alone."""
    call = dense()
    call.layer.use_dora["default"] = True
    return call


@case("the adapter is a LoRA variant (object)")
def unknown_variant() -> Call:
    call = dense()
    call.layer.lora_variant["default"] = object()
    call.stock_raises = AttributeError
    return call


@case("scaling is a Tensor, not a number")
def scaling_as_tensor() -> Call:
    """`prepare_model_for_compiled_hotswap` does that."""
    call = dense()
    call.layer.scaling["default"] = torch.tensor(0.5)
    return call


# exact types


@case("the dropout module is a MyDropout, not a plain nn.Dropout")
def other_dropout() -> Call:
    call = dense()
    call.layer.lora_dropout["default"] = MyDropout(0.0)
    return call


@case("the dropout module is a Dropout, not a plain nn.Dropout")
def dropout_in_place() -> Call:
    """It would change the layer's input."""
    call = dense()
    call.layer.lora_dropout["default"] = nn.Dropout(0.0, inplace=True)
    return call


@case("lora_A or lora_B is a MyLinear, not a plain nn.Linear")
def other_lora_A() -> Call:
    call = dense()
    call.A.__class__ = MyLinear
    return call


@case("lora_A or lora_B is a MyLinear, not a plain nn.Linear")
def other_lora_B() -> Call:
    call = dense()
    call.B.__class__ = MyLinear
    return call


@case("lora_A or lora_B is a ParametrizedLinear, not a plain nn.Linear")
def parametrized_lora_A() -> Call:
    call = dense()
    nn.utils.parametrizations.weight_norm(call.A)
    return call


@case("lora_A has a bias")
def bias_on_lora_A() -> Call:
    call = dense()
    call.A.bias = nn.Parameter(torch.ones(3))
    return call


@case("the base layer is a MyLinear, not nn.Linear, Linear4bit or Conv1D")
def other_base() -> Call:
    call = dense()
    call.base.__class__ = MyLinear
    return call


@case("the base layer is a Linear8bitLt, not nn.Linear, Linear4bit or Conv1D")
def eight_bit_base() -> Call:
    call = dense()
    call.layer.base_layer = bitsandbytes.nn.Linear8bitLt(37, 53)
    return call


# hooks and replaced forwards on what the fast path does not call


def hook_cases() -> None:
    roles = {
        "the base layer": lambda call: call.base,
        "lora_A": lambda call: call.A,
        "lora_B": lambda call: call.B,
        "the dropout module": lambda call: call.layer.lora_dropout["default"],
    }
    hooks: dict[str, Callable[[nn.Module], object]] = {
        "forward_hook": lambda m: m.register_forward_hook(lambda m, i, o: o * 2),
        "forward_pre_hook": lambda m: m.register_forward_pre_hook(lambda m, i: (i[0] * 2,)),
        "backward_hook": lambda m: m.register_full_backward_hook(lambda m, i, o: None),
        "backward_pre_hook": lambda m: m.register_full_backward_pre_hook(lambda m, o: None),
    }
    for role, module in roles.items():
        for name, hook in hooks.items():

            def hooked(module: Any = module, hook: Any = hook) -> Call:
                call = dense(lora_dropout=0.5)
                call.layer.eval()
                hook(module(call))
                return call

            label = f"{name} on {role}"
            CASES.append((label, f"{role} has hooks, which fastlora would not call", hooked))

        def replaced(module: Any = module) -> Call:
            call = dense()
            target = module(call)
            forward = target.forward
            target.forward = lambda x: forward(x) * 2
            return call

        sentence = f"{role} has a forward of its own (accelerate's offloading, or another patch)"
        CASES.append((f"forward of {role}", sentence, replaced))


hook_cases()
OWN_FORWARD = "the base layer has a forward of its own (accelerate's offloading, or another patch)"


@case(OWN_FORWARD)
def offloading_hook() -> Call:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    call = dense()
    add_hook_to_module(call.base, AlignDevicesHook("cpu", offload=True))
    return call


@case(OWN_FORWARD)
def other_accelerate_hook() -> Call:
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Double(ModelHook):
        def post_forward(self, module: nn.Module, output: Any) -> Any:
            return output * 2

    call = dense()
    add_hook_to_module(call.base, Double())
    return call


@case(OWN_FORWARD)
def hook_without_gradient() -> Call:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    call = dense()
    hook = AlignDevicesHook("cpu")
    hook.no_grad = True
    add_hook_to_module(call.base, hook)
    return call


def harmlessly_hooked() -> Call:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    call = dense()
    add_hook_to_module(call.base, AlignDevicesHook("cpu"))
    assert fast_path(call.layer, call.x) == (True, "")
    return call


@case(OWN_FORWARD)
def forward_replaced_over_a_hook() -> Call:
    call = harmlessly_hooked()
    forward = call.base.forward
    call.base.forward = lambda x: forward(x) * 2
    return call


@case(OWN_FORWARD)
def partial_forward_over_a_hook() -> Call:
    import functools

    call = harmlessly_hooked()
    forward = call.base.forward
    call.base.forward = functools.partial(lambda x: forward(x) * 2)
    return call


@case(OWN_FORWARD)
def forward_replaced_under_a_hook() -> Call:
    call = harmlessly_hooked()
    forward = call.base._old_forward
    call.base._old_forward = lambda x: forward(x) * 2
    return call


@case("global module hooks are registered, which fastlora would not call")
def global_hook() -> Call:
    call = dense()

    class Around:
        def __enter__(self) -> None:
            self.handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: o)

        def __exit__(self, *exception: object) -> None:
            self.handle.remove()

    call.around = Around  # type: ignore[assignment]
    return call


# the tensors


@case("a weight is no parameter of its layer (parametrised or pruned)")
def weight_is_no_parameter() -> Call:
    call = dense()
    weight = call.base.weight.detach()
    del call.base.weight
    call.base.weight = weight
    return call


@case("a weight is no parameter of its layer (parametrised or pruned)")
def lora_A_is_no_parameter() -> Call:
    call = dense()
    weight = call.A.weight.detach()
    del call.A.weight
    call.A.weight = weight
    return call


@case("a weight is no parameter of its layer (parametrised or pruned)")
def lora_B_is_no_parameter() -> Call:
    call = dense()
    weight = call.B.weight.detach()
    del call.B.weight
    call.B.weight = weight
    return call


def subclass_cases() -> None:
    def subclass(module: Callable[[Call], nn.Module], name: str) -> Case:
        def make() -> Call:
            call = dense()
            target = module(call)
            tensor = getattr(target, name).detach().as_subclass(MyTensor)
            target._parameters[name] = nn.Parameter(tensor, requires_grad=False)
            return call

        return make

    for role, module, name in (
        ("base weight", lambda call: call.base, "weight"),
        ("bias", lambda call: call.base, "bias"),
        ("lora_A", lambda call: call.A, "weight"),
        ("lora_B", lambda call: call.B, "weight"),
    ):
        reason = f"the {role} is a MyTensor, a tensor subclass"
        CASES.append((f"{role} of a subclass", reason, subclass(module, name)))


subclass_cases()


@case("the base weight is a Params4bit, a tensor subclass")
def packed_weight_in_a_dense_layer() -> Call:
    call = dense()
    call.base._parameters["weight"] = bitsandbytes.nn.Params4bit(
        call.base.weight.detach(), requires_grad=False
    )
    return call


@case("the base weight is on the meta device (offloaded or not loaded)")
def meta_weight() -> Call:
    call = dense()
    call.base.to("meta")
    call.stock_raises = Exception
    return call


@case("the base weight is being trained (requires_grad); fastlora needs it frozen")
def base_weight_trained() -> Call:
    call = dense()
    call.base.weight.requires_grad_()
    return call


@case("lora_A is in bfloat16 and lora_B in float32")
def adapters_of_two_dtypes() -> Call:
    call = dense()
    call.A.to(BF16)
    call.stock_raises = RuntimeError
    return call


@case("base weight has shape (0,), not (53, 37) (sharded?)")
def partitioned_base_weight() -> Call:
    """DeepSpeed ZeRO-3 leaves empty parameters behind between calls."""
    call = dense()
    call.base.weight.data = torch.empty(0)
    call.stock_raises = RuntimeError
    return call


@case("base weight has shape (53, 37), not (54, 37) (sharded?)")
def another_out_features() -> Call:
    call = dense()
    call.layer.out_features = 54
    return call


@case("base weight has shape (53, 37), not (53, 36) (sharded?)")
def another_in_features() -> Call:
    call = dense()
    call.layer.in_features = 36
    return call


@case("lora_A has shape (0,), not (0, 37) (sharded?)")
def partitioned_lora_A() -> Call:
    call = dense()
    call.A.weight.data = torch.empty(0)
    call.stock_raises = RuntimeError
    return call


@case("lora_B has shape (53, 4), not (53, 3) (sharded?)")
def mismatched_lora_B() -> Call:
    call = dense()
    call.B.weight.data = torch.randn(53, 4)
    call.stock_raises = RuntimeError
    return call


# 4-bit weights


@case("the base weight is not quantised yet")
def not_quantised() -> Call:
    model = MLP4bit()
    model.up = bitsandbytes.nn.Linear4bit(64, 128)
    layer = lora_layers(fastlora.accelerate(peft_model(model), verbose=False))[0]
    return Call(layer, torch.ones(2, 64), stock_raises=Exception)


@case("bitsandbytes repacked the base weight in place for CPU inference")
def repacked() -> Call:
    call = four_bit()
    weight = call.base.weight
    weight.data, weight.quant_state = _convert_weight_packed_for_cpu(
        weight.data, weight.quant_state
    )
    if not has_avx512bf16():  # others cannot multiply by it
        call.stock_raises = Exception
    return call


@case("the base weight was quantised with shape (64, 128), not (128, 64)")
def quantised_transposed() -> Call:
    call = four_bit()
    call.base.weight.quant_state.shape = torch.Size((64, 128))
    return call


@case("the base weight holds 2048 bytes (sharded?)")
def sharded_4bit_weight() -> Call:
    call = four_bit()
    call.base.weight.data = call.base.weight.data[:2048]
    call.stock_raises = RuntimeError
    return call


@case("the packed base weight is not contiguous")
def strided_4bit_weight() -> Call:
    call = four_bit()
    data = call.base.weight.data
    call.base.weight.data = torch.stack([data, data], dim=1)[:, 0]
    return call


@case("the base weight is quantised as int4")
def unknown_quant_type() -> Call:
    call = four_bit()
    call.base.weight.quant_state.quant_type = "int4"
    call.stock_raises = Exception
    return call


@case("the nested absmax has blocksize 128, not 256")
def other_nested_blocksize() -> Call:
    call = four_bit(nested=True)
    call.base.weight.quant_state.state2.blocksize = 128
    call.stock_raises = NotImplementedError
    return call


# the input


@case("x is a MyTensor, a tensor subclass")
def x_of_a_subclass() -> Call:
    call = dense()
    call.x = call.x.as_subclass(MyTensor)
    return call


@case("x is not a plain strided tensor")
def sparse_x() -> Call:
    call = dense()
    call.x = call.x[0].to_sparse()
    call.layer.eval()
    return call


@case("x is not a plain strided tensor")
def nested_x() -> Call:
    call = dense()
    call.x = torch.nested.nested_tensor([torch.randn(2, 37), torch.randn(3, 37)])
    return call


@case("x has shape (), the layer takes [..., 37]")
def scalar_x() -> Call:
    call = dense()
    call.x, call.stock_raises = torch.tensor(1.0), Exception
    return call


@case("x has shape (2, 36), the layer takes [..., 37]")
def x_of_another_width() -> Call:
    call = dense()
    call.x, call.stock_raises = torch.randn(2, 36), RuntimeError
    return call


@case("x is on the meta device")
def meta_x() -> Call:
    call = dense()
    call.x = torch.empty(2, 37, device="meta")
    call.stock_raises = Exception
    return call


# dtypes


@case("x is in float64; fastlora takes fp32, bf16 and fp16")
def float64_layer() -> Call:
    call = dense()
    call.layer.double()
    call.x = call.x.double()
    return call


@case("the adapter is in float64; fastlora takes fp32, bf16 and fp16")
def float64_adapter() -> Call:
    call = dense()
    call.A.double()
    call.B.double()
    return call


@case("x is in bfloat16 and the base weight in float32")
def x_narrower_than_the_weight() -> Call:
    call = dense()
    call.x, call.stock_raises = call.x.to(BF16), RuntimeError
    return call


@case("x is in bfloat16 and the bias in float32")
def bias_of_another_dtype() -> Call:
    call = bf16()
    call.base.bias.data = call.base.bias.data.float()
    call.stock_raises = RuntimeError
    return call


@case("the base weight is in float8_e4m3fn")
def autocast_of_an_fp8_weight() -> Call:
    call = dense()
    call.base.weight.data = call.base.weight.data.to(torch.float8_e4m3fn)
    call.around = lambda: torch.autocast(**BF16_AUTOCAST)
    return call


@case(
    "compute_dtype is float16 under autocast to bfloat16; "
    "set bnb_4bit_compute_dtype to autocast's dtype"
)
def autocast_away_from_compute_dtype() -> Call:
    call = four_bit(compute_dtype=FP16)
    call.around = lambda: torch.autocast(**BF16_AUTOCAST)
    return call


@case("x is in float16 under autocast to bfloat16")
def autocast_between_half_dtypes() -> Call:
    """On a GPU, PEFT's sum of the two becomes fp32."""
    call = four_bit(compute_dtype=BF16)
    call.x = call.x.to(FP16)
    call.around = lambda: torch.autocast(**BF16_AUTOCAST)
    return call


# ---- one by one ----------------------------------------------------------------------------------


def stock_forward(call: Call) -> Any:
    """PEFT's own forward, on the same layer."""
    return type(call.layer).__base__.forward(call.layer, call.x, *call.args, **call.kwargs)


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
        (four_bit, "native", "torch.compile does not trace bitsandbytes' weights into fastlora"),
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
