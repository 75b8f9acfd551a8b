"""Compiles kernels ahead of time, without a GPU: exactly those that the ops would launch.

An op runs on tensors without data (device "meta") with a launcher that notes each launch instead
of making it. The notes hold the arguments, and so the types, divisibilities and constants for which
Triton would specialise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ...layer import Layer, Needs
from ...quant import NESTED_BLOCKSIZE, QuantState
from ...tuning import Choice
from ..machine.gpu import Sizes
from ..schemas import packed
from .kernels.dequantize_4bit import dequantize_4bit
from .launch import Launcher, choice_of
from .linear import lora_linear_bwd, lora_linear_fwd
from .tiles import Tile

_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Launch:
    """One launch that an op would make."""

    kernel: Any
    args: tuple[Any, ...]
    constants: dict[str, Any]
    tile: Tile | None


@dataclass(frozen=True)
class Recorder(Launcher):
    """A launcher that notes what it is asked to launch."""

    launches: list[Launch] = field(default_factory=list)
    ours: bool = False  # the dense product is our kernel, as after tuning

    def run(self, kernel: Any, grid: tuple[int, ...], *args: Any, tile: Tile | None = None,
            **constants: Any) -> None:  # fmt: skip
        """Notes the launch."""
        self.launches.append(Launch(kernel, args, constants, tile))

    def choice(self, op: str, dtype: torch.dtype, sizes: Sizes) -> Choice | None:
        """Our kernel for the dense product where `ours` is set, whatever was measured here."""
        if self.ours and op.startswith("lora"):
            return choice_of(self.table_tile("base_product", dtype, M=sizes[0], R=sizes[3]))
        return None


def target(arch: str) -> GPUTarget:
    """Triton's name for a class of GPUs."""
    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    return GPUTarget("hip", arch, 64)


def compile_launch(launch: Launch, arch: str) -> Any:
    """Triton's compiled kernel, as the device's own launch would have it compiled."""
    kernel = launch.kernel
    given = dict(zip(kernel.arg_names, launch.args, strict=False)) | launch.constants
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(kernel.params):
        name, value = parameter.name, given[parameter.name]
        specialised = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (_is_int(value, specialised) and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name] = _type_of(value)
        # Fresh tensors begin at a multiple of 16 bytes.
        if isinstance(value, Tensor) or (_is_int(value, specialised) and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
        # AMD's tensors below 2 GiB are read by buffer instructions.
        if isinstance(value, Tensor) and not arch.startswith("sm_"):
            attributes[(index,)] += [["tt.pointer_range", 32]]
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    options: dict[str, Any] = {"enable_fp_fusion": False}
    if launch.tile is not None:
        options |= {"num_warps": launch.tile.warps, "num_stages": launch.tile.stages}
    return triton.compile(source, target=target(arch), options=options)


def _is_int(value: Any, specialised: bool) -> bool:
    return specialised and isinstance(value, int) and not isinstance(value, bool)


def _type_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"*{_TYPES[value.dtype]}"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


# ---- the kernels that are compiled -------------------------------------------------------------

# N, K of Llama's attention; tokens and ranks: a batch, a short prompt, decoding, a large rank.
LAYER = (4096, 4096)
TOKENS_AND_RANKS = ((4096, 16), (64, 16), (16, 16), (4096, 64))


def launches(arch: str, dtype: torch.dtype, adapter_dtype: torch.dtype) -> dict[str, Launch]:
    """Every kernel with every tile of the table, by name, with dropout, bias, nested absmax."""
    found: dict[str, Launch] = {}
    usual = TOKENS_AND_RANKS[0]
    for tokens, rank in TOKENS_AND_RANKS:
        for direction, call in op_calls(tokens, rank, dtype, adapter_dtype):
            gpu = Recorder(arch, 128, ours=True)
            call(gpu)
            for launch in gpu.launches:
                name = launch.kernel.__name__.removesuffix("_kernel")
                if name.startswith("base_product"):
                    name = f"{name} {direction}"
                alike = (found[key] for key in found if key.split(",")[0] == name)
                if any(same_code(launch, known) for known in alike):
                    continue
                if tokens != usual[0]:
                    name = f"{name}, M <= {tokens}"
                elif rank != usual[1]:
                    name = f"{name}, R = {rank}"
                found[name] = launch
    return found


def same_code(a: Launch, b: Launch) -> bool:
    """True when both launches compile to the same: the same tile and constants."""
    return a.tile == b.tile and a.constants == b.constants


def op_calls(
    M: int,
    R: int,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    shape: tuple[int, int] = LAYER,
) -> Iterator[tuple[str, Callable[[Launcher], Any]]]:
    """The ops on [M, K] tokens without data: the direction of their base product, and the call.

    For the 4-bit ops M is at most what their class of GPU decodes inside the product.
    """
    N, K = shape

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, dy = empty(M, K, dtype=dtype), empty(M, N, dtype=dtype)
    weight, bias = empty(N, K, dtype=dtype), empty(N, dtype=dtype)
    A, B = empty(R, K, dtype=adapter_dtype), empty(N, R, dtype=adapter_dtype)
    S, seed = empty(M, R, dtype=torch.float32), empty(1, dtype=torch.int64)
    blocks = N * K // 64
    scales = empty(blocks // NESTED_BLOCKSIZE, dtype=torch.float32)
    table = empty(256, dtype=torch.float32)
    state = QuantState(
        absmax=empty(blocks, dtype=torch.uint8),
        shape=torch.Size((N, K)),
        code=empty(16, dtype=torch.float32),
        dtype=dtype,
        blocksize=64,
        quant_type="nf4",
        offset=empty(dtype=torch.float32),
        state2=QuantState(
            scales, torch.Size((blocks,)), table, torch.float32, NESTED_BLOCKSIZE, "dynamic"
        ),
    )
    dense = Layer(weight, A, B, 1.5, bias, dropout_p=0.1, seed=seed)
    four_bit = dense._replace(weight=empty(N * K // 2, dtype=torch.uint8), quant_state=state)
    needs = Needs(True, True, True, True)
    yield "fwd", lambda gpu: lora_linear_fwd(gpu, x, dense)
    yield "dx", lambda gpu: lora_linear_bwd(gpu, dy, x, dense, S, needs)

    def fused_fwd(gpu: Launcher) -> None:
        lora_linear_fwd(gpu, x[: gpu.limits.fused_4bit], four_bit)

    def fused_dx(gpu: Launcher) -> None:
        m = gpu.limits.fused_4bit
        lora_linear_bwd(gpu, dy[:m], x[:m], four_bit, S[:m], needs)

    if dtype != torch.float32:
        yield "fwd", fused_fwd
        yield "dx", fused_dx
    yield "", lambda gpu: dequantize_4bit(gpu, packed(four_bit.weight, state), weight)
