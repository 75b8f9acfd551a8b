"""What a run measures: layers, or a whole model. Workers get a plan as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .case import Case, Layer
from .rows import Row


@dataclass(frozen=True)
class Budget:
    """How long to measure.

    Args:
        rounds: samples of each provider.
        sample_seconds: least length of a sample, which has as many calls as that takes.
    """

    rounds: int = 9
    sample_seconds: float = 0.02


@dataclass(frozen=True)
class Plan:
    """What to measure of layers.

    Args:
        cases: in this order; cases of one layer follow one another, so that they share its weights.
        providers: names in PROVIDERS; ratios are taken to the baseline of a mode.
        allocators: "glibc", "tcmalloc"; each has a process of its own.
        budget: how long.
        threads: of torch; None for torch's own choice.
        memory: measure the peak memory too, in "step" and "inference" mode, at each layer's
            largest number of tokens.
    """

    cases: Sequence[Case]
    providers: Sequence[str]
    allocators: Sequence[str]
    budget: Budget = Budget()
    threads: int | None = None
    memory: bool = False

    def __len__(self) -> int:
        return len(self.cases)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Plan:
        """The inverse of `dataclasses.asdict`."""
        cases = [Case.from_dict(case) for case in fields["cases"]]
        return cls(**{**fields, "cases": cases, "budget": Budget(**fields["budget"])})


@dataclass(frozen=True)
class ModelPlan:
    """What to measure of a whole model.

    Args:
        model: folder, GGUF file, or a folder with only a config.json, for random weights.
        modes: names in MODEL_MODES.
        layer: R, dtype, quant, nested, dropout and adapter_dtype; N and K are not used.
        batch, length: sequences of a step, and tokens in each; in decoding, the tokens before.
        allocators, budget, threads: as in `Plan`.
        memory: measure the peak memory of every mode too.
    """

    model: str
    modes: Sequence[str]
    layer: Layer
    batch: int
    length: int
    allocators: Sequence[str]
    budget: Budget = Budget()
    threads: int | None = None
    memory: bool = False

    def __len__(self) -> int:
        return len(self.modes)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> ModelPlan:
        """The inverse of `dataclasses.asdict`."""
        layer, budget = Layer(**fields["layer"]), Budget(**fields["budget"])
        return cls(**{**fields, "layer": layer, "budget": budget})

    def row(self, mode: str, provider: str) -> Row:
        """The columns that say what was measured."""
        layer = self.layer
        path = Path(self.model).resolve()
        return {
            "op": f"model {path.stem if path.is_file() else path.name}",
            "mode": mode,
            "provider": provider,
            "M": str(self.batch * (1 if mode == "decode" else self.length)),
            "R": str(layer.R),
            "dtype": layer.dtype,
            "quant": layer.quant_name,
            "dropout": f"{layer.dropout:g}",
            "adapter_dtype": layer.adapter_dtype,
        }
