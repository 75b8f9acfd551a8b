"""The native backend on CUDA devices: which kernel of csrc/cuda runs a 4-bit layer's op.

`x W^T` and `dy W` come from one of three kernels, as `plan` says. The skinny products around them,
which touch no W, are Triton's, or plain torch's operations without Triton; but `qlora_decode` makes
S and adds the LoRA term itself. Where W is decoded before its product, Triton runs the whole op.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..quant import NESTED_BLOCKSIZE, QuantState, dynamic_code
from . import grouped
from .machine import tuned
from .machine.gpu import unsupported_gpu

OPS = (
    "qlora_linear_fwd",
    "qlora_linear_bwd",
    "grouped_qlora_linear_fwd",
    "grouped_qlora_linear_bwd",
    "quantize_4bit",
    "dequantize_4bit",
)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# The most tokens for which decoding W inside the product pays, by compute capability; above, W is
# decoded once and multiplied by cuBLAS. Estimates from data sheets: nobody has measured them, and
# what `fastlora tune` has measured goes before them.
FUSED_TOKENS = {(8, 0): 512, (8, 6): 1024, (8, 9): 1024, (9, 0): 512, (10, 0): 128, (12, 0): 1024}
DECODE_TOKENS = 64  # kDecodeTokens in csrc/cuda/kernels.h

ops: Any = torch.ops.fastlora
_reason: str | None = None


def load() -> None:
    """Loads the library fastlora/_CUDA.so, if this torch has CUDA; else `unavailable` says why."""
    global _reason
    path = _library()
    if torch.version.cuda is None:
        _reason = f"this torch ({torch.__version__}) is built without CUDA."
    elif not path.exists():
        _reason = (
            "the library fastlora/_CUDA.so has not been built; in fastlora's source folder, "
            "`CMAKE_ARGS=-DFASTLORA_CUDA=ON pip install --no-build-isolation .` builds it, with "
            "nvcc."
        )
    else:
        try:
            torch.ops.load_library(str(path))
            register_fakes("fastlora")
        except OSError as error:
            _reason = f"the library {path} can't be loaded: {error}"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _fault(index: int | None) -> str | None:
    return _fault_of(torch.cuda.current_device() if index is None else index)


@functools.cache
def _fault_of(index: int) -> str | None:
    """Why the library's kernels don't run on a GPU, or None: it is asked once."""
    library = ctypes.CDLL(str(_library()))
    library.fastlora_cuda_fault.restype = ctypes.c_char_p
    fault = library.fastlora_cuda_fault(index)
    return (
        None if fault is None else f"CUDA says of the kernels on device {index}: {fault.decode()}."
    )


def _library() -> Path:
    return Path(__file__).parents[1] / "_CUDA.so"


def unavailable_reason() -> str | None:
    """One sentence: why the library is missing and how to get it; None when it is there."""
    return _reason


def unsupported(
    op: str, index: int | None, *dtypes: torch.dtype | None, dropout_p: float = 0.0
) -> str | None:
    """One sentence that says why `op` can't run on CUDA device `index`, or None."""
    if reason := _reason or unsupported_gpu(index) or _fault(index):
        return reason
    if op not in OPS:
        return f"{op} has no CUDA kernel in the native backend."
    for dtype in dtypes:
        if dtype is not None and dtype not in _DTYPES:
            return f"{op} takes fp32, bf16 and fp16, got {dtype}."
    return grouped.unsupported(op, dropout_p)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def fused_tokens(device: torch.device) -> int:
    """`FUSED_TOKENS` of a device; unknown ones are taken for the next older one that is listed."""
    capability = torch.cuda.get_device_capability(device)
    known = [listed for listed in FUSED_TOKENS if listed <= capability]
    return FUSED_TOKENS[max(known)] if known else 0


def kernels(op: str, M: int, K: int, blocksize: int, dtype: torch.dtype) -> tuple[str, ...]:
    """The kernels that can run the product with W: "decode" (few tokens), "gemm"; in that order.

    Args:
        op: "qlora_linear_fwd" or "qlora_linear_bwd", which has no "decode".
        M, K: tokens and in_features.
        blocksize: codes that share an absmax.
        dtype: of the product's operands; the fused kernels have bf16 and fp16.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return ()
    few = op.endswith("fwd") and M <= DECODE_TOKENS and K % 64 == 0 and blocksize % 64 == 0
    return ("decode", "gemm") if few else ("gemm",)


def plan(op: str, M: int, K: int, blocksize: int, dtype: torch.dtype, most: int) -> str:
    """One of `kernels`, or "dequantize" and torch's product: what is taken until it is measured.

    Args:
        op, M, K, blocksize, dtype: as in `kernels`.
        most: tokens above which W is decoded apart.
    """
    able = kernels(op, M, K, blocksize, dtype)
    if "decode" in able:
        return "decode"
    return "dequantize" if not able or most < M else "gemm"


def _fastest(op: str, x: Tensor, dtype: torch.dtype, blocksize: int, N: int, R: int) -> str:
    """The kernel that `fastlora tune` kept for such sizes, if it can run these; else `plan`."""
    M, K = x.shape
    kept = tuned.native_kernel(op, x, dtype, N, R)
    if kept is not None and kept in kernels(op, M, K, blocksize, dtype):
        return kept
    return plan(op, M, K, blocksize, dtype, fused_tokens(x.device))


def state_args(state: QuantState) -> tuple[Any, ...]:
    """A quant state as the ops take it: absmax, code, three nested tensors, blocksize."""
    return *state.tensors(), state.blocksize


def nested(state: QuantState) -> QuantState:
    """`reference.nested`: torch's mean, then one launch for codes and scales.

    The mean is torch's because the order of its sum is each device's own: so the offset has the
    bits that torch, and whoever calls torch, gets on the same device.
    """
    offset, code = state.absmax.mean(), dynamic_code().to(state.absmax.device)
    absmax, scales = ops.quantize_absmax(state.absmax, offset, code)
    state2 = QuantState(scales, absmax.shape, code, torch.float32, NESTED_BLOCKSIZE, "dynamic")
    return replace(state, absmax=absmax, offset=offset, state2=state2)


def skinny(device: torch.device) -> ModuleType:
    """Who makes the products that touch no W: the Triton backend, else the reference."""
    from . import triton

    missing = triton.unsupported("lora_linear_fwd", device.type, index=device.index)
    return reference if missing else triton


def _decoded(weight: Tensor, state: QuantState, dtype: torch.dtype) -> Tensor:
    out = torch.empty(tuple(state.shape), dtype=dtype, device=weight.device)
    ops.dequantize_4bit_out(weight, *state_args(state), out)
    return out


def qlora_linear_fwd(
    x: Tensor,
    weight: Tensor,
    quant_state: QuantState,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    kernel: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference.qlora_linear_fwd`; `kernel` is one of `kernels`, or whichever is the fastest."""
    dtype, others = compute_dtype or x.dtype, skinny(x.device)
    if kernel is None:
        kernel = _fastest("qlora_linear_fwd", x, dtype, quant_state.blocksize, *lora_B.shape)
    if kernel == "dequantize" and others is not reference:
        lora = (bias, lora_A, lora_B, scaling, dropout_p, seed)
        return others.qlora_linear_fwd(x, weight, quant_state, *lora, compute_dtype)
    quant = (weight, *state_args(quant_state))
    lora_A, lora_B = lora_A.contiguous(), lora_B.contiguous()
    # The decode kernel reads x once, for both products: in one dtype.
    if kernel == "decode" and x.dtype == dtype:
        return ops.qlora_decode(x, *quant, bias, lora_A, lora_B, scaling, dropout_p, seed)
    S = others.shrink(x, lora_A, dropout_p, seed)
    if kernel != "dequantize":
        y = ops.qlora_gemm_fwd(x.to(dtype), *quant, bias, S, lora_B, scaling, x.dtype)
        return y, S
    y = torch.nn.functional.linear(x.to(dtype), _decoded(weight, quant_state, dtype))
    y = torch.addmm(y.float(), S, lora_B.float().T, alpha=scaling)
    return (y if bias is None else y + bias.float()).to(x.dtype), S


def qlora_linear_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    quant_state: QuantState,
    lora_A: Tensor,
    lora_B: Tensor,
    S: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    needs: tuple[bool, bool, bool, bool] = (True, True, True, False),
    kernel: str | None = None,
) -> tuple[Tensor | None, ...]:
    """`reference.qlora_linear_bwd`; `kernel` as in `qlora_linear_fwd`."""
    dtype, others = compute_dtype or x.dtype, skinny(x.device)
    if kernel is None:
        kernel = _fastest("qlora_linear_bwd", x, dtype, quant_state.blocksize, *lora_B.shape)
    lora = (lora_A, lora_B, S, scaling, dropout_p, seed)
    if kernel == "dequantize" and others is not reference:
        return others.qlora_linear_bwd(dy, x, weight, quant_state, *lora, compute_dtype, needs)
    dS, *grads = others.skinny_bwd(dy, x, *lora, needs[1:])
    if not needs[0]:
        return None, *grads
    if kernel != "dequantize":
        quant = (weight, *state_args(quant_state))
        A = lora_A.contiguous()
        dx = ops.qlora_gemm_dx(dy.to(dtype), *quant, dS, A, dropout_p, seed, x.dtype)
        return dx, *grads
    dx = dy.to(dtype) @ _decoded(weight, quant_state, dtype)
    return (dx + reference.expand_dx(dS, lora_A, dropout_p, seed)).to(x.dtype), *grads


def register_fakes(namespace: str) -> None:
    """Shapes without data, for torch.compile."""

    @torch.library.register_fake(f"{namespace}::quantize_absmax")
    def _(absmax, offset, code):  # type: ignore[no-untyped-def]
        scales = -(-absmax.numel() // NESTED_BLOCKSIZE)
        return absmax.new_empty(absmax.numel(), dtype=torch.uint8), absmax.new_empty(scales)

    @torch.library.register_fake(f"{namespace}::qlora_gemm_fwd")
    def _(  # type: ignore[no-untyped-def]
        x, weight, absmax, code, n_absmax, n_code, n_offset, blocksize, bias, S, B, scaling, dtype
    ):
        return x.new_empty((x.shape[0], B.shape[0]), dtype=dtype)

    @torch.library.register_fake(f"{namespace}::qlora_gemm_dx")
    def _(  # type: ignore[no-untyped-def]
        dy, weight, absmax, code, n_absmax, n_code, n_offset, blocksize, dS, A, p, seed, dtype
    ):
        return dy.new_empty((dy.shape[0], A.shape[1]), dtype=dtype)

    @torch.library.register_fake(f"{namespace}::qlora_decode")
    def _(  # type: ignore[no-untyped-def]
        x, weight, absmax, code, n_absmax, n_code, n_offset, blocksize, bias, A, B, *options
    ):
        S = x.new_empty((x.shape[0], A.shape[0]), dtype=torch.float32)
        return x.new_empty((x.shape[0], B.shape[0])), S


load()
