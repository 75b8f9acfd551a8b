"""Runs every op once on small, odd sizes and holds the results to the error policy.

    python tests/every_op.py [BACKEND]      prints the instruction set; raises on a wrong result

A program of its own, so that it can run under another FASTLORA_CPU_ISA, on an emulated processor,
or against an installed wheel, where there is no pytest.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from fastlora import grouped_lora_linear, lora_embedding, lora_linear, ops, reference
from fastlora.autograd.dora import dora_linear
from fastlora.backends import BACKENDS, native
from fastlora.backends.contract import Request
from fastlora.layer import Layer, Needs
from fastlora.reference import plain
from fastlora.tolerance import exceeds

SCALING, DROPOUT = 1.5, 0.1
# M, N, K, R: a row, few rows, several tiles; no multiple of a vector or a block. M * R is large for
# the sake of the policy, which compares the errors of many sums with those of as many others.
SIZES = ((1, 67, 131, 509), (7, 96, 65, 73), (129, 35, 192, 3))
# The scalar set adds a sum's terms one by one, torch doesn't: more outputs of fewer ranks.
DORA_SIZES = ((1, 259, 131, 131), *SIZES[1:])
DTYPES = ((torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float16,) * 2)


def leaves(inputs: dict[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Copies of the inputs that collect gradients, in their own dtypes or in `dtype`."""
    return {
        name: tensor.detach().to(dtype or tensor.dtype, copy=True).requires_grad_()
        for name, tensor in inputs.items()
    }


def results(y: Tensor, dy: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    y.backward(dy.to(y.dtype))
    grads = {f"d{name}": tensor.grad for name, tensor in inputs.items()}
    assert all(grad is not None for grad in grads.values())
    return {"y": y.detach(), **{name: grad for name, grad in grads.items() if grad is not None}}


def check_layer(
    size: tuple[int, int, int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    quantized: bool,
    backend: str,
) -> None:
    """Forward and all gradients of one layer, with dropout."""
    M, N, K, R = size
    x_dtype, adapter_dtype = dtypes
    torch.manual_seed(M)
    weight, state = (torch.randn(N, K) / K**0.5).to(x_dtype), None
    if quantized:
        weight, state = reference.quantize_4bit(weight, 64, "nf4", compress_statistics=True)
    inputs = {
        "x": torch.randn(M, K).to(x_dtype),
        "bias": torch.randn(N).to(x_dtype),
        "lora_A": (torch.randn(R, K) / K**0.5).to(adapter_dtype),
        "lora_B": (torch.randn(N, R) / R**0.5).to(adapter_dtype),
    }
    dy, seed = torch.randn(M, N).to(x_dtype), torch.tensor([M])
    mine, usual, wide = leaves(inputs), leaves(inputs), leaves(inputs, torch.float64)
    how: dict[str, Any] = {"quant_state": state, "dropout_p": DROPOUT, "seed": seed}
    y = lora_linear(weight=weight, scaling=SCALING, backend=backend, **mine, **how)
    out = results(y, dy, mine)

    def sequence(layer: Layer, x: Tensor, **trained: Tensor) -> Tensor:
        return plain.lora_linear(x, layer._replace(**trained))

    layer = Layer(weight, inputs["lora_A"], inputs["lora_B"], SCALING, **how)
    exact = results(sequence(plain.widened(layer, x_dtype), **wide), dy, wide)
    base = results(sequence(layer, **usual), dy, usual)
    for name in out:
        report = exceeds(out[name], exact[name], base[name])
        assert report.ok, f"{name}, {size}, {dtypes}, quantized={quantized}: {report}"


def check_shared(
    size: tuple[int, int, int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    quantized: bool,
    backend: str,
) -> None:
    """Forward and all gradients of three layers of one x, of which one drops nothing."""
    M, N, K, R = size
    x_dtype, adapter_dtype = dtypes
    torch.manual_seed(M)
    inputs = {"x": torch.randn(M, K).to(x_dtype)}
    layers, dys = [], []
    for i, (rows, dropout_p) in enumerate(((N, DROPOUT), (N + 13, 0.0), (N, DROPOUT))):
        weight, state = (torch.randn(rows, K) / K**0.5).to(x_dtype), None
        if quantized:
            weight, state = reference.quantize_4bit(weight, 64, "nf4", compress_statistics=True)
        dys.append(torch.randn(M, rows).to(x_dtype))
        bias = torch.randn(rows).to(x_dtype)
        A = (torch.randn(R, K) / K**0.5).to(adapter_dtype)
        B = (torch.randn(rows, R) / R**0.5).to(adapter_dtype)
        inputs |= {f"bias{i}": bias, f"lora_A{i}": A, f"lora_B{i}": B}
        options = (bias, state, None, dropout_p, torch.tensor([M + i]))
        layers.append(Layer(weight, A, B, SCALING, *options))

    def own(named: dict[str, Tensor]) -> list[Layer]:
        fields = ("lora_A", "lora_B", "bias")
        return [
            layer._replace(**{field: named[f"{field}{i}"] for field in fields})
            for i, layer in enumerate(layers)
        ]

    def usual(named: dict[str, Tensor], exactly: bool) -> dict[str, Tensor]:
        some = own(named)
        if exactly:
            some = [plain.widened(layer, x_dtype) for layer in some]
        ys = [plain.lora_linear(named["x"], layer) for layer in some]
        return results(torch.cat(ys, dim=1), torch.cat(dys, dim=1), named)

    ys, Ss = ops.shared_linear_fwd(inputs["x"], layers, backend=backend)
    needs = [Needs(bias=True)] * len(layers)
    dx, grads = ops.shared_linear_bwd(dys, inputs["x"], layers, Ss, needs, backend=backend)
    out = {"y": torch.cat(ys, dim=1), "dx": dx}
    for i, grad in enumerate(grads):
        out |= {f"dbias{i}": grad.bias, f"dlora_A{i}": grad.A, f"dlora_B{i}": grad.B}
    exact = usual(leaves(inputs, torch.float64), exactly=True)
    base = usual(leaves(inputs), exactly=False)
    for name in out:
        report = exceeds(out[name], exact[name], base[name])
        assert report.ok, f"shared {name}, {size}, {dtypes}, quantized={quantized}: {report}"


def check_experts(quantized: bool, backend: str) -> None:
    """Forward and all gradients of a stack of experts, whose dropout counts rows from the first."""
    M, N, K, R, ends = 40, 48, 160, 5, torch.tensor([7, 7, 38])
    torch.manual_seed(0)
    weight, state = torch.randn(3, N, K) / K**0.5, None
    if quantized:
        weight, state = reference.quantize_4bit(weight, 64, "nf4", compress_statistics=True)
    inputs = {
        "x": torch.randn(M, K),
        "lora_A": torch.randn(3, R, K) / K**0.5,
        "lora_B": torch.randn(3, N, R) / R**0.5,
    }
    dy, seed = torch.randn(M, N), torch.tensor([M])
    mine, usual, wide = leaves(inputs), leaves(inputs), leaves(inputs, torch.float64)

    def by_expert(layer: Layer, x: Tensor, **trained: Tensor) -> Tensor:
        return plain.grouped_lora_linear(x, layer._replace(**trained))

    how: dict[str, Any] = {"quant_state": state, "dropout_p": DROPOUT, "seed": seed}
    y = grouped_lora_linear(
        weight=weight, offsets=ends, scaling=SCALING, backend=backend, **mine, **how
    )
    out = results(y, dy, mine)
    layer = Layer(weight, inputs["lora_A"], inputs["lora_B"], SCALING, offsets=ends, **how)
    exact = results(by_expert(plain.widened(layer, torch.float32), **wide), dy, wide)
    base = results(by_expert(layer, **usual), dy, usual)
    for name in out:
        report = exceeds(out[name], exact[name], base[name])
        assert report.ok, f"{name} of experts, quantized={quantized}: {report}"


def check_embedding(size: tuple[int, int, int, int], dtypes: tuple[torch.dtype, ...]) -> None:
    """Forward and gradients of LoRA on an embedding, on the backend that the device chooses."""
    M, N, V, R = size
    dtype, adapter_dtype = dtypes
    torch.manual_seed(M)
    ids, weight = torch.randint(0, V, (M,)), torch.randn(V, N).to(dtype)
    inputs = {
        "lora_A": torch.randn(R, V).to(adapter_dtype),
        "lora_B": (torch.randn(N, R) / R**0.5).to(adapter_dtype),
    }
    dy, padding = torch.randn(M, N).to(dtype), int(ids[0]) if M > 1 else None
    mine, usual, wide = leaves(inputs), leaves(inputs), leaves(inputs, torch.float64)

    how: dict[str, Any] = {"scaling": SCALING, "padding_idx": padding}
    out = results(lora_embedding(ids, weight, **mine, **how), dy, mine)
    exact = results(plain.lora_embedding(ids, weight.double(), **wide, **how), dy, wide)
    base = results(plain.lora_embedding(ids, weight, **usual, **how), dy, usual)
    for name in out:
        report = exceeds(out[name], exact[name], base[name])
        assert report.ok, f"embedding {name}, {size}, {dtypes}: {report}"


def check_dora(size: tuple[int, int, int, int], dtypes: tuple[torch.dtype, ...]) -> None:
    """DoRA's norms, and its layer with dropout, on the backend that is chosen."""
    M, N, K, R = size
    dtype, adapter_dtype = dtypes
    torch.manual_seed(M)
    A, B = torch.randn(R, K).to(adapter_dtype), torch.randn(N, R).to(adapter_dtype)
    weight = torch.randn(N, K).to(dtype)
    packed, state = reference.quantize_4bit(weight, 64, "nf4", compress_statistics=True)
    for W, norms in (
        (weight, ops.dora_norm(Layer(weight, A, B, SCALING))),
        (weight, ops.dora_norm(Layer(weight.T.contiguous().T, A, B, SCALING))),
        (
            reference.dequantize_4bit(packed, state),
            ops.dora_norm(Layer(packed, A, B, SCALING, quant_state=state)),
        ),
    ):
        exact, base = (
            plain.dora_norm(W.to(wide), A.to(wide), B.to(wide), SCALING)
            for wide in (torch.float64, torch.float32)
        )
        report = exceeds(norms, exact, base)
        assert report.ok, f"DoRA's norms, {size}, {dtypes}: {report}"

    inputs = {
        "x": torch.randn(M, K).to(dtype),
        "lora_A": (A / K**0.5).to(adapter_dtype),
        # Below the weight's size: factor's gradient sums a product that is rounded with both.
        "lora_B": (B / R**0.5).to(adapter_dtype),
        "factor": torch.rand(N) + 0.5,
    }
    dy, seed = torch.randn(M, N).to(dtype), torch.tensor([M])
    mine, usual, wide = leaves(inputs), leaves(inputs), leaves(inputs, torch.float64)

    layer = Layer(weight, A, B, SCALING, dropout_p=DROPOUT, seed=seed)

    def sequence(layer: Layer, x: Tensor, factor: Tensor, **trained: Tensor) -> Tensor:
        return plain.dora_linear(x, layer._replace(**trained), factor)

    def node(x: Tensor, factor: Tensor, **trained: Tensor) -> Tensor:
        return dora_linear(x, layer._replace(**trained), factor)

    out = results(node(**mine), dy, mine)
    exact = results(sequence(plain.widened(layer), **wide), dy, wide)
    base = results(sequence(layer, **usual), dy, usual)
    for name in out:
        report = exceeds(out[name], exact[name], base[name])
        assert report.ok, f"DoRA's {name}, {size}, {dtypes}: {report}"


def check_4bit(backend: str) -> None:
    """Quantise and dequantise, bit by bit."""
    for quant_type in ("nf4", "fp4"):
        weight = torch.randn(67, 131)
        packed, state = ops.quantize_4bit(weight, 64, quant_type, True, backend=backend)
        same, same_state = reference.quantize_4bit(weight, 64, quant_type, True)
        assert torch.equal(packed, same) and torch.equal(state.absmax, same_state.absmax)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            decoded = ops.dequantize_4bit(packed, state, dtype, backend=backend)
            assert torch.equal(decoded, reference.dequantize_4bit(same, same_state, dtype))


def main() -> None:
    backend = sys.argv[1] if len(sys.argv) > 1 else "native"
    check_4bit(backend)
    experts = Request("grouped_lora_linear_fwd", "cpu", dropout=True)
    if not BACKENDS[backend].unsupported(experts):
        for quantized in (False, True):
            check_experts(quantized, backend)
    for size, dora_size in zip(SIZES, DORA_SIZES, strict=True):
        for dtypes in DTYPES:
            check_embedding(size, dtypes)
            check_dora(dora_size, dtypes)
            for quantized in (False, True):
                check_layer(size, dtypes, quantized, backend)
                check_shared(size, dtypes, quantized, backend)
    build = native.build_info()
    print(build["cpu_isa"] if build else "no native library")


if __name__ == "__main__":
    main()
