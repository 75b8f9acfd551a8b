"""Changes of a call's tensors, their kinds, shapes and dtypes, that send it to PEFT's own code.

`test_peft_guard.py` makes each of them; the reason stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import bitsandbytes
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu, has_avx512bf16
from torch import Tensor, nn

import fastlora
from tests.integrations.calls import Call, Case, bf16, dense, four_bit, into
from tests.integrations.models import MLP4bit, lora_layers, peft_model

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
BF16_AUTOCAST: dict[str, Any] = {"device_type": "cpu", "dtype": BF16}


class MyTensor(Tensor):
    """A tensor subclass that changes nothing."""


CASES: list[tuple[str, str, Case]] = []
case = partial(into, CASES)


# the tensors


def parameter_cases() -> None:
    def no_parameter(module: Callable[[Call], nn.Module]) -> Case:
        def make() -> Call:
            call = dense()
            target = module(call)
            weight = target.weight.detach()
            del target.weight
            target.weight = weight
            return call

        return make

    for name, module in (
        ("weight", lambda call: call.base),
        ("lora_A", lambda call: call.A),
        ("lora_B", lambda call: call.B),
    ):
        reason = "a weight is no parameter of its layer (parametrised or pruned)"
        CASES.append((f"{name}_is_no_parameter", reason, no_parameter(module)))


parameter_cases()


def hidden_parameter_cases() -> None:
    def hidden(module: Callable[[Call], nn.Module], name: str) -> Case:
        def make() -> Call:
            call = dense(lora_bias=True)
            target = module(call)
            target.__dict__[name] = getattr(target, name).detach() * 2
            return call

        return make

    for role, module, name in (
        ("the base layer", lambda call: call.base, "weight"),
        ("the base layer", lambda call: call.base, "bias"),
        ("lora_A", lambda call: call.A, "weight"),
        ("lora_B", lambda call: call.B, "weight"),
        ("lora_B", lambda call: call.B, "bias"),
    ):
        reason = f"{role} has a {name} that is an attribute, not a parameter"
        CASES.append((f"{name} of {role} is hidden", reason, hidden(module, name)))


hidden_parameter_cases()


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
