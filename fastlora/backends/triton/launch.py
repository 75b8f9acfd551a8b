"""From a torch device to a launch: the device's class, its tile, and how work is split."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import triton
from torch import Tensor

from ... import tuning
from ..machine.gpu import Sizes, device_key, shape_key, triton_version
from .tiles import ARCHS, Arch, Tile, arch_class, default_tile

_INTERPRETER = tuning.device_key("interpreter", f"triton {triton_version()}")
# Programs for each processor when a sum is split: enough to hide the tail, few partial sums.
_WAVES = 2


def tile_of(choice: tuning.Choice) -> Tile | None:
    """The tile that a kept choice names; None for the vendor's product."""
    if choice["way"] == "vendor":
        return None
    return Tile(*(int(choice[field.name]) for field in fields(Tile)))


def _is_whole(choice: tuning.Choice) -> bool:
    """False for an entry of the cache that isn't ours."""
    if choice.get("way") == "vendor":
        return True
    return all(isinstance(choice.get(field.name), int) for field in fields(Tile))


def choice_of(tile: Tile | None) -> tuning.Choice:
    """Undoes `tile_of`."""
    return {"way": "vendor"} if tile is None else {"way": "ours", **asdict(tile)}


@dataclass(frozen=True)
class Launcher:
    """Launches kernels on one device.

    Args:
        arch: a class of `tiles.ARCHS`.
        processors: streaming multiprocessors, or compute units.
        device: CUDA device index; None in the interpreter.
        key: the device in the cache of tuned choices.
        trial: a choice that is being measured, used in place of the stored one.
    """

    arch: str
    processors: int
    device: int | None = None
    key: str = ""
    trial: tuning.Choice | None = None

    @property
    def limits(self) -> Arch:
        """The limits of the device's class."""
        return ARCHS[self.arch]

    @property
    def words(self) -> bool:
        """True if the 4-bit decoder is NVIDIA's byte permute, False for its plain twin."""
        return self.arch.startswith("sm_")

    def table_tile(self, kernel: str, dtype: torch.dtype, *, M: int, R: int) -> Tile:
        """The table's tile of `kernel`, whatever was measured."""
        return default_tile(kernel, self.arch, dtype, M, R)

    def tile(self, kernel: str, dtype: torch.dtype, *, M: int, K: int, R: int) -> Tile:
        """The tile of one of the adapter's kernels, for tokens [M, K]."""
        return self.table_tile(kernel, dtype, M=M, R=R)

    def choice(self, op: str, dtype: torch.dtype, sizes: Sizes) -> tuning.Choice | None:
        """The choice of `fastlora tune` for this op, dtype and class of sizes, or None."""
        if self.trial is not None:
            return self.trial
        choice = tuning.lookup(self.key, op, shape_key(dtype, sizes))
        return choice if choice is not None and _is_whole(choice) else None

    def dense_tile(self, op: str, dtype: torch.dtype, sizes: Sizes) -> Tile | None:
        """The tile of op's dense product; None for the vendor's product."""
        choice = self.choice(op, dtype, sizes)
        if choice is not None:
            return tile_of(choice)
        if self.limits.vendor:
            return None
        return self.table_tile("base_product", dtype, M=sizes[0], R=sizes[3])

    def four_bit_tiles(
        self, op: str, base: torch.dtype, sizes: Sizes
    ) -> tuple[Tile | None, Tile | None]:
        """The tiles of the product that decodes on its way, None to decode before it, and of the
        dense product on a decoded weight, None for the vendor's."""
        choice = self.choice(op, base, sizes)
        dense = (
            None
            if self.limits.vendor
            else self.table_tile("base_product", base, M=sizes[0], R=sizes[3])
        )
        if choice is not None:
            return tile_of(choice), dense
        if self.limits.fused_4bit < sizes[0]:
            return None, dense
        return self.table_tile("base_product_4bit", base, M=sizes[0], R=sizes[3]), dense

    def split(self, jobs: int, steps: int) -> tuple[int, int]:
        """How many of `steps` one program runs, and how many programs share them.

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
def cuda_launcher(index: int) -> Launcher:
    """The launcher of a GPU."""
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        arch = "gfx942"
    else:
        arch = arch_class((properties.major, properties.minor))
    return Launcher(arch, properties.multi_processor_count, index, device_key(index))


def launcher(x: Tensor) -> Launcher:
    """The launcher of x's device."""
    if x.device.type == "cpu":
        return Launcher("interpreter", 2, key=_INTERPRETER)
    index = x.device.index
    return cuda_launcher(torch.cuda.current_device() if index is None else index)
