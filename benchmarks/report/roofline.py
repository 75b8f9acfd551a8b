"""A model of the time of a LoRA layer on a GPU, from bytes, FLOPs and launches only.

    python -m benchmarks.report.roofline              the table
    python -m benchmarks.report.roofline --markdown   as Markdown, for docs/gpu.md

Nothing here was measured. Each kernel takes the longer of its bytes at the memory's rate and its
FLOPs at the matrix unit's rate, plus a fixed time for its launch. Kernels run one after the other.
fastlora's are counted from the launches of its ops, PEFT's from its sequence of torch calls.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from . import document


@dataclass(frozen=True)
class Gpu:
    """Rates of a GPU, from its data sheet.

    Args:
        arch, processors: class, and number of streaming multiprocessors.
        memory: bytes/s. dense: bf16 FLOP/s with fp32 sums, without sparsity. vector: fp32 FLOP/s.
    """

    arch: str
    processors: int
    memory: float
    dense: float
    vector: float


# NVIDIA's data sheets: A100 80 GB SXM, GeForce RTX 4090, H100 SXM, B200 (one GPU of HGX).
GPUS = {
    "A100": Gpu("sm_80", 108, 2.04e12, 312e12, 19.5e12),
    "RTX 4090": Gpu("sm_86", 128, 1.01e12, 165e12, 82.6e12),
    "H100": Gpu("sm_90", 132, 3.35e12, 989e12, 67e12),
    "B200": Gpu("sm_100", 148, 8.0e12, 2250e12, 75e12),
}
# Shares of the peak that a library's product reaches, and a stream of bytes of the memory's rate.
PRODUCT_SHARE, STREAM_SHARE = 0.75, 0.85
LAUNCH = 3e-6
BF16, FP32 = 2, 4


@dataclass(frozen=True)
class Kernel:
    """One launch: bytes moved, FLOPs on the matrix unit in bf16, FLOPs in fp32 without it."""

    what: str
    bytes: float
    flops: float = 0.0
    vector_flops: float = 0.0

    def seconds(self, gpu: Gpu) -> float:
        """The longest of its three costs, and the launch."""
        return LAUNCH + max(
            self.bytes / (STREAM_SHARE * gpu.memory),
            self.flops / (PRODUCT_SHARE * gpu.dense),
            self.vector_flops / (PRODUCT_SHARE * gpu.vector),
        )


@dataclass(frozen=True)
class Size:
    """A layer and its tokens; dropout is on, the base is dense bf16, adapters are fp32."""

    M: int
    N: int
    K: int
    R: int

    @property
    def x(self) -> int:
        """Elements of x."""
        return self.M * self.K

    @property
    def y(self) -> int:
        """Elements of y."""
        return self.M * self.N

    @property
    def weight(self) -> int:
        """Elements of W."""
        return self.N * self.K


def frozen(s: Size) -> list[Kernel]:
    """y = x W^T and dx = dy W: the cost of a layer without adapter."""
    moved = BF16 * (s.x + s.y + s.weight)
    return [Kernel("y", moved, 2 * s.M * s.weight), Kernel("dx", moved, 2 * s.M * s.weight)]


def ours(s: Size, arch: str = "sm_90", processors: int = 132) -> list[Kernel]:
    """The launches of the ops at this size: each reads or writes its tensors once.

    Args:
        arch, processors: of the GPU; they decide into how many parts a sum is split.
    """
    import torch

    from fastlora.backends.triton import aot

    gpu = aot.Recorder(arch, processors, ours=True)
    calls = aot.op_calls(s.M, s.R, torch.bfloat16, torch.float32, (s.N, s.K))
    for _, call in itertools.islice(calls, 2):  # a dense base, forward and backward
        call(gpu)
    exact = 3 * 2 * s.R  # an fp32 adapter takes three bf16 products
    flops = {
        "shrink": [exact * s.x],
        "base_product": [(2 * s.K + exact) * s.y, (2 * s.N + exact) * s.x],
        "grad_b": [2 * exact * s.y],
        "grad_a": [exact * s.x],
    }
    kernels = []
    for launch in gpu.launches:
        name = launch.kernel.__name__.removesuffix("_kernel")
        tensors = [arg for arg in launch.args if isinstance(arg, torch.Tensor)]
        moved = sum(t.numel() * t.itemsize for t in tensors)
        kernels.append(Kernel(name, moved, flops[name].pop(0) if name in flops else 0.0))
    return kernels


def peft(s: Size) -> list[Kernel]:
    """PEFT as it comes: fp32 adapters, x copied to fp32, dropout with a stored mask."""
    low = FP32 * s.M * s.R
    y, dx = frozen(s)
    return [
        y,
        Kernel("x to fp32", (BF16 + FP32) * s.x),
        Kernel("dropout", (FP32 + FP32 + 1) * s.x),
        Kernel("A", FP32 * s.x + low, 0, 2 * s.x * s.R),
        Kernel("B", FP32 * s.y + low, 0, 2 * s.y * s.R),
        Kernel("scale", 2 * FP32 * s.y),
        Kernel("add, in fp32", (BF16 + FP32 + FP32) * s.y),
        Kernel("y to bf16", (FP32 + BF16) * s.y),
        Kernel("dy to fp32", (BF16 + FP32) * s.y),
        Kernel("dy to bf16 for the base", (FP32 + BF16) * s.y),
        Kernel("scale of dy", 2 * FP32 * s.y),
        Kernel("dB", FP32 * s.y + low, 0, 2 * s.y * s.R),
        Kernel("dS", FP32 * s.y + low, 0, 2 * s.y * s.R),
        Kernel("dA", FP32 * s.x + low, 0, 2 * s.x * s.R),
        Kernel("dS A", FP32 * s.x + low, 0, 2 * s.x * s.R),
        Kernel("dropout's gradient", (FP32 + FP32 + 1) * s.x),
        Kernel("to bf16", (FP32 + BF16) * s.x),
        dx,
        Kernel("sum of both dx", 3 * BF16 * s.x),
    ]


def addmm(s: Size) -> list[Kernel]:
    """Adapters in bf16, dropout with a stored mask, the LoRA term by addmm in both directions."""
    low = BF16 * s.M * s.R
    y, dx = frozen(s)
    return [
        y,
        Kernel("dropout", (BF16 + BF16 + 1) * s.x),
        Kernel("A", BF16 * s.x + low, 2 * s.x * s.R),
        Kernel("addmm", 2 * BF16 * s.y + low, 2 * s.y * s.R),
        Kernel("dS", BF16 * s.y + low, 2 * s.y * s.R),
        Kernel("dB", BF16 * s.y + low, 2 * s.y * s.R),
        Kernel("dA", BF16 * s.x + low, 2 * s.x * s.R),
        Kernel("dS A", BF16 * s.x + low, 2 * s.x * s.R),
        Kernel("dropout's gradient", (BF16 + BF16 + 1) * s.x),
        Kernel("addmm of dx", dx.bytes + BF16 * s.x, dx.flops),
    ]


PROVIDERS: dict[str, Callable[[Size, Gpu], list[Kernel]]] = {
    "frozen": lambda size, gpu: frozen(size),
    "PEFT": lambda size, gpu: peft(size),
    "addmm": lambda size, gpu: addmm(size),
    "fastlora": lambda size, gpu: ours(size, gpu.arch, gpu.processors),
}
# Sizes as in LoRAFusion (arXiv:2510.00206): r = 16, dropout 0.1.
SIZES = tuple(Size(M, width, width, 16) for width in (4096, 5120, 8192) for M in (2048, 4096, 8192))


def seconds(kernels: Iterable[Kernel], gpu: Gpu) -> float:
    """One kernel after the other."""
    return sum(kernel.seconds(gpu) for kernel in kernels)


def rows() -> list[tuple[str, ...]]:
    """GPU, size, then of each provider the modelled time of a step over that of the frozen layer;
    last, PEFT's and addmm's time over ours."""
    table = []
    for name, gpu in GPUS.items():
        for size in SIZES:
            times = {who: seconds(make(size, gpu), gpu) for who, make in PROVIDERS.items()}
            table.append(
                (
                    name,
                    f"{size.K}",
                    f"{size.M}",
                    f"{times['frozen'] * 1e3:.3f}",
                    *(f"{times[who] / times['frozen']:.2f}" for who in list(PROVIDERS)[1:]),
                    f"{times['PEFT'] / times['fastlora']:.2f}",
                    f"{times['addmm'] / times['fastlora']:.2f}",
                )
            )
    return table


HEADER = (
    *("GPU", "K = N", "M", "frozen ms (model)", "PEFT / frozen", "addmm / frozen"),
    *("fastlora / frozen", "PEFT / fastlora", "addmm / fastlora"),
)


def markdown() -> str:
    """The table for docs/gpu.md."""
    return document.markdown(HEADER, rows())


def main(argv: list[str] | None = None) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="benchmarks.report.roofline", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--markdown", action="store_true", help="as Markdown")
    if parser.parse_args(argv).markdown:
        print(markdown())
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table(*HEADER, title="A model, not a measurement", box=None)
    for row in rows():
        table.add_row(*row)
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
