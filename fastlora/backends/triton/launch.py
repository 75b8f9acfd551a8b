"""From a torch device to a launch: what the device is, which tile it takes, how work is split."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from .tiles import ARCHS, Arch, Tile, arch_class, default_tile

__all__ = ["Launcher", "Tile", "launcher"]

# M, N, K, R of an op.
Sizes = tuple[int, int, int, int]
# Programs for each processor when a sum is split: enough to hide the tail, few partial sums.
_WAVES = 2


@dataclass(frozen=True)
class Launcher:
    """Launches kernels on one device.

    Args:
        arch: a class of `tiles.ARCHS`.
        processors: streaming multiprocessors, or compute units.
        device: CUDA device index; None in the interpreter.
    """

    arch: str
    processors: int
    device: int | None = None

    @property
    def limits(self) -> Arch:
        """What the device's class allows."""
        return ARCHS[self.arch]

    @property
    def words(self) -> bool:
        """True where the 4-bit decoder is NVIDIA's byte permute, False for its plain twin."""
        return self.arch.startswith("sm_")

    def table_tile(self, kernel: str, dtype: torch.dtype, *, M: int, R: int) -> Tile:
        """The table's tile of `kernel`, whatever was measured."""
        return default_tile(kernel, self.arch, dtype, M, R)

    def tile(self, kernel: str, dtype: torch.dtype, *, M: int, K: int, R: int) -> Tile:
        """The tile of one of the adapter's kernels, for tokens [M, K]."""
        return self.table_tile(kernel, dtype, M=M, R=R)

    def dense_tile(self, op: str, dtype: torch.dtype, sizes: Sizes) -> Tile | None:
        """The tile of op's dense product; None where the vendor's product is taken."""
        if self.limits.vendor:
            return None
        return self.table_tile("base_product", dtype, M=sizes[0], R=sizes[3])

    def four_bit_tiles(
        self, op: str, base: torch.dtype, sizes: Sizes
    ) -> tuple[Tile | None, Tile | None]:
        """The tiles of the product that decodes on its way, None for many tokens, and of the dense
        product on a decoded weight."""
        M, _, _, R = sizes
        dense = self.dense_tile(op, base, sizes)
        if self.limits.fused_4bit < M:
            return None, dense
        return self.table_tile("base_product_4bit", base, M=M, R=R), dense

    def split(self, jobs: int, steps: int) -> tuple[int, int]:
        """How many of `steps` one program takes, and how many programs share them.

        Args:
            jobs: programs when no sum is split.
            steps: tiles that each of them walks.
        """
        wanted = max(1, min(steps, _WAVES * self.processors // max(jobs, 1)))
        each = max(1, triton.cdiv(steps, wanted))
        return each, max(1, triton.cdiv(steps, each))

    def run(self, kernel: Any, grid: tuple[int, ...], *args: Any, tile: Tile | None = None,
            **constants: Any) -> None:  # fmt: skip
        """Launches `kernel` on the current stream; nothing for an empty grid.

        A fused multiply-add would round absmax and code once where bitsandbytes rounds twice, so
        it is switched off; products on the matrix unit don't change.
        """
        if 0 in grid:
            return
        options: dict[str, Any] = {"enable_fp_fusion": False}
        if tile is not None:
            options |= {"num_warps": tile.warps, "num_stages": tile.stages}
        if self.device is None:
            kernel[grid](*args, **constants)
            return
        with torch.cuda.device(self.device):
            kernel[grid](*args, **constants, **options)


@functools.cache
def _cuda_launcher(index: int) -> Launcher:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        arch = "gfx942"
    else:
        arch = arch_class((properties.major, properties.minor))
    return Launcher(arch, properties.multi_processor_count, index)


def launcher(x: Tensor) -> Launcher:
    """The launcher of x's device."""
    if x.device.type == "cpu":
        return Launcher("interpreter", 2)
    index = x.device.index
    return _cuda_launcher(torch.cuda.current_device() if index is None else index)
