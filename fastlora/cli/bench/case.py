"""A measurement: one mode of one layer in one size."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from ..options import DTYPES as DTYPES

# Names of modes, and how tables write them.
MODES = {
    "forward": "forward",  # of a training step
    "backward": "backward",  # alone: gradients of x, A and B
    "step": "forward + backward",
    "inference": "inference",  # a forward without gradients, in eval mode
    "dequantize": "dequantise",  # the whole 4-bit weight to a dense one
}
MODEL_MODES = {
    "train": "training step",  # forward, backward, optimizer
    "train-checkpointed": "training step, checkpointed",
    "decode": "decoding a token",  # with the others in the cache
}
PASSES = MODES | MODEL_MODES
# The baseline of a mode's ratios.
BASELINES = dict.fromkeys(MODES, "peft") | {"dequantize": "bitsandbytes"}
# With inputs of unit variance this makes the LoRA term as large as the base's.
SCALING = 2.0


@dataclass(frozen=True)
class Layer:
    """A LoRA layer, without the number of tokens.

    Args:
        N, K, R: out_features, in_features, rank.
        dtype: of x and of a dense weight (compute dtype of a 4-bit one): a name in DTYPES.
        quant: "none", "nf4" or "fp4".
        nested: absmax of a 4-bit weight in 8 bits as well.
        dropout: probability, on the adapter's input.
        adapter_dtype: of A and B, for providers that don't fix it.
    """

    N: int
    K: int
    R: int = 16
    dtype: str = "bf16"
    quant: str = "none"
    nested: bool = True
    dropout: float = 0.0
    adapter_dtype: str = "fp32"

    def __str__(self) -> str:
        base = self.dtype if self.quant == "none" else f"{self.dtype} on {self.quant_name}"
        dropout = f" dropout {self.dropout:g}" if self.dropout else ""
        return f"N={self.N} K={self.K} R={self.R} {base}{dropout}"

    @property
    def quant_name(self) -> str:
        """The name in tables and CSV files: "none", "nf4", "nf4 nested", ..."""
        return f"{self.quant} nested" if self.nested and self.quant != "none" else self.quant

    @property
    def weight_bytes(self) -> int:
        """Bytes of the frozen weight that a forward has to read, scales included."""
        elements = self.N * self.K
        if self.quant == "none":
            return elements * (4 if self.dtype == "fp32" else 2)
        return elements // 2 + elements // 64 * (1 if self.nested else 4)


@dataclass(frozen=True)
class Case:
    """One thing to time: `mode` of `layer` on `M` tokens."""

    layer: Layer
    M: int
    mode: str

    def __str__(self) -> str:
        layer = self.layer
        if self.mode == "dequantize":
            return f"dequantize N={layer.N} K={layer.K} {layer.quant_name} to {layer.dtype}"
        return f"{self.mode} M={self.M} {layer}"

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Case:
        """The inverse of `dataclasses.asdict`."""
        return cls(**{**fields, "layer": Layer(**fields["layer"])})


def grid(layers: Iterable[Layer], tokens: Iterable[int], modes: Iterable[str]) -> list[Case]:
    """Every mode at every M, layer by layer, so that cases with the same weights are adjacent.

    "dequantize" has no tokens, rank or dropout: there is one case for each 4-bit weight.
    """
    tokens, modes = list(tokens), list(modes)
    cases: dict[Case, None] = {}
    for layer in layers:
        for mode in modes:
            if mode == "dequantize":
                if layer.quant != "none":
                    cases[Case(replace(layer, R=0, dropout=0.0), 0, mode)] = None
            else:
                cases |= dict.fromkeys(Case(layer, M, mode) for M in tokens)
    return list(cases)
