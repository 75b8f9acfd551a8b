"""What merging cost, layer by layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...names import kind_of, plain_name
from ...text import as_text

if TYPE_CHECKING:
    from rich.table import Table

# Field of a row -> its column.
_FIGURES = {
    "size": "|dW|/|W|",
    "error": "error",
    "peft_error": "PEFT's error",
    "lost": "lost",
    "kept": "kept",
    "peft_kept": "PEFT's kept",
    "output_error": "output error",
}


@dataclass(frozen=True)
class MergeRow:
    """One layer, merged. `W` is the base weight, `dW` what the adapters add to it, `M` the result.

    All norms are Frobenius norms, in fp32 or better; None where PEFT's own code merged the layer.

    Args:
        name: the layer's name in the model.
        base: what holds the merged weight: "bf16", "nf4/64 nested", ...
        size: `|dW| / |W|`.
        error: `|M - (W + dW)| / |W + dW|`.
        peft_error: the same, of PEFT's own merge of this layer.
        lost: `|M - (W + dW)| / |dW|`: how large the error is beside the update.
        kept: `<M - W, dW> / |dW|^2`: the part of the update that M has. Rounding that swallows the
            update makes it 0; 1 with a large `lost` is an update under noise.
        peft_kept: the same, of what PEFT's own merge does to the weight that the layer has.
        output_error: `|x (M - W - dW)^T| / |x (W + dW)^T|` over the inputs x of which the second
            moments were given, else None.
    """

    name: str
    base: str
    size: float | None = None
    error: float | None = None
    peft_error: float | None = None
    lost: float | None = None
    kept: float | None = None
    peft_kept: float | None = None
    output_error: float | None = None


@dataclass(frozen=True)
class MergeReport:
    """The rows of `merge_adapter`, printed as a table in which layers of a kind share a line."""

    rows: list[MergeRow]

    def summary(self) -> str:
        """`210 layers merged: |dW|/|W| 0.00424, error 0.0014, ...`, means as in the table."""
        text = ", ".join(f"{_FIGURES[name]} {mean:.3g}" for name, mean in self.means().items())
        return f"{len(self.rows)} layers merged" + (f": {text}" if text else "")

    def means(self) -> dict[str, float]:
        """Field of `MergeRow` -> its root mean square over the layers; the mean of what is kept."""
        return _means(self.rows)

    def table(self, each: bool = False) -> Table:
        """A rich table. A line of several layers has the root mean square of their figures.

        Args:
            each: give every layer its own line.
        """
        from rich.table import Table

        groups: dict[tuple[str, str], list[MergeRow]] = {}
        for row in self.rows:
            name = plain_name(row.name) if each else kind_of(row.name)
            groups.setdefault((name, row.base), []).append(row)
        lines = [(key, len(rows), _means(rows)) for key, rows in groups.items()]
        # A column that no layer fills says nothing.
        filled = [name for name in _FIGURES if any(name in means for *_, means in lines)]
        table = Table(title=f"{len(self.rows)} layers merged", title_justify="left")
        table.add_column("layer", overflow="fold")
        table.add_column("base")
        for name in filled:
            table.add_column(_FIGURES[name], justify="right")
        for (layer, base), count, means in lines:
            figures = (f"{means[name]:.3g}" if name in means else "" for name in filled)
            table.add_row(f"{layer} (x{count})" if count > 1 else layer, base, *figures)
        return table

    def __rich__(self) -> Table:
        return self.table()

    def __str__(self) -> str:
        return as_text(self)


def _means(rows: list[MergeRow]) -> dict[str, float]:
    """The root mean square of each figure; the plain mean of what is kept, which has a sign."""
    means = {}
    for name in _FIGURES:
        values = [value for row in rows if (value := getattr(row, name)) is not None]
        if values and name in ("kept", "peft_kept"):
            means[name] = sum(values) / len(values)
        elif values:
            means[name] = math.sqrt(sum(value * value for value in values) / len(values))
    return means


def measured(
    name: str,
    base: str,
    before: Tensor,
    exact: Tensor,
    stored: Tensor,
    peft: tuple[Tensor, Tensor] | None,
    moments: Tensor | None,
) -> MergeRow:
    """The row of a layer.

    Args:
        name, base: as in `MergeRow`.
        before: W.
        exact: W + dW, unrounded.
        stored: M, as the layer decodes it.
        peft: the weight before and after PEFT's own merge; None leaves its figures out.
        moments: `[K, K]`, `x^T x` over the inputs; None leaves the output error out.
    """
    off, update = stored - exact, exact - before
    size, error = _norm(update), _norm(off)
    return MergeRow(
        name=name,
        base=base,
        size=_ratio(size, _norm(before)),
        error=_ratio(error, _norm(exact)),
        peft_error=None if peft is None else _ratio(_norm(peft[1] - exact), _norm(exact)),
        lost=_ratio(error, size),
        kept=_share(stored - before, update),
        peft_kept=None if peft is None else _share(peft[1] - peft[0], update),
        output_error=None
        if moments is None
        else _ratio(energy(off, moments) ** 0.5, energy(exact, moments) ** 0.5),
    )


def energy(weight: Tensor, moments: Tensor) -> float:
    """`tr(W H W^T)`: the squared norm of the outputs of W for inputs with `x^T x = H`."""
    return float(((weight @ moments.to(weight)) * weight).sum().clamp(min=0))


def _share(change: Tensor, update: Tensor) -> float:
    return _ratio(float((change * update).sum()), float(update.square().sum()))


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor))


def _ratio(part: float, whole: float) -> float:
    """`part / whole`; 0 / 0 is 0: nothing was to be kept and nothing was lost."""
    if whole:
        return part / whole
    return 0.0 if part == 0 else math.inf
