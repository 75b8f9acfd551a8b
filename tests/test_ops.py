"""The ops' argument checks: each names the argument, what was expected and what came."""

from __future__ import annotations

import pytest
import torch

from fastlora import ops
from fastlora.layer import Layer
from tests.cases import DTYPES, Base, Case, make_inputs

CASE = Case("", M=4, N=6, K=64, R=2)
DENSE = Base()


def arguments(base: Base, changed: dict) -> dict:
    """The tensors of a call without dropout, with some changed: the layer's fields, and others."""
    inputs = make_inputs(CASE, base, DTYPES["fp32"])
    given = {"x": inputs.x, "dy": inputs.dy, "S": torch.zeros(4, 2), "seed": None} | changed
    layer = inputs.layer._replace(**{k: v for k, v in given.items() if k in Layer._fields})
    return {k: v for k, v in given.items() if k not in Layer._fields} | {"layer": layer}


def call(base: Base = DENSE, **changed):
    given = arguments(base, changed)
    return ops.lora_linear_fwd(given["x"], given["layer"])


def backward(**changed):
    given = arguments(DENSE, changed)
    return ops.lora_linear_bwd(given["dy"], given["x"], given["layer"], given["S"])


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": torch.zeros(4, 63)}, ValueError, r"x must be \[M, K\].*\(4, 63\)"),
        ({"x": torch.zeros(64)}, ValueError, r"x must be \[M, K\]"),
        ({"weight": torch.zeros(7, 64)}, ValueError, r"lora_B must be \[7, R\] to match weight"),
        ({"weight": torch.zeros(6, 64).half()}, TypeError, "weight must have x's dtype"),
        ({"lora_A": torch.zeros(2, 60)}, ValueError, r"lora_A must be \[R, 64\].*\(2, 60\)"),
        ({"lora_A": torch.zeros(2, 64).half()}, TypeError, "lora_A must be fp32 or x's dtype"),
        ({"lora_B": torch.zeros(6, 3)}, ValueError, r"lora_B must be \[N, 2\] to match lora_A"),
        ({"lora_B": torch.zeros(6, 2).half()}, TypeError, "lora_B must have lora_A's dtype"),
        ({"bias": torch.zeros(5)}, ValueError, r"bias must be \[6\], got \(5,\)"),
        ({"dropout_p": 1.5}, ValueError, "dropout_p must be between 0 and 1, got 1.5"),
        ({"dropout_p": 0.5}, ValueError, "seed must be an int64 tensor of one element"),
        (
            {"dropout_p": 0.5, "seed": torch.zeros(1, dtype=torch.int64, device="meta")},
            ValueError,
            "seed must be on x's device",
        ),
        ({"dropout_p": 0.5, "seed": torch.zeros(2).long()}, ValueError, r"seed .*got \(2,\)"),
        ({"dropout_p": 0.5, "seed": torch.zeros(1)}, ValueError, "seed .*float32"),
        ({"lora_A": torch.zeros(2, 64, device="meta")}, ValueError, "lora_A must be on x's device"),
    ],
)
def test_dense_arguments(changed, error, message) -> None:
    with pytest.raises(error, match=message):
        call(**changed)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"weight": torch.zeros(10).byte()}, ValueError, "weight must hold 192 bytes.*got 10"),
        ({"x": torch.zeros(4, 65)}, ValueError, r"quant_state.shape \(N, K\).*\(6, 64\)"),
        ({"lora_B": torch.zeros(5, 2)}, ValueError, r"lora_B must be \[6, R\]"),
        ({"quant_state": object()}, TypeError, "quant_state must have absmax"),
    ],
)
def test_4bit_arguments(changed, error, message) -> None:
    with pytest.raises(error, match=message):
        call(Base("nf4", 64), **changed)


def test_state_on_another_device() -> None:
    state = make_inputs(CASE, Base("nf4", 64, nested=True), DTYPES["fp32"]).quant_state
    state.code = state.code.to("meta")
    with pytest.raises(ValueError, match=r"quant_state's tensors must be on x's device cpu"):
        call(Base("nf4", 64, nested=True), quant_state=state)


def test_absmax_of_another_weight() -> None:
    state = make_inputs(Case("", 4, 12, 64, 2), Base("nf4", 64), DTYPES["fp32"]).quant_state
    state.shape = torch.Size((6, 64))
    with pytest.raises(ValueError, match=r"quant_state\.absmax must hold 6 values"):
        call(Base("nf4", 64), quant_state=state)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"dy": torch.zeros(4, 5)}, ValueError, r"dy must be \[4, 6\], got \(4, 5\)"),
        ({"dy": torch.zeros(4, 6).half()}, TypeError, "dy must have x's dtype"),
        ({"S": torch.zeros(4, 3)}, ValueError, r"S must be \[4, 2\], got \(4, 3\)"),
    ],
)
def test_backward_arguments(changed, error, message) -> None:
    with pytest.raises(error, match=message):
        backward(**changed)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"blocksize": 48}, ValueError, "blocksize must be one of .* got 48"),
        ({"quant_type": "int4"}, ValueError, "quant_type must be one of .* got 'int4'"),
        ({"weight": torch.zeros(8).long()}, TypeError, "weight must be fp32, bf16 or fp16"),
    ],
)
def test_quantize_arguments(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        ops.quantize_4bit(**({"weight": torch.randn(64)} | arguments))


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        (torch.zeros(6, 63), ValueError, r"out must be contiguous with shape \(6, 64\)"),
        (torch.zeros(64, 6).T, ValueError, "out must be contiguous"),
        (torch.zeros(6, 64).half(), TypeError, "out must have dtype torch.float32"),
    ],
)
def test_dequantize_out(out, error, message) -> None:
    packed, state = ops.quantize_4bit(torch.randn(6, 64))
    with pytest.raises(error, match=message):
        ops.dequantize_4bit(packed, state, torch.float32, out)
