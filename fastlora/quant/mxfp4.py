"""MXFP4 of the OCP Microscaling Formats, as gpt-oss checkpoints store it.

    weight[i] = E2M1[nibble[i]] * 2^(scale[i // 32] - 127)

An element is E2M1: a sign, two exponent bits, one mantissa bit. A scale is E8M0: a biased exponent,
or NaN for 255. 32 neighbours along the last dimension share a scale.

The kernels know neither. E2M1 is a code table like any other, and a scale is an 8-bit absmax whose
table holds the 256 powers of two, with `state2.absmax` 1 and offset 0. These products are exact in
fp32, except that 2^127 times 2 or more overflows to infinity. A state adds 4 bytes for each 256
scales, and the two tables, to the bytes of the checkpoint.

Checkpoints store the first of two elements in the low nibble; kernels read it from the high one.
The nibbles are swapped once, when a weight is read, and again when it is written. That costs one
pass over the bytes, and no kernel needs to know.

Source: OCP Microscaling Formats (MX) Specification, version 1.0, sections 5 and 6.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .format import Format
from .state import NESTED_BLOCKSIZE, QuantState, packed_bytes

BLOCKSIZE = 32
BIAS = 127
NAN_SCALE = 255
_MAX_EXPONENT = 2  # of E2M1: its largest value is 6 = 1.5 * 2^2
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E8M0 = (*(2.0 ** (scale - BIAS) for scale in range(NAN_SCALE)), float("nan"))


@dataclass(frozen=True)
class Mxfp4(Format):
    """E2M1 elements, an E8M0 scale for each 32 of a row."""

    name: str = "mxfp4"
    code: tuple[float, ...] = _MAGNITUDES + tuple(-value for value in _MAGNITUDES)
    blocksizes: tuple[int, ...] = (BLOCKSIZE,)
    blocksize: int = BLOCKSIZE
    nests: bool = False
    whole_rows: bool = True

    def quantize(
        self, weight: Tensor, blocksize: int | None = None, compress_statistics: bool = False
    ) -> tuple[Tensor, QuantState]:
        """`e = floor(log2(max|block|)) - 2`, `nibble[i] = E2M1(weight[i] / 2^e)`.

        e is clamped to E8M0's range, [-127, 127]. An element is rounded to the nearest value, or
        midway between two to the one with an even mantissa, and saturates at 6; zeros keep their
        sign. A block of zeros gets scale 0 (2^-127). E2M1 has no NaN and
        infinity, and the specification leaves them open: the block gets the scale NaN and decodes
        to NaN, since a finite number would hide them.

        Source: OCP MX 1.0, section 6.3.
        """
        self.check(weight, blocksize, compress_statistics)
        rows = weight.detach().reshape(-1, BLOCKSIZE).float()
        largest = rows.abs().amax(dim=1)
        # largest = m 2^exponent with m in [0.5, 1).
        exponent = largest.frexp().exponent - 1 - _MAX_EXPONENT
        scales = (exponent + BIAS).clamp(0, NAN_SCALE - 1)
        scales = scales.where(largest != 0, 0).where(largest.isfinite(), NAN_SCALE)
        # The reciprocal of 2^e is exact; of NaN it is NaN, at index -1.
        scaled = rows * scale_table(weight.device)[NAN_SCALE - 1 - scales][:, None]
        bounds = _rounding_bounds(weight.device)
        codes = torch.bucketize(scaled.abs().nan_to_num(0.0), bounds, out_int32=True)
        codes = (codes + 8 * scaled.signbit()).to(torch.uint8).view(-1)
        packed = (codes[::2] << 4 | codes[1::2])[:, None]
        state = _state(scales.to(torch.uint8), weight.shape, weight.dtype)
        return packed, state

    def to_entries(self, packed: Tensor, state: QuantState) -> dict[str, Tensor]:
        """`<name>_blocks` and `<name>_scales`, see `to_mxfp4`."""
        blocks, scales = to_mxfp4(packed, state)
        return {"_blocks": blocks, "_scales": scales}

    def owns(self, entries: Mapping[str, Tensor]) -> bool:
        """Whether there are blocks or scales."""
        return "_blocks" in entries or "_scales" in entries

    def from_entries(
        self, entries: Mapping[str, Tensor], like: QuantState
    ) -> tuple[Tensor, QuantState]:
        """See `from_mxfp4`; the dtype is that of `like`, since checkpoints don't store it."""
        if missing := {"_blocks", "_scales"} - entries.keys():
            raise ValueError(f"entries must have _blocks and _scales, missing {sorted(missing)}")
        return from_mxfp4(entries["_blocks"], entries["_scales"], like.dtype)


MXFP4 = Mxfp4()


def from_mxfp4(
    blocks: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, QuantState]:
    """The weight of a gpt-oss checkpoint, as fastlora's ops and layers take it.

    Args:
        blocks: `[N, K / 32, 16]`, or `[E, N, K / 32, 16]` for a stack of experts; uint8, the first
            of two elements in the low nibble. They are copied, nibbles swapped.
        scales: `[N, K / 32]` or `[E, N, K / 32]`, uint8: exponents with a bias of 127. Shared with
            the state, not copied, if they are contiguous.
        dtype: to which the weight is decoded by default.

    Returns:
        The packed bytes, uint8 `[n / 2, 1]`, and their state, of shape (N, K) or (E, N, K).

    Raises:
        ValueError: shapes that don't fit together.
        TypeError: another dtype than uint8.
    """
    for name, tensor in (("blocks", blocks), ("scales", scales)):
        if tensor.dtype != torch.uint8:
            raise TypeError(f"{name} must be uint8, got {tensor.dtype}")
    if blocks.dim() < 3 or blocks.shape[-1] != BLOCKSIZE // 2:
        raise ValueError(f"blocks must be [..., N, K / 32, 16], got {tuple(blocks.shape)}")
    if scales.shape != blocks.shape[:-1]:
        raise ValueError(
            f"scales must be {tuple(blocks.shape[:-1])} to match blocks, got {tuple(scales.shape)}"
        )
    *outer, per_row, _ = blocks.shape
    shape = torch.Size((*outer, per_row * BLOCKSIZE))
    return _swapped(blocks).view(-1, 1), _state(scales, shape, dtype)


def to_mxfp4(packed: Tensor, quant_state: QuantState) -> tuple[Tensor, Tensor]:
    """The inverse of `from_mxfp4`: blocks and scales, as a gpt-oss checkpoint names them.

    Args:
        packed: bytes of the weight, any shape.
        quant_state: of a weight in MXFP4.

    Raises:
        ValueError: the weight has another format.
    """
    if quant_state.quant_type != MXFP4.name:
        raise ValueError(f"quant_state must be of mxfp4, got {quant_state.quant_type!r}")
    *outer, K = quant_state.shape
    shape = (*outer, K // BLOCKSIZE)
    blocks = _swapped(packed_bytes(packed)).view(*shape, BLOCKSIZE // 2)
    return blocks, quant_state.absmax.view(shape)


def scale_table(device: torch.device | str | None = None) -> Tensor:
    """E8M0 -> fp32, `[256]`: powers of two, the first of them subnormal, and NaN."""
    return torch.tensor(_E8M0, dtype=torch.float32, device=device)


def _state(scales: Tensor, shape: torch.Size, dtype: torch.dtype) -> QuantState:
    device, count = scales.device, scales.numel()
    ones = torch.ones(-(-count // NESTED_BLOCKSIZE), dtype=torch.float32, device=device)
    outer = QuantState(
        ones,
        torch.Size((count,)),
        scale_table(device),
        torch.float32,
        NESTED_BLOCKSIZE,
        "e8m0",
    )
    code, offset = MXFP4.table(device), torch.zeros((), dtype=torch.float32, device=device)
    return QuantState(scales.reshape(-1), shape, code, dtype, BLOCKSIZE, "mxfp4", offset, outer)


def _rounding_bounds(device: torch.device) -> Tensor:
    """`[7]`: a magnitude has the code at the number of bounds below it.

    Midway between codes i and i + 1 the even one is nearer by definition: i + 1 where i is odd, so
    that bound is one fp32 step lower.
    """
    magnitudes = torch.tensor(_MAGNITUDES, dtype=torch.float32, device=device)
    bounds = (magnitudes[:-1] + magnitudes[1:]) / 2
    bounds[1::2] = bounds[1::2].nextafter(bounds.new_zeros(()))
    return bounds


def _swapped(data: Tensor) -> Tensor:
    """Both nibbles of each byte swapped, contiguous."""
    swapped = data.contiguous() << 4
    swapped |= data >> 4
    return swapped
