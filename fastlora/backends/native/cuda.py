"""The CUDA C++ kernels of csrc/cuda: which of them runs a 4-bit layer's op.

`x W^T` and `dy W` come from one of three kernels, as `plan` says. The products without W around
them come from another backend, Triton's or the reference; but `qlora_decode` computes S and adds
the LoRA term itself. If W is decoded before its product, Triton runs the whole op.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ... import reference
from ...layer import Grads, Layer, Needs
from ...quant import NESTED_BLOCKSIZE, QuantState, dynamic_code
from ..composed import Composed
from ..contract import Request, is_empty, unsupported_dropout, unsupported_dtype
from ..machine import tuned
from ..machine.gpu import unsupported_gpu
from ..schemas import flatten, packed
from ..triton import TRITON, Triton
from . import cpu, library

_LINEAR = (
    "lora_linear_fwd",
    "lora_linear_bwd",
    "grouped_lora_linear_fwd",
    "grouped_lora_linear_bwd",
)
_FORMAT = ("quantize_4bit", "dequantize_4bit")

# The most tokens for which decoding W inside the product pays, by compute capability; above, W is
# decoded once and multiplied by cuBLAS. These are estimates from data sheets, not measurements;
# choices of `fastlora tune` take precedence.
FUSED_TOKENS = {(8, 0): 512, (8, 6): 1024, (8, 9): 1024, (9, 0): 512, (10, 0): 128, (12, 0): 1024}
DECODE_TOKENS = 64  # kDecodeTokens in csrc/cuda/kernels.h

ops: Any = torch.ops.fastlora
_reason = library.load_cuda()


def skinny(device: torch.device) -> Triton | None:
    """The backend that runs the products without W on a device; None for the reference."""
    request = Request("lora_linear_fwd", device.type, device.index)
    return TRITON if TRITON.unsupported(request) is None else None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _fault(index: int | None) -> str | None:
    return _fault_of(torch.cuda.current_device() if index is None else index)


@functools.cache
def _fault_of(index: int) -> str | None:
    """Why the library's kernels don't run on a GPU, or None; asked once a device."""
    loaded = ctypes.CDLL(str(library.CUDA_LIBRARY))
    loaded.fastlora_cuda_fault.restype = ctypes.c_char_p
    fault = loaded.fastlora_cuda_fault(index)
    return (
        None if fault is None else f"CUDA says of the kernels on device {index}: {fault.decode()}."
    )


def unavailable_reason() -> str | None:
    """One sentence: why the library is missing and how to get it; None when it is there."""
    return _reason


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def fused_tokens(device: torch.device) -> int:
    """`FUSED_TOKENS` of a device; an unknown one counts as the next older one that is listed."""
    capability = torch.cuda.get_device_capability(device)
    known = [listed for listed in FUSED_TOKENS if listed <= capability]
    return FUSED_TOKENS[max(known)] if known else 0


def kernels(op: str, M: int, K: int, blocksize: int, dtype: torch.dtype) -> tuple[str, ...]:
    """The kernels that can run the product with W: "decode" (few tokens), "gemm"; in that order.

    Args:
        op: "lora_linear_fwd" or "lora_linear_bwd", which has no "decode".
        M, K: tokens and in_features.
        blocksize: codes that share an absmax.
        dtype: of the product's operands; the fused kernels have bf16 and fp16.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return ()
    few = op.endswith("fwd") and M <= DECODE_TOKENS and K % 64 == 0 and blocksize % 64 == 0
    return ("decode", "gemm") if few else ("gemm",)


def plan(op: str, M: int, K: int, blocksize: int, dtype: torch.dtype, most: int) -> str:
    """One of `kernels`, or "dequantize" and torch's product: the choice until one is measured.

    Args:
        op, M, K, blocksize, dtype: as in `kernels`.
        most: tokens above which W is decoded before the product.
    """
    able = kernels(op, M, K, blocksize, dtype)
    if "decode" in able:
        return "decode"
    return "dequantize" if not able or most < M else "gemm"


def _fastest(op: str, x: Tensor, layer: Layer, dtype: torch.dtype, blocksize: int) -> str:
    """The kernel that `fastlora tune` kept for such sizes, if it can run these; else `plan`."""
    M, K = x.shape
    kept = tuned.kept(op, x, layer)
    if kept is not None and kept.kernel in kernels(op, M, K, blocksize, dtype):
        return kept.kernel
    return plan(op, M, K, blocksize, dtype, fused_tokens(x.device))


def nested(state: QuantState) -> QuantState:
    """`reference.nested`: torch's mean, then one launch for codes and scales.

    The mean is torch's, since each device sums in its own order: the offset then has the same bits
    as any other caller of torch gets on the device.
    """
    offset, code = state.absmax.mean(), dynamic_code().to(state.absmax.device)
    absmax, scales = ops.quantize_absmax(state.absmax, offset, code)
    state2 = QuantState(scales, absmax.shape, code, torch.float32, NESTED_BLOCKSIZE, "dynamic")
    return replace(state, absmax=absmax, offset=offset, state2=state2)


def _contiguous(layer: Layer) -> Layer:
    return layer._replace(lora_A=layer.lora_A.contiguous(), lora_B=layer.lora_B.contiguous())


class Cuda(Composed):
    """The compiled kernels for GPUs: 4-bit layers and the format itself."""

    name = "native"

    def unsupported(self, request: Request) -> str | None:
        """One sentence that says why a request can't run on a CUDA device, or None."""
        if (
            reason := _reason
            or unsupported_gpu(request.device_index)
            or _fault(request.device_index)
        ):
            return reason
        if request.op not in _FORMAT and not (request.four_bit and request.op in _LINEAR):
            weights = " for dense weights" if request.op in _LINEAR else ""
            return f"{request.op} has no CUDA kernel in the native backend{weights}."
        return unsupported_dtype(request) or unsupported_dropout(request)

    def lora_linear_fwd(
        self, x: Tensor, layer: Layer, kernel: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """`reference.lora_linear_fwd`; `kernel` is one of `kernels`, or the fastest when None."""
        assert layer.quant_state is not None
        if is_empty(layer):
            return reference.lora_linear_fwd(x, layer)
        state, dtype, others = layer.quant_state, layer.compute_dtype or x.dtype, skinny(x.device)
        if kernel is None:
            kernel = _fastest("lora_linear_fwd", x, layer, dtype, state.blocksize)
        if kernel == "dequantize" and others is not None:
            return others.lora_linear_fwd(x, layer)
        layer = _contiguous(layer)
        # The decode kernel reads x once, for both products: in one dtype.
        if kernel == "decode" and x.dtype == dtype:
            return ops.qlora_decode(x, *flatten(layer))
        S = (others or reference).shrink(x, layer)
        B, scaling, bias = layer.lora_B, layer.scaling, layer.bias
        if kernel != "dequantize":
            weight = packed(layer.weight, state)
            return ops.qlora_gemm_fwd(x.to(dtype), *weight, bias, S, B, scaling, x.dtype), S
        W = self.dequantize_4bit(layer.weight, state, dtype)
        y = torch.nn.functional.linear(x.to(dtype), W)
        y = torch.addmm(y.float(), S, B.float().T, alpha=scaling)
        return (y if bias is None else y + bias.float()).to(x.dtype), S

    def lora_linear_bwd(
        self,
        dy: Tensor,
        x: Tensor,
        layer: Layer,
        S: Tensor,
        needs: Needs,
        kernel: str | None = None,
    ) -> Grads:
        """`reference.lora_linear_bwd`; `kernel` as in `lora_linear_fwd`."""
        assert layer.quant_state is not None
        if is_empty(layer):
            return reference.lora_linear_bwd(dy, x, layer, S, needs)
        state, dtype, others = layer.quant_state, layer.compute_dtype or x.dtype, skinny(x.device)
        if kernel is None:
            kernel = _fastest("lora_linear_bwd", x, layer, dtype, state.blocksize)
        if kernel == "dequantize" and others is not None:
            return others.lora_linear_bwd(dy, x, layer, S, needs)
        dS, grads = (others or reference).skinny_bwd(dy, x, layer, S, needs)
        if not needs.x:
            return grads
        if kernel != "dequantize":
            A, p, seed = layer.lora_A.contiguous(), layer.dropout_p, layer.seed
            weight = packed(layer.weight, state)
            dx = ops.qlora_gemm_dx(dy.to(dtype), *weight, dS, A, p, seed, x.dtype)
            return grads._replace(x=dx)
        dx = dy.to(dtype) @ self.dequantize_4bit(layer.weight, state, dtype)
        return grads._replace(x=(dx + reference.expand_dx(dS, layer)).to(x.dtype))

    def quantize_4bit(
        self, weight: Tensor, blocksize: int, quant_type: str, compress_statistics: bool
    ) -> tuple[Tensor, QuantState]:
        return cpu.quantized(ops, weight, blocksize, quant_type, compress_statistics, nested)

    def dequantize_4bit(
        self, data: Tensor, quant_state: QuantState, dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        if out is None:
            out = torch.empty(tuple(quant_state.shape), dtype=dtype, device=data.device)
        ops.dequantize_4bit_out(*packed(data, quant_state), out)
        return out
