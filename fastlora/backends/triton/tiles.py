"""Which tile a kernel takes: data for each class of GPU, and the model that prunes candidates.

An unknown GPU gets the row of the nearest older class, so that it works at once; `fastlora tune`
overrides the table with what it measured (`fastlora.tuning`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """One way to cut a kernel's work.

    Args:
        BM, BN, BK: rows, columns and depth of a tile's product. For the adapter's kernels BN is a
            chunk of ranks and BK the tile of columns of each step.
        warps, stages: of Triton's launch.
        group: rows of tiles that are computed together.
    """

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int
    group: int = 8


@dataclass(frozen=True)
class Arch:
    """The limits of a class of GPUs.

    Args:
        shared: bytes of shared memory that one program may use.
        mma: name of the matrix instruction in the compiled code, 16-bit operands.
        fused_4bit: M up to which the 4-bit base is decoded inside the product; above, it is decoded
            once into a workspace (design figures, not measured here).
        weight_left: the decoded weight is the left operand of the forward's product, so that it
            goes from registers (sm_90) or tensor memory (sm_100) into the matrix unit.
        vendor: the dense product is the vendor's until `fastlora tune` has measured ours as faster.
    """

    shared: int
    mma: str
    fused_4bit: int
    weight_left: bool = False
    vendor: bool = True


KIB = 1024
ARCHS: dict[str, Arch] = {
    "sm_80": Arch(163 * KIB, "HMMA", 512),
    "sm_86": Arch(99 * KIB, "HMMA", 1024),
    "sm_90": Arch(227 * KIB, "HGMMA", 512, weight_left=True),
    "sm_100": Arch(227 * KIB, "UTCHMMA", 128, weight_left=True),
    "sm_120": Arch(99 * KIB, "HMMA", 1024),
    "gfx942": Arch(64 * KIB, "v_mfma", 512),
    # Triton's interpreter, on the CPU, has no limit of shared memory.
    "interpreter": Arch(2**30, "", 64, vendor=False),
}

# Compute capability -> class; one newer than all gets the last.
_CLASSES = (((8, 0), "sm_80"), ((8, 6), "sm_86"), ((9, 0), "sm_90"), ((10, 0), "sm_100"),
            ((12, 0), "sm_120"))  # fmt: skip

# op -> class -> (largest M, tile), in rising order of M; the last entry has no limit. "" serves the
# classes that have no row of their own, " fp32" follows the op where tokens are fp32.
_ANY = 2**62
_ROWS = tuple[tuple[int, Tile], ...]
TILES: dict[str, dict[str, _ROWS]] = {
    "shrink": {
        "": ((64, Tile(16, 16, 128, 2, 3)), (_ANY, Tile(64, 16, 128, 4, 3))),
        "gfx942": ((_ANY, Tile(64, 16, 128, 4, 2)),),
        "interpreter": ((_ANY, Tile(32, 16, 128, 4, 2)),),
    },
    "shrink fp32": {
        "": ((_ANY, Tile(32, 16, 128, 8, 2)),),
        "interpreter": ((_ANY, Tile(32, 16, 128, 4, 2)),),
    },
    "grad_b": {
        "": ((_ANY, Tile(128, 16, 64, 8, 3)),),
        "gfx942": ((_ANY, Tile(64, 16, 64, 4, 2)),),
        "interpreter": ((_ANY, Tile(64, 16, 64, 4, 2)),),
    },
    "grad_a": {
        "": ((_ANY, Tile(64, 16, 128, 8, 3)),),
        "gfx942": ((_ANY, Tile(64, 16, 128, 8, 2)),),
        "interpreter": ((_ANY, Tile(64, 16, 128, 4, 2)),),
    },
    "base_product": {
        "": ((64, Tile(64, 128, 64, 4, 4)), (_ANY, Tile(128, 128, 64, 8, 3))),
        "sm_86": ((64, Tile(64, 128, 64, 4, 3)), (_ANY, Tile(128, 128, 32, 8, 3))),
        "sm_120": ((64, Tile(64, 128, 64, 4, 3)), (_ANY, Tile(128, 128, 32, 8, 3))),
        "gfx942": ((_ANY, Tile(128, 128, 64, 8, 2)),),
        "interpreter": ((_ANY, Tile(64, 128, 64, 4, 2)),),
    },
    "base_product fp32": {
        "": ((_ANY, Tile(64, 128, 16, 8, 3)),),
        "interpreter": ((_ANY, Tile(64, 128, 64, 4, 2)),),
    },
    "base_product_4bit": {
        "": ((16, Tile(16, 128, 64, 4, 3)), (64, Tile(64, 128, 64, 4, 3)),
             (_ANY, Tile(128, 128, 64, 8, 3))),
        # With four warps Triton gives up on the products of wgmma (3.6) and tcgen05 (3.9).
        "sm_90": ((16, Tile(16, 128, 64, 8, 3)), (64, Tile(64, 128, 64, 8, 3)),
                  (_ANY, Tile(128, 128, 64, 8, 3))),
        "sm_100": ((16, Tile(16, 128, 64, 8, 3)), (64, Tile(64, 128, 64, 8, 3)),
                   (_ANY, Tile(128, 128, 64, 8, 3))),
        "gfx942": ((_ANY, Tile(64, 128, 64, 8, 2)),),
        "interpreter": ((_ANY, Tile(32, 128, 64, 4, 2)),),
    },
}  # fmt: skip


# ---- the model that prunes -------------------------------------------------------------------

_WARP = 32
_MOST_REGISTERS = 255
_SIDES = ((64, 128), (128, 64), (128, 128), (128, 256), (256, 128))
_FEW_TOKENS = ((16, 64), (16, 128), (32, 128), (64, 64), (64, 128))


def shared_bytes(tile: Tile, itemsize: int, arch: str, packed: bool) -> int:
    """Shared memory that a base product needs, at least: operands in flight.

    mma.sync and MFMA read the last stage from registers; wgmma and tcgen05 read it in place. A
    packed weight is in flight with half a byte an element, and one tile of it is decoded.
    """
    staged = tile.stages if ARCHS[arch].mma in ("HGMMA", "UTCHMMA") else max(1, tile.stages - 1)
    left, right = tile.BM * tile.BK * itemsize, tile.BN * tile.BK * itemsize
    if packed:
        return staged * (left + tile.BN * tile.BK // 2) + right
    return staged * (left + right)


def registers(tile: Tile, itemsize: int, arch: str, packed: bool) -> int:
    """Registers a thread that a base product needs, roughly: the accumulator, fragments, addresses.

    tcgen05 keeps the accumulator in tensor memory until the end. The constants are those that fit
    the compiled kernels; `tests/test_triton_compiled.py` holds the model to them.
    """
    threads = tile.warps * _WARP
    accumulator = tile.BM * tile.BN // threads
    if ARCHS[arch].mma in ("HGMMA", "UTCHMMA"):
        return accumulator + (90 if packed else 60)
    fragments = (tile.BM + tile.BN) * tile.BK * itemsize // 4 // threads
    return accumulator + 2 * fragments + (90 if packed else 60)


def candidates(kernel: str, arch: str, dtype: torch.dtype, M: int, R: int) -> list[Tile]:
    """Tiles worth measuring, the table's first: those that fit by the model, for this many tokens.

    The dropout mask counts in blocks of 128 columns, so BN is a multiple of it.
    """
    first = default_tile(kernel, arch, dtype, M, R)
    packed, depth = kernel.endswith("4bit"), 16 if dtype == torch.float32 else 64
    found = [first]
    for BM, BN in _FEW_TOKENS if _FEW_TOKENS[-1][0] >= M else _SIDES:
        for BK, warps, stages in ((depth, 4, 3), (depth, 8, 3), (depth, 8, 4), (depth // 2, 8, 4)):
            tile = Tile(BM, BN, BK, warps, stages)
            fits = (
                shared_bytes(tile, dtype.itemsize, arch, packed) <= ARCHS[arch].shared
                and registers(tile, dtype.itemsize, arch, packed) <= _MOST_REGISTERS
            )
            if fits and BN % 128 == 0 and tile not in found:
                found.append(tile)
    return found


def arch_class(capability: tuple[int, int]) -> str:
    """The class of a CUDA device: the newest one that is not newer than it."""
    fitting = [name for since, name in _CLASSES if since <= capability]
    return fitting[-1] if fitting else _CLASSES[0][1]


def default_tile(op: str, arch: str, dtype: torch.dtype, M: int, R: int) -> Tile:
    """The table's tile. Chunks of ranks are as wide as R needs, up to 32."""
    rows = TILES.get(f"{op} fp32", TILES[op]) if dtype == torch.float32 else TILES[op]
    tile = next(tile for limit, tile in rows.get(arch, rows[""]) if limit >= M)
    return tile if op.startswith("base") else with_ranks(op, tile, arch, R)


def with_ranks(kernel: str, tile: Tile, arch: str, R: int) -> Tile:
    """`tile` with chunks of 16 ranks, or of 32 where a thread's registers hold them: beside the
    masks of the shrink, NVIDIA's don't."""
    narrow = R <= 16 or (kernel == "shrink" and arch != "gfx942")
    return Tile(tile.BM, 16 if narrow else 32, tile.BK, tile.warps, tile.stages, tile.group)
