"""Changes of a call's arguments and of a layer's modules that send the call to PEFT's own code.

`test_peft_guard.py` makes each of them; the reason stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import bitsandbytes
import torch
from peft import LoraConfig
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor, nn

import fastlora
from fastlora.integrations.peft import fast_path
from tests.integrations.calls import Call, Case, dense, into
from tests.integrations.models import MLP, fill_adapters, lora_layers, peft_model


class MyDropout(nn.Dropout):
    pass


class MyMagnitude(DoraLinearLayer):
    pass


class MyLinear(nn.Linear):
    pass


CASES: list[tuple[str, str, Case]] = []
case = partial(into, CASES)


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


def by_swift(forward_of: Any = None) -> Call:
    """As ms-swift leaves lora_A and lora_B: a forward of the instance, over the class's."""

    def keep_device_forward(self: Any, x: Tensor) -> Tensor:
        y: Tensor = self.forward_origin(x.to(self.weight.device))
        return y

    keep_device_forward.__module__ = "swift.tuners.peft"
    call = dense()
    for part in (call.A, call.B):
        part.forward_origin = part.forward if forward_of is None else forward_of(part)
        part.forward = MethodType(keep_device_forward, part)
    return call


@case(OWN_FORWARD.replace("the base layer", "lora_A"))
def swifts_forward_over_another() -> Call:
    return by_swift(lambda part: lambda x: type(part).forward(part, x) * 2)


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
