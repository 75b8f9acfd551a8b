"""What is measured: one mode of one layer in one size."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from ..options import DTYPES as DTYPES

MODES = {
    "forward": "forward of a training step",
    "backward": "backward alone: gradients of x, A and B",
    "step": "forward and backward",
    "inference": "forward without gradients, in eval mode",
    "dequantize": "the whole 4-bit weight to a dense one",
}
MODEL_MODES = {
    "train": "a training step of a model: forward, backward, optimizer",
    "train-checkpointed": "the same with gradient checkpointing",
    "decode": "one more token, with the others in the cache",
}
# What the ratios of a mode are taken to.
BASELINES = dict.fromkeys(MODES, "peft") | {"dequantize": "bitsandbytes"}
# With this factor and inputs of unit variance the LoRA term is as large as the base's.
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
        adapter_dtype: of A and B where a provider leaves the choice.
    """

    N: int
    K: int
    R: int = 16
    dtype: str = "bf16"
    quant: str = "none"
    nested: bool = True
    dropout: float = 0.0
    adapter_dtype: str = "fp32"

    @property
    def quant_name(self) -> str:
        """As tables and CSV files name it: "none", "nf4", "nf4 nested", ..."""
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
        base = layer.dtype if layer.quant == "none" else f"{layer.dtype} on {layer.quant_name}"
        return f"{self.mode} M={self.M} N={layer.N} K={layer.K} R={layer.R} {base}" + (
            f" dropout {layer.dropout:g}" if layer.dropout else ""
        )

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Case:
        """The inverse of `dataclasses.asdict`."""
        return cls(**{**fields, "layer": Layer(**fields["layer"])})


def grid(layers: Iterable[Layer], tokens: Iterable[int], modes: Iterable[str]) -> list[Case]:
    """Every mode at every M, layer by layer: what shares weights stands together.

    Dequantising has no tokens, no rank and no dropout: it is there once for each 4-bit weight.
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
