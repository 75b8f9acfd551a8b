"""What merging cost, layer by layer."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from rich.table import Table

_COLUMNS = ("layer", "base", "|dW|/|W|", "error", "PEFT's error", "lost", "kept", "output error")


@dataclass(frozen=True)
class MergeRow:
    """One layer, merged. `W` is the base weight, `dW` what the adapters add to it, `M` the result.

    All norms are Frobenius norms, in fp32 or better; None where PEFT's own code merged the layer.

    Args:
        name: the layer's name in the model.
        base: what holds the merged weight: "bf16", "nf4/64 nested", ...
        size: `|dW| / |W|`.
        error: `|M - (W + dW)| / |W + dW|`.
        peft_error: the same, of what PEFT's own merge makes of this layer.
        lost: `|M - (W + dW)| / |dW|`: how large the error is beside the update.
        kept: `<M - W, dW> / |dW|^2`: the part of the update that M has. Rounding that swallows the
            update makes it 0; 1 with a large `lost` is an update under noise.
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
    output_error: float | None = None

    def cells(self) -> tuple[str, ...]:
        """A line of the table."""
        figures = (self.size, self.error, self.peft_error, self.lost, self.kept, self.output_error)
        return (self.name, self.base, *("" if v is None else f"{v:.3g}" for v in figures))


@dataclass(frozen=True)
class MergeReport:
    """The rows of `merge_adapter`, printed as a table."""

    rows: list[MergeRow]

    def summary(self) -> str:
        """One line: how many layers, and the root mean square of their figures."""
        text = f"{len(self.rows)} layers merged"
        for label, name in (
            ("error", "error"),
            ("PEFT's", "peft_error"),
            ("lost of the update", "lost"),
            ("kept", "kept"),
        ):
            values = [v for row in self.rows if (v := getattr(row, name)) is not None]
            if values:
                mean = (
                    sum(values) / len(values)
                    if name == "kept"
                    else math.sqrt(sum(v * v for v in values) / len(values))
                )
                text += f", {label} {mean:.3g}"
        return text

    def __rich__(self) -> Table:
        """A rich table, for `rich.print`."""
        from rich.table import Table

        lines = [row.cells() for row in self.rows]
        # A column that no layer fills says nothing.
        filled = [i for i in range(len(_COLUMNS)) if any(line[i] for line in lines)]
        table = Table(title=self.summary(), title_justify="left")
        for i in filled:
            table.add_column(_COLUMNS[i], justify="left" if i < 2 else "right", overflow="fold")
        for line in lines:
            table.add_row(*(line[i] for i in filled))
        return table

    def __str__(self) -> str:
        from rich.console import Console

        buffer = io.StringIO()
        Console(file=buffer, width=140).print(self)
        return buffer.getvalue().rstrip()


def measured(
    name: str,
    base: str,
    before: Tensor,
    exact: Tensor,
    stored: Tensor,
    peft: Tensor | None,
    moments: Tensor | None,
) -> MergeRow:
    """The row of a layer.

    Args:
        name, base: as in `MergeRow`.
        before: W.
        exact: W + dW, unrounded.
        stored: M, as the layer decodes it.
        peft: what PEFT's own merge made of it; None leaves its error out.
        moments: `[K, K]`, `x^T x` over the inputs; None leaves the output error out.
    """
    off, update = stored - exact, exact - before
    size, error = _norm(update), _norm(off)
    return MergeRow(
        name=name,
        base=base,
        size=_ratio(size, _norm(before)),
        error=_ratio(error, _norm(exact)),
        peft_error=None if peft is None else _ratio(_norm(peft - exact), _norm(exact)),
        lost=_ratio(error, size),
        kept=_ratio(float(((stored - before) * update).sum()), size**2),
        output_error=None
        if moments is None
        else _ratio(energy(off, moments) ** 0.5, energy(exact, moments) ** 0.5),
    )


def energy(weight: Tensor, moments: Tensor) -> float:
    """`tr(W H W^T)`: the squared norm of the outputs that W makes of inputs with `x^T x = H`."""
    return float(((weight @ moments.to(weight)) * weight).sum().clamp(min=0))


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor))


def _ratio(part: float, whole: float) -> float:
    """`part / whole`; 0 / 0 is 0: nothing was to be kept and nothing was lost."""
    if whole:
        return part / whole
    return 0.0 if part == 0 else math.inf
