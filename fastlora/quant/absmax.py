"""Codes on [-1, 1] scaled by the largest magnitude of each block: bitsandbytes' formats.

    absmax[b] = max |weight[i]| over block b
    nibble[i] = argmin_c |weight[i] / absmax[i // blocksize] - code[c]|

The two formats, NF4 and FP4, differ in the code table alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .format import Format
from .state import NESTED_BLOCKSIZE, QuantState

BLOCKSIZES: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048, 4096)
# Below this, the reciprocal of absmax would be infinite.
_ABSMAX_MIN = 1e-38
_BLOB = ".quant_state.bitsandbytes__"


@dataclass(frozen=True)
class AbsmaxFormat(Format):
    """A format of bitsandbytes: a code table, fp32 absmax, double quantisation on request."""

    name: str
    code: tuple[float, ...]
    blocksizes: tuple[int, ...] = BLOCKSIZES
    blocksize: int = 64
    nests: bool = True
    whole_rows: bool = False

    def quantize(
        self, weight: Tensor, blocksize: int | None = None, compress_statistics: bool = False
    ) -> tuple[Tensor, QuantState]:
        """`nibble[i] = argmin_c |weight[i] / absmax[i // blocksize] - code[c]|`, two to a byte.

        A value midway between two codes gets the lower. Bit-exact with bitsandbytes on the CPU:
        full blocks are multiplied by the reciprocal of absmax, a short last block is divided by it;
        absmax is held above 1e-38 for the scaling, and for a short last block also in what is
        returned.

        Source: QLoRA, arXiv:2305.14314; bitsandbytes 0.50, `quantize_4bit`.
        """
        blocksize = self.check(weight, blocksize, compress_statistics)
        code = self.table(weight.device)
        flat = weight.detach().reshape(-1).float()
        n = flat.numel()
        full = n - n % blocksize
        blocks = flat[:full].view(-1, blocksize)
        absmax = blocks.abs().amax(dim=1)
        scaled = (blocks * absmax.clamp(min=_ABSMAX_MIN).reciprocal()[:, None]).view(-1)
        if full < n:
            last = flat[full:].abs().max().clamp(min=_ABSMAX_MIN)
            absmax = torch.cat([absmax, last[None]])
            scaled = torch.cat([scaled, flat[full:] / last])
        if n % 2:
            scaled = torch.nn.functional.pad(scaled, (0, 1))

        midpoints, order = quantize_bounds(code)
        nibbles = order[torch.bucketize(scaled.clamp(-1, 1), midpoints)].to(torch.uint8)
        packed = (nibbles[::2] << 4 | nibbles[1::2])[:, None]

        state = QuantState(absmax, weight.shape, code, weight.dtype, blocksize, self.name)
        return packed, nested(state) if compress_statistics else state

    def to_entries(self, packed: Tensor, state: QuantState) -> dict[str, Tensor]:
        """The bytes under the weight's own name, and `QuantState.as_dict` behind a dot."""
        return {"": packed, **{f".{key}": value for key, value in state.as_dict().items()}}

    def owns(self, entries: Mapping[str, Tensor]) -> bool:
        """Whether the key that holds the remaining fields names this format."""
        return f"{_BLOB}{self.name}" in entries

    def from_entries(
        self, entries: Mapping[str, Tensor], like: QuantState
    ) -> tuple[Tensor, QuantState]:
        """The inverse of `to_entries`; nothing is taken from `like`."""
        if "" not in entries:
            raise ValueError("entries must have the packed bytes under the weight's own name")
        fields = {key[1:]: value for key, value in entries.items() if key.startswith(".")}
        return entries[""], QuantState.from_dict(fields)


def quantize_bounds(code: Tensor) -> tuple[Tensor, Tensor]:
    """Midpoints between neighbours of the sorted code, `[15]`, and sorted position -> code, `[16]`.

    A scaled value takes the code at the number of midpoints that lie below it.

    Args:
        code: `[16]` fp32, as `Format.table` gives it.
    """
    ascending, order = code.sort(stable=True)
    return (ascending[:-1] + ascending[1:]) / 2, order


# ---- double quantisation -------------------------------------------------------------------------


def dynamic_code() -> Tensor:
    """The 8-bit dynamic map for nested absmax, `[256]` fp32, ascending.

    For each decade `10^(e-6)`, `e = 0..6`: the midpoints of `2^e` equal parts of [0.1, 1], with
    both signs; and 0 and 1.

    Source: 8-bit Approximations for Parallelism in Deep Learning, arXiv:1511.04561.
    """
    values = [torch.tensor([0.0, 1.0], dtype=torch.float32, device="cpu")]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32, device="cpu")
        decade = 10 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [decade, -decade]
    return torch.cat(values).sort().values


def nested(state: QuantState) -> QuantState:
    """`state` with absmax stored in 8 bits: `offset = mean(absmax)`, then `absmax - offset` coded.

    Args:
        state: a state with fp32 absmax.
    """
    offset = state.absmax.mean()
    absmax, state2 = quantize_absmax(state.absmax - offset)
    return replace(state, absmax=absmax, offset=offset, state2=state2)


def quantize_absmax(values: Tensor) -> tuple[Tensor, QuantState]:
    """8-bit codes of `values [nblocks]` on `dynamic_code`, with one absmax per 256 of them.

    bitsandbytes rounds the scaled value to a grid of 2^16 points first (its table has one entry for
    each), then takes the code nearest to that grid point. Where absmax has no finite reciprocal, as
    in an all-zero block, zero gets code 0, not the code of zero.
    """
    code = dynamic_code().to(values.device)
    n = values.numel()
    padded = torch.nn.functional.pad(values, (0, -n % NESTED_BLOCKSIZE)).view(-1, NESTED_BLOCKSIZE)
    absmax = padded.abs().amax(dim=1)
    scaled = (padded * absmax.reciprocal()[:, None]).clamp(-1, 1)
    # A fused multiply-add in fp32: the product is exact in fp64, and the sum is rounded once.
    # NaN is 0 times an infinite reciprocal.
    grid = (((scaled + 1) * 0.5).double() * 65535 + 0.5).float().nan_to_num(0.0).int()
    midpoints = (code[:-1] + code[1:]) * 0.5
    # Divided by a tensor, as CUDA multiplies by the reciprocal of a number.
    nearest = 2.0 * grid.float() / torch.full_like(absmax, 65535)[:, None] - 1.0
    index = torch.bucketize(nearest, midpoints).to(torch.uint8)
    shape = torch.Size((n,))
    state2 = QuantState(absmax, shape, code, torch.float32, NESTED_BLOCKSIZE, "dynamic")
    return index.view(-1)[:n].contiguous(), state2
