"""Which linear layers of a model carry the most signal, as targets for adapters."""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from . import bitsandbytes as bnb
from .names import kind_of, numbers_of, plain_name
from .peft.merge.originals import OriginalWeights
from .text import as_text

if TYPE_CHECKING:
    from rich.table import Table

# The interquartile range of a normal distribution, in standard deviations.
_NORMAL_IQR = 1.349


@dataclass(frozen=True)
class SpectrumRow:
    """One linear layer.

    Args:
        name: in the model.
        kind: the name with `*` for its numbers; layers of one kind compete with each other.
        shape: (out_features, in_features), as the weight lies in memory.
        snr: see `signal_to_noise`.
        chosen: whether it is in the top share of its kind.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    snr: float
    chosen: bool

    @property
    def numbers(self) -> str:
        """The numbers in the name: "3", with two `*` in the kind "3.5", with none ""."""
        return ".".join(numbers_of(self.name))


@dataclass(frozen=True)
class Spectrum:
    """The rows of `spectrum`, the best of each kind first; prints as a table."""

    rows: list[SpectrumRow]
    share: float

    @property
    def target_modules(self) -> list[str]:
        """Full names of the chosen layers, for `LoraConfig(target_modules=...)`."""
        return [row.name for row in self.rows if row.chosen]

    @property
    def regex(self) -> str:
        """One regular expression that matches just the chosen layers, for the same argument.

        In models with experts PEFT makes something else of it; see `peft_target`.
        """
        # (the text before the number, the numbers) -> the text after it
        shared: dict[tuple[str, tuple[int, ...]], list[str]] = {}
        parts = []
        for kind, group in groupby(self.rows, lambda row: row.kind):
            chosen = [row for row in group if row.chosen]
            if kind.count("*") == 1:
                before, after = kind.split("*")
                numbers = tuple(sorted(int(row.numbers) for row in chosen))
                shared.setdefault((before, numbers), []).append(re.escape(after[1:]))
            else:
                parts.append(_one_of([re.escape(row.name) for row in chosen]))
        parts += [
            re.escape(before) + _one_of([str(n) for n in numbers]) + r"\." + _one_of(after)
            for (before, numbers), after in shared.items()
        ]
        return "|".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON; an infinite ratio is None."""
        layers = [asdict(row) for row in self.rows]
        for layer in layers:
            layer["shape"] = list(layer["shape"])
            layer["snr"] = layer["snr"] if math.isfinite(layer["snr"]) else None
        return {
            "share": self.share,
            "layers": layers,
            "target_modules": self.target_modules,
            "regex": self.regex,
        }

    def __rich__(self) -> Table:
        """A rich table, for `rich.print`: a line a kind, its layers from the best on."""
        from rich.table import Table

        chosen = len(self.target_modules)
        title = f"{chosen} of {len(self.rows)} linear layers chosen, {self.share:.0%} of each kind"
        table = Table(title=title, title_justify="left")
        table.add_column("layers")
        table.add_column("out x in", justify="right")
        table.add_column("signal / noise", justify="right")
        table.add_column("chosen, best first", overflow="fold")
        for kind, group in groupby(self.rows, lambda row: row.kind):
            rows = list(group)
            before, _, after = kind.partition("*")
            best = [
                row.name[len(before) : len(row.name) - len(after)] for row in rows if row.chosen
            ]
            table.add_row(
                f"{kind} (x{len(rows)})",
                f"{rows[0].shape[0]} x {rows[0].shape[1]}",
                f"{rows[0].snr:.3g} to {rows[-1].snr:.3g}"
                if len(rows) > 1
                else f"{rows[0].snr:.3g}",
                ", ".join(best),
            )
        return table

    def __str__(self) -> str:
        return as_text(self)


def spectrum(
    source: nn.Module | str | os.PathLike[str],
    share: float = 0.25,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Spectrum:
    """Ranks linear layers by `signal_to_noise`, each kind for itself, and chooses the top share.

    Args:
        source: a model (4-bit and PEFT models too), or a folder with a Transformers model, whose
            weights are then read one at a time. The output head of a folder's model is left out,
            as PEFT does; 4-bit weights are decoded.
        share: part of the layers of each kind to choose, rounded up.
        progress: called with the number of layers done, and of all.

    Raises:
        TypeError: source is neither. ValueError: share is not in (0, 1], or there are no layers.

    Source: Spectrum, arXiv:2406.06623.
    """
    if not 0.0 < share <= 1.0:
        raise ValueError(f"share must be above 0 and at most 1, got {share}")
    if isinstance(source, nn.Module):
        layers = dict(_of_model(source))
    elif isinstance(source, str | os.PathLike):
        layers = _of_folder(Path(source))
    else:
        raise TypeError(f"source must be a model or a folder, got {type(source).__name__}")
    if not layers:
        raise ValueError("source must have linear layers, got none")
    found: dict[str, list[tuple[float, str, tuple[int, int]]]] = {}
    for done, (name, read) in enumerate(layers.items()):
        try:
            weight = read()
            snr = signal_to_noise(weight)
        except (ValueError, SafetensorError) as error:
            raise ValueError(f"source: layer {name}: {error}") from error
        entry = (snr, name, (weight.shape[0], weight.shape[1]))
        found.setdefault(kind_of(name), []).append(entry)
        if progress is not None:
            progress(done + 1, len(layers))
    rows = []
    for kind, entries in found.items():
        entries.sort(key=lambda entry: -entry[0])
        top = math.ceil(share * len(entries))
        rows += [
            SpectrumRow(name, kind, shape, snr, rank < top)
            for rank, (snr, name, shape) in enumerate(entries)
        ]
    return Spectrum(rows, share)


@torch.no_grad()
def signal_to_noise(weight: Tensor) -> float:
    """`sum(s_i > t) / sum(s_i <= t) / max(s_i)` over the singular values s of a weight.

        t = sigma (1 + sqrt(beta)),    sigma = IQR(s) / 1.349,    beta = min(N, K) / max(N, K)

    t is the largest singular value of a random matrix (Marchenko and Pastur) whose scale is taken
    from the middle half of s. Without values up to t the ratio is infinite, for a zero weight 0.

    Args:
        weight: `[N, K]`, any float dtype.

    Source: Spectrum, arXiv:2406.06623, section 3.
    """
    N, K = weight.shape
    if not weight.is_floating_point() or weight.element_size() < 2:
        raise ValueError(f"weight must be a float of 16 bits or more, got {weight.dtype}")
    if not weight.isfinite().all():
        raise ValueError("weight must be finite, got inf or NaN")
    wide = weight.double()
    # The eigenvalues of the smaller Gram matrix are s^2. In fp64 squaring costs an error of 1e-8 of
    # the largest s, and takes a fraction of the time of a singular value decomposition.
    gram = wide @ wide.mT if N <= K else wide.mT @ wide
    s = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    low, high = s.quantile(torch.tensor([0.25, 0.75], dtype=s.dtype, device=s.device)).tolist()
    beta = min(N, K) / max(N, K)
    threshold = (high - low) / _NORMAL_IQR * (1 + math.sqrt(beta))
    signal, noise = float(s[s > threshold].sum()), float(s[s <= threshold].sum())
    if signal == 0:
        return 0.0
    return math.inf if noise == 0 else signal / noise / float(s[-1])


def _of_model(model: nn.Module) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    for key, module in model.named_modules():
        # Adapters are inside the layers that PEFT puts around the linear layers.
        if "lora_" not in key and "modules_to_save" not in key and _is_linear(module):
            name = plain_name(key).removesuffix(".base_layer")
            yield name, functools.partial(_weight, module)


def _of_folder(folder: Path) -> dict[str, Callable[[], Tensor]]:
    from .transformers.loading import empty_model

    model, weights = empty_model(folder), OriginalWeights(folder, "source")
    head = model.get_output_embeddings()
    names = [n for n, m in model.named_modules() if m is not head and _is_linear(m)]
    for name in names:
        weights.key(name)  # all of them, before any is read
    return {name: functools.partial(weights.__getitem__, name) for name in names}


def peft_target(folder: str | os.PathLike[str], ranking: Spectrum) -> str | list[str] | None:
    """What `LoraConfig(target_modules=...)` takes to adapt just the chosen layers of a folder's
    model; tried on the model without its weights.

    The regular expression, or else the list of names: in models with experts PEFT reads the last
    names alone of an expression. None if PEFT adapts others with either.
    """
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    from .transformers.loading import empty_model

    for target in (ranking.regex, ranking.target_modules):
        model = empty_model(folder)
        with torch.device("meta"):
            get_peft_model(model, LoraConfig(r=1, target_modules=target))
        adapted = {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}
        if adapted == set(ranking.target_modules):
            return target
    return None


def _is_linear(module: Any) -> bool:
    if bnb.is_linear4bit(module):
        return True
    # GPT-2's Conv1D is a linear layer with its weight turned.
    linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    return linear and module.weight.is_floating_point()


def _weight(module: Any) -> Tensor:
    four_bit = bnb.is_linear4bit(module)
    return bnb.dense_weight(module, torch.float32) if four_bit else module.weight.detach()


def _one_of(choices: Sequence[str]) -> str:
    return choices[0] if len(choices) == 1 else f"({'|'.join(choices)})"
