"""What each LoRA layer of a model runs on, and why."""

from __future__ import annotations

import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.layer import Conv1D, Embedding, LoraLayer, ParamWrapper
from torch import nn

from ...backends import choose, native
from ...backends.contract import Request
from ...backends.machine.tuned import op_key
from ...version import __version__
from .. import bitsandbytes as bnb
from ..names import kind_of
from ..text import as_text
from .fuse.join import Fusion, fusions, note_of
from .names import base_name, check_module, short
from .plan.call import Parts
from .plan.casts import casts, linear_request
from .plan.embedding import EmbeddingParts, embedding_casts, embedding_parts
from .plan.parameter import ParamParts, param_parts
from .plan.parts import layer_parts
from .plan.plain import NONE_ACTIVE, state_reason
from .plan.reasons import LAST_REASON
from .swap import bypass_reason, fast_class, is_fast

if TYPE_CHECKING:
    from rich.console import Group

_COLUMNS = ("layers", "", "base", "out x in", "r", "dropout", "adapter", "runs on", "note")


@dataclass(frozen=True)
class Row:
    """One LoRA layer.

    Args:
        name: its name in the model.
        kind: its class.
        base: the frozen weight: "bf16", "bf16 x 8 experts", "nf4/64", "nf4/64 nested", or the class
            of the base layer.
        shape: (out_features, in_features), or None.
        r, dropout, adapter: rank, dropout rate and dtype of the first active adapter, or None.
        backend: fastlora's backend for training, None where PEFT's own code runs.
        kernel: the backend's op, and on a CPU its instruction set; "" where PEFT's own code runs.
        reason: why PEFT's own code runs, "" where it does not.
        last_call: why the latest call ran PEFT's own code: "" where it did not, None before a call.
        idle: why no adapter is at work, "" where one is.
    """

    name: str
    kind: str
    base: str
    shape: tuple[int, int] | None
    r: int | None
    dropout: float | None
    adapter: str | None
    backend: str | None
    kernel: str
    reason: str
    last_call: str | None
    idle: str = ""

    @property
    def fast(self) -> bool:
        """True when the layer runs on fastlora."""
        return self.backend is not None

    @property
    def note(self) -> str:
        """The note below the printed table about the layer; "" when all is well."""
        base_alone = f"the base product alone: {self.idle}" if self.idle else ""
        return note_of(self.reason, self.last_call) or base_alone


@dataclass(frozen=True)
class Explanation:
    """The rows of `explain`, printed as a table in which equal layers share a line.

    `fusions` has the gated MLPs that `accelerate(model, fuse="mlp")` runs as one node, or why not.
    """

    rows: list[Row]
    fusions: list[Fusion] = field(default_factory=list)

    def summary(self) -> str:
        """`fastlora 0.1.0: 9/10 LoRA layers accelerated (7 nf4, 2 bf16), 1 on PEFT's own code`."""
        fast = [row for row in self.rows if row.fast]
        kinds = Counter(re.split(r"[/ ]", row.base)[0] for row in fast)
        detail = f" ({', '.join(f'{n} {kind}' for kind, n in kinds.most_common())})" if fast else ""
        slow = len(self.rows) - len(fast)
        hint = "; fastlora.explain(model) says why" if slow else ""
        count = f"{len(fast)}/{len(self.rows)} LoRA layers accelerated{detail}"
        return f"fastlora {__version__}: {count}, {slow} on PEFT's own code{hint}"

    def lines(self) -> list[tuple[str, ...]]:
        """The cells of the printed table: layers that differ in nothing but numbers share a line.

        The last cell points to a line of `notes`.
        """
        notes = self.notes()
        groups: Counter[tuple[str, ...]] = Counter()
        for row in self.rows:
            groups[
                kind_of(row.name),
                row.base,
                "" if row.shape is None else f"{row.shape[0]} x {row.shape[1]}",
                "" if row.r is None else str(row.r),
                "" if row.dropout is None else f"{row.dropout:g}",
                row.adapter or "",
                f"{row.backend}: {row.kernel}" if row.fast else "PEFT",
                f"({notes.index(row.note) + 1})" if row.note else "",
            ] += 1
        return [(name, f"x{n}", *rest) for (name, *rest), n in groups.items()]

    def notes(self) -> list[str]:
        """The distinct reasons for PEFT's own code, in the order of the rows."""
        return list(dict.fromkeys(row.note for row in self.rows if row.note))

    def __rich__(self) -> Group:
        """A rich table and the notes below it, for `rich.print`."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table()
        for column in _COLUMNS:
            table.add_column(column, overflow="fold")
        for cells in self.lines():
            table.add_row(*cells, style="yellow" if cells[7] == "PEFT" else None)
        notes = [f"({i}) {note}" for i, note in enumerate(self.notes(), start=1)]
        below = map(Text, (*notes, *self.fusion_lines()))
        return Group(Text(self.summary(), style="bold"), table, *below)

    def __str__(self) -> str:
        return as_text(self, terminal=sys.stdout.isatty())

    def fusion_lines(self) -> list[str]:
        """A line for each kind of fusion: `fused: x30 model.layers.*.mlp: gate + up: note`."""
        groups: Counter[tuple[str, str, str, str]] = Counter()
        for each in self.fusions:
            what = "fused" if each.fused else "not fused"
            layers = (" + " if each.fused else ", ").join(each.layers)
            note = f": {each.note}" if each.note else ""
            groups[what, kind_of(each.name), layers, note] += 1
        return [
            f"{what}: x{n} {name}: {layers}{note}"
            for (what, name, layers, note), n in groups.items()
        ]


def explain(model: nn.Module) -> Explanation:
    """Which kernel serves each LoRA layer of `model` in training, and why not where none does.

    Judges the layers as they are, by the conditions of `fast_path` that do not depend on the input,
    for an input in the dtype that the base layer computes in and no autocast. What a call adds to
    that (autocast, other arguments, transforms) shows in `last_call` once the model has run.

    Args:
        model: any module with PEFT's LoRA layers inside, before or after `accelerate`.

    Returns:
        An object with `rows`, which prints as a table.

    Raises:
        TypeError: model is no nn.Module.
    """
    check_module(model)
    rows = [_row(name, m) for name, m in model.named_modules() if isinstance(m, LoraLayer)]
    return Explanation(rows, fusions(model))


def _row(name: str, layer: Any) -> Row:
    found = _served(layer) if is_fast(layer) else _stock_reason(layer)
    reason, (backend, kernel) = (found, (None, "")) if isinstance(found, str) else ("", found)
    As = layer.lora_embedding_A if isinstance(layer, Embedding) else layer.lora_A
    active = [adapter for adapter in layer.active_adapters if adapter in As]
    adapter = active[0] if active else None
    lora_A = As[adapter] if adapter else None
    weight = lora_A if isinstance(lora_A, torch.Tensor) else getattr(lora_A, "weight", None)
    base, shape = _base(layer)
    return Row(
        name=name,
        kind=type(layer).__name__,
        base=base,
        shape=shape,
        r=layer.r[adapter] if adapter else None,
        dropout=getattr(layer.lora_dropout[adapter], "p", 0.0) if adapter else None,
        adapter=None if weight is None else short(weight.dtype),
        backend=backend,
        kernel=kernel,
        reason=reason,
        last_call=layer.__dict__.get(LAST_REASON),
        idle=state_reason(layer) or ("" if active else NONE_ACTIVE),
    )


def _served(layer: Any) -> tuple[str, str] | str:
    """`(backend, its ops)` that train a fast layer, or why none does."""
    parts: ParamParts | EmbeddingParts | Parts | str
    if isinstance(layer, ParamWrapper):
        parts = param_parts(layer)
    elif isinstance(layer, Embedding):
        parts = embedding_parts(layer)
    else:
        parts = layer_parts(layer)
    if isinstance(parts, str):
        return parts
    if (reason := bypass_reason(layer)) is not None:
        return reason
    if isinstance(parts, Parts):
        device = parts.weight.device
        dtypes = casts(parts, _input_dtype(parts), device, None)
        return dtypes if isinstance(dtypes, str) else _named(linear_request(parts, dtypes, device))
    if isinstance(parts, EmbeddingParts):
        reason = embedding_casts(parts, parts.weight.device)
    return _named(parts.request) if reason is None else reason


def _named(request: Request) -> tuple[str, str]:
    """The names of the backend that is chosen and of its op, on a CPU with the instruction set."""
    backend = choose(request)
    kernel = op_key(request.op, request.four_bit).removesuffix("_fwd")
    build = native.build_info() if backend.name == native.NAME else None
    if build is not None and request.device == "cpu":
        kernel += f" ({build['cpu_isa']})"
    return backend.name, kernel


def _stock_reason(layer: nn.Module) -> str:
    if fast_class(layer) is not None:
        return "PEFT's own layer; call fastlora.accelerate(model), again if it was added since"
    return f"fastlora has no layer for PEFT's {type(layer).__name__}"


def _input_dtype(parts: Parts) -> torch.dtype:
    """The dtype in which x usually comes: the base weight's, or a 4-bit layer's `compute_dtype`."""
    if parts.quant_state is None:
        return parts.weight.dtype
    adapter = parts.adapters[0].lora_A.dtype if parts.adapters else torch.float32
    return bnb.compute_dtype(parts.base, adapter)


def _base(layer: Any) -> tuple[str, tuple[int, int] | None]:
    """The name of the frozen weight, and `(out_features, in_features)` of it or of each expert."""
    base = layer.get_base_layer()
    if isinstance(layer, ParamWrapper):
        weight = getattr(base, layer.parameter_name)
        experts = f" x {layer.num_experts} experts" if weight.dim() == 3 else ""
        return short(weight.dtype) + experts, (layer.out_features, layer.in_features)
    known = isinstance(base, nn.Linear | Conv1D | nn.Embedding)
    shape = (layer.out_features, layer.in_features) if known else None
    return base_name(base), shape
