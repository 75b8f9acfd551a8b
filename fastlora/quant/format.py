"""A 4-bit format: one instance, in one file, listed in `quant.FORMATS`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .state import QuantState


@dataclass(frozen=True)
class Format(ABC):
    """How a weight becomes codes and scales, and how both are named in a state dict.

    Decoding is not part of a format: `reference.dequantize_4bit` and every kernel read the tables
    in the `QuantState`, high nibble first. A format whose peers store the low nibble first swaps
    them when it reads and writes.

    Args:
        name: what peers call it, the `quant_type` of its states.
        code: the 16 values that a nibble stands for.
        blocksizes: elements per scale that it allows.
        blocksize: the default among them.
        nests: whether absmax can be stored in 8 bits (`compress_statistics`).
        whole_rows: whether no block may reach into the next row: the last dimension is a multiple
            of the blocksize.
    """

    name: str
    code: tuple[float, ...]
    blocksizes: tuple[int, ...]
    blocksize: int
    nests: bool
    whole_rows: bool

    def table(self, device: torch.device | str | None = None) -> Tensor:
        """`code` as a tensor, `[16]` fp32."""
        return torch.tensor(self.code, dtype=torch.float32, device=device)

    def check(
        self, weight: Tensor, blocksize: int | None = None, compress_statistics: bool = False
    ) -> int:
        """The blocksize to use: the one given, or the default when None.

        Raises:
            ValueError: the format doesn't have this blocksize, this option or such rows.
            TypeError: weight is not fp32, bf16 or fp16.
        """
        if blocksize is None:
            blocksize = self.blocksize
        if blocksize not in self.blocksizes:
            allowed = " or ".join(map(str, self.blocksizes[-1:]))
            if len(self.blocksizes) > 1:
                allowed = f"one of {self.blocksizes}"
            raise ValueError(f"blocksize must be {allowed} for {self.name}, got {blocksize}")
        if compress_statistics and not self.nests:
            raise ValueError(
                f"compress_statistics must be False for {self.name}, whose scales have 8 bits "
                "already, got True"
            )
        if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(f"weight must be fp32, bf16 or fp16, got {weight.dtype}")
        if self.whole_rows and (weight.dim() == 0 or weight.shape[-1] % blocksize):
            raise ValueError(
                f"weight must have a last dimension that is a multiple of {blocksize} for "
                f"{self.name}, got {tuple(weight.shape)}"
            )
        return blocksize

    @abstractmethod
    def quantize(
        self, weight: Tensor, blocksize: int | None = None, compress_statistics: bool = False
    ) -> tuple[Tensor, QuantState]:
        """The definition of `quantize_4bit` for this format, in plain torch.

        Args:
            weight: any shape, fp32, bf16 or fp16.
            blocksize: elements per scale; the default of the format when None.
            compress_statistics: store absmax in 8 bits.

        Returns:
            The packed bytes, uint8 `[(n + 1) // 2, 1]`, and the state to decode them.

        Raises:
            ValueError, TypeError: as `check`.
        """

    @abstractmethod
    def to_entries(self, packed: Tensor, state: QuantState) -> dict[str, Tensor]:
        """State-dict entries of a weight, as peers name and encode them.

        Args:
            packed: bytes of the weight, `[nbytes, 1]`.
            state: how to decode them.

        Returns:
            The rest of the key after the weight's name ("", ".absmax", "_scales") -> tensor.
        """

    @abstractmethod
    def owns(self, entries: Mapping[str, Tensor]) -> bool:
        """Whether these entries, with the keys of `to_entries`, are of a weight in this format."""

    @abstractmethod
    def from_entries(
        self, entries: Mapping[str, Tensor], like: QuantState
    ) -> tuple[Tensor, QuantState]:
        """The inverse of `to_entries`.

        Args:
            entries: keys as `to_entries` gives them; further keys are ignored.
            like: state of the weight to replace, for fields that the format doesn't store.

        Raises:
            ValueError: an entry is missing, or shapes don't fit.
        """
