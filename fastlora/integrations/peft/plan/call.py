"""One call of a fast layer as data: what `plan` finds, and all that `run` reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ....quant import QuantState


class Adapter(NamedTuple):
    """One adapter of a layer.

    Args:
        name: PEFT's name of it.
        lora_A, lora_B: [R, K] and [N, R].
        bias: lora_B's, [N], or None.
        dropout: nn.Dropout or nn.Identity.
        scaling: factor of the LoRA term.
        magnitude: [N], that of DoRA, or None.
        invoked: it serves the invoked tokens alone, as aLoRA does.
        made: A or B is no parameter; it was computed for this call.
    """

    name: str
    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None
    dropout: nn.Module
    scaling: float
    magnitude: Tensor | None
    invoked: bool = False
    made: bool = False

    @property
    def dropout_p(self) -> float:
        """The probability with which a call made now drops an element."""
        # Not getattr: it takes nn.Identity, which has no p, a microsecond to say so.
        state = self.dropout.__dict__
        p: float = state.get("p", 0.0) if state["training"] else 0.0
        return p

    @property
    def drops(self) -> bool:
        """True when the dropout would drop something in a call made now."""
        return self.dropout_p > 0.0


class Parts(NamedTuple):
    """What the fast path reads from a layer.

    Args:
        base: the layer that PEFT's wraps.
        weight: [N, K], for Conv1D a view of what is stored; packed bytes of a 4-bit layer.
        quant_state: of a 4-bit weight, None when dense.
        bias: [N] or None.
        adapters: those that serve the call; none for the base product alone.
        raw_state: bitsandbytes' object that `quant_state` was read from, or None.
    """

    base: nn.Module
    weight: Tensor
    quant_state: QuantState | None
    bias: Tensor | None
    adapters: tuple[Adapter, ...]
    raw_state: Any = None

    @property
    def shape(self) -> tuple[int, int]:
        """`(N, K)` of the base weight."""
        N, K = self.weight.shape if self.quant_state is None else self.quant_state.shape
        return N, K


class Casts(NamedTuple):
    """The dtypes of one call: of x, of the adapters, and of a base product that W is cast for."""

    x: torch.dtype
    adapter: torch.dtype
    compute: torch.dtype | None


class Plan(NamedTuple):
    """One call on the fast path.

    Args:
        parts, casts: the layer's tensors, and the dtypes in which they are read.
        rows: the adapter of each row of a mixed batch, or None.
        invoked: where an adapter is `invoked`, how many tokens at each row's end that means.
        autocast: the call is in an autocast region, which `casts` has taken into account.
    """

    parts: Parts
    casts: Casts
    rows: Sequence[str] | None = None
    invoked: tuple[int, ...] = ()
    autocast: bool = False

    @property
    def together(self) -> list[Adapter]:
        """Adapters that share one launch: those that drop nothing, since each dropout has a mask
        of its own; where all drop, the first. Invoked ones are never among them."""
        adapters = [adapter for adapter in self.parts.adapters if not adapter.invoked]
        return [a for a in adapters if not a.drops] or adapters[:1]

    @property
    def apart_reason(self) -> str | None:
        """Why the call is more than one launch, None where one launch computes all of it."""
        if self.parts.quant_state is None and self.casts.compute is not None:
            return "autocast casts its base weight at each call"
        if not self.parts.adapters:
            return "no adapter is at work"
        several = self.rows is not None or self.parts.adapters[0].magnitude is not None
        if several or len(self.together) != len(self.parts.adapters):
            return "it takes more than one launch"
        return None
