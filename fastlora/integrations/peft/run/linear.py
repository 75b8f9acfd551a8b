"""What one call of a fast layer computes, once `peft_guard` has found that it may.

The casts stand outside the autograd Functions, so that autograd casts the gradients back and the
backward does not depend on autocast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from ....autograd.dora import dora_linear
from ....autograd.linear import autocast_off, lora_linear
from ....autograd.shared import shared_linear
from ....quant import as_quant_state
from ....reference import Projection
from ... import bitsandbytes as bnb
from .dora import weight_norms

# Devices on which kernels make the masks of DoRA's dropout. On others the reference would, in many
# operations: torch's own dropout is faster there.
_DORA_MASKS = ("cpu",)
# The name by which PEFT's `adapter_names` asks for no adapter.
NO_ADAPTER = "__base__"


class Adapter(NamedTuple):
    """One adapter of a layer; `bias` is lora_B's, `magnitude` that of DoRA, or None.

    `invoked` says that it serves the invoked tokens alone, as aLoRA does; `made`, that A or B is no
    parameter but was made for this call.
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
    def drops(self) -> bool:
        """True when the dropout would drop something in a call made now."""
        return self.dropout.training and getattr(self.dropout, "p", 0.0) > 0.0


class Parts(NamedTuple):
    """What the fast path reads from a layer; `quant_state` is bitsandbytes', None when dense.

    A dense weight is [N, K], for Conv1D a view of what is stored.
    """

    base: nn.Module
    weight: Tensor
    quant_state: Any
    bias: Tensor | None
    adapters: tuple[Adapter, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """`(N, K)` of the base weight."""
        N, K = self.weight.shape if self.quant_state is None else self.quant_state.shape
        return N, K

    @property
    def op(self) -> str:
        """The forward op that serves the layer."""
        return "lora_linear_fwd" if self.quant_state is None else "qlora_linear_fwd"


class Casts(NamedTuple):
    """The dtypes of one call: of x, of the adapters, and of a base product that W is cast for."""

    x: torch.dtype
    adapter: torch.dtype
    compute: torch.dtype | None


class Plan(NamedTuple):
    """One call on the fast path; `rows` names the adapter of each row of a mixed batch.

    `invoked` has, where an adapter is `invoked`, how many tokens at each row's end that means.
    """

    parts: Parts
    casts: Casts
    rows: Sequence[str] | None = None
    invoked: tuple[int, ...] = ()

    def run(self, x: Tensor) -> Tensor:
        """`y = x W^T + bias + sum of scaling * drop(x) A^T B^T`, in the dtypes of PEFT's code."""
        with autocast_off(x.device):
            return self._run(x)

    def _run(self, x: Tensor) -> Tensor:
        if self.parts.quant_state is not None:
            bnb.settle_compute_dtype(self.parts.base, x)
        x = cast(x, self.casts.x)
        if self.rows is not None:
            return self._mixed(x, self.rows)
        adapters = self.parts.adapters
        if adapters[0].magnitude is not None:
            return self._dora(x, adapters[0])
        together = self._together()
        y = _lora_linear(x, self._fused(together) if together else self._base(x))
        for adapter in adapters:
            if adapter.invoked:
                y = self._invoke(y, x, adapter)
            elif adapter.drops and adapter is not together[0]:
                y = (y + self._term(x, adapter)).to(y.dtype)
        return y

    def _invoke(self, y: Tensor, x: Tensor, adapter: Adapter) -> Tensor:
        """`y[m] += scaling * drop(x[m]) A^T B^T` for the invoked tokens m alone, into y itself.

        Without any, A and B get gradients of zeros, as in PEFT's code.
        """
        index = on_device(self._is_invoked(x).view(-1).nonzero().view(-1), x.device)
        rows = x.reshape(-1, x.shape[-1]).index_select(0, index)
        flat = y.view(-1, y.shape[-1])
        sums = flat.index_select(0, index) + self._term(rows, adapter)
        flat.index_copy_(0, index, sums.to(y.dtype))
        return y

    def _is_invoked(self, x: Tensor) -> Tensor:
        """bool [rows, tokens] on the CPU: whether a token is an invoked one."""
        tokens = x.shape[1:-1].numel()
        return torch.arange(tokens) >= tokens - torch.tensor(self.invoked)[:, None]

    @property
    def apart_reason(self) -> str | None:
        """Why `projection` is not all of the call, None where it is."""
        if self.parts.quant_state is None and self.casts.compute is not None:
            return "autocast casts its base weight at each call"
        several = self.rows is not None or self.parts.adapters[0].magnitude is not None
        if several or len(self._together()) != len(self.parts.adapters):
            return "it takes more than one launch"
        return None

    def projection(self, x: Tensor) -> Projection:
        """The call on x as one launch, where no `apart_reason` speaks against it."""
        if self.parts.quant_state is not None:
            bnb.settle_compute_dtype(self.parts.base, x)
        return self._fused(self._together())

    def _together(self) -> list[Adapter]:
        """What drops nothing shares one launch; each dropout has a mask of its own."""
        adapters = [adapter for adapter in self.parts.adapters if not adapter.invoked]
        return [a for a in adapters if not a.drops] or adapters[:1]

    def _fused(self, adapters: Sequence[Adapter]) -> Projection:
        """The base product, the bias and adapters with one mask.

        Biases of lora_B join the base's in fp32: `bias + sum of scaling * bias_B`.
        """
        bias = self._base_bias()
        for adapter in adapters:
            if adapter.bias is not None:
                own = adapter.scaling * adapter.bias.float()
                bias = own if bias is None else bias.float() + own
        return self._projection(bias, self._stacked(adapters))

    def _projection(self, bias: Tensor | None, adapter: Adapter) -> Projection:
        return Projection(
            self.parts.weight,
            bias,
            cast(adapter.lora_A, self.casts.adapter),
            cast(adapter.lora_B, self.casts.adapter),
            adapter.scaling,
            dropout_p=getattr(adapter.dropout, "p", 0.0) if adapter.dropout.training else 0.0,
            quant_state=self.parts.quant_state,
            compute_dtype=self.casts.compute,
        )

    def _base_bias(self) -> Tensor | None:
        bias = self.parts.bias
        # bitsandbytes, too, rounds it to compute_dtype, but writes the result into the bias.
        return None if bias is None else cast(bias, self.casts.compute or self.casts.x)

    def _stacked(self, adapters: Sequence[Adapter]) -> Adapter:
        """`sum of s_i B_i A_i = [s_1 B_1, s_2 B_2, ...] [A_1; A_2; ...]`: one adapter for all.

        Where the scalings differ they go into B, in fp32 for want of a rounding in PEFT's code.
        """
        first = adapters[0]
        if len(adapters) == 1:
            return first
        As = [cast(a.lora_A, self.casts.adapter) for a in adapters]
        Bs = [cast(a.lora_B, self.casts.adapter) for a in adapters]
        scaling = first.scaling
        if any(a.scaling != scaling for a in adapters):
            As = [A.float() for A in As]
            Bs = [B.float() * a.scaling for a, B in zip(adapters, Bs, strict=True)]
            scaling = 1.0
        return first._replace(lora_A=torch.cat(As), lora_B=torch.cat(Bs, dim=1), scaling=scaling)

    def _term(self, x: Tensor, adapter: Adapter) -> Tensor:
        """`scaling * (drop(x) A^T B^T + bias_B)` in plain torch, as in PEFT's code."""
        dtype = self.casts.adapter
        bias = None if adapter.bias is None else cast(adapter.bias, dtype)
        dropped = adapter.dropout(cast(x, dtype))
        S = linear(dropped, cast(adapter.lora_A, dtype))
        return linear(S, cast(adapter.lora_B, dtype), bias) * adapter.scaling

    def _base(self, x: Tensor) -> Projection:
        """The base product alone, which the kernels take as one with zeros of rank 1."""
        return self._projection(self._base_bias(), self._no_adapter(x))

    def _mixed(self, x: Tensor, rows: Sequence[str]) -> Tensor:
        """`y[i] = x[i] W^T + bias + s_a (x[i] A_a^T B_a^T + bias_a)`, `a` the adapter of row i.

        One base product for all rows, and two batched products with each row's own A and B, ranks
        padded by zeros: their work does not grow with the number of adapters.
        """
        adapters, dtype = self.parts.adapters, self.casts.adapter
        y = _lora_linear(x, self._base(x))
        if not adapters:
            return y
        place = {adapter.name: i for i, adapter in enumerate(adapters)}
        # A row without an adapter takes the first one, times zero.
        index = on_device(torch.tensor([place.get(name, 0) for name in rows]), x.device)
        scalings = [adapters[place[name]].scaling if name in place else 0.0 for name in rows]
        scale = torch.tensor(scalings, dtype=dtype)[:, None, None]
        if self.invoked:
            everywhere = [name not in place or not adapters[place[name]].invoked for name in rows]
            scale = scale * (self._is_invoked(x) | torch.tensor(everywhere)[:, None])[..., None]
        scale = on_device(scale, x.device)
        R = max(adapter.lora_A.shape[0] for adapter in adapters)
        As = [pad(cast(a.lora_A, dtype), (0, 0, 0, R - a.lora_A.shape[0])) for a in adapters]
        Bs = [pad(cast(a.lora_B, dtype), (0, R - a.lora_B.shape[1])) for a in adapters]
        x_rows = cast(x, dtype).reshape(len(rows), x.shape[1:-1].numel(), x.shape[-1])
        S = x_rows @ torch.stack(As)[index].mT
        term = (S * scale) @ torch.stack(Bs)[index].mT
        if any(adapter.bias is not None for adapter in adapters):
            none = term.new_zeros(term.shape[-1])
            biases = [none if a.bias is None else cast(a.bias, dtype) for a in adapters]
            term = term + torch.stack(biases)[index][:, None] * scale
        return y + term.to(y.dtype).view(y.shape)

    def _no_adapter(self, x: Tensor) -> Adapter:
        """Zeros of rank 1: the kernels' base product alone."""
        N, K = self.parts.shape
        zeros = torch.zeros(1, K, dtype=self.casts.adapter, device=x.device)
        column = torch.zeros(N, 1, dtype=self.casts.adapter, device=x.device)
        return Adapter(NO_ADAPTER, zeros, column, None, nn.Identity(), 0.0, None)

    def _dora(self, x: Tensor, adapter: Adapter) -> Tensor:
        """`y = x W^T + bias + (f - 1) * x' W^T + f * scaling * x' A^T B^T`, as PEFT has it, where

            x' = drop(x),   f = magnitude / norm of the rows of W + scaling * B A

        Without dropout that is one product, `f * (x W^T + scaling * x A^T B^T) + bias`; with it
        two, as in `dora_linear`; with torch's own masks its two inputs are kept for the backward.
        """
        parts = self.parts
        state = None if parts.quant_state is None else as_quant_state(parts.quant_state)
        A, B = cast(adapter.lora_A, self.casts.adapter), cast(adapter.lora_B, self.casts.adapter)
        norms = weight_norms(parts.weight, parts.quant_state, state, A, B, adapter.scaling)
        assert adapter.magnitude is not None
        factor = adapter.magnitude.float() / norms
        bias = self._base_bias()
        p = self._projection(None, adapter)
        dropout_p = p.dropout_p
        if adapter.drops and x.device.type not in _DORA_MASKS:
            kept, scale = adapter.dropout(torch.ones_like(x)) != 0, 1.0 / (1.0 - dropout_p)
            bias = _lora_linear(torch.where(kept, x * (1.0 - scale), x), self._base(x))
            x, factor, dropout_p = torch.where(kept, x, 0.0), scale * factor, 0.0
        return dora_linear(
            x,
            p.weight,
            bias,
            p.lora_A,
            p.lora_B,
            p.scaling,
            factor,
            dropout_p=dropout_p,
            quant_state=state,
            compute_dtype=p.compute_dtype,
        )


def run_together(plans: Sequence[Plan], x: Tensor) -> tuple[Tensor, ...]:
    """`plan.run(x)` of several plans with the same casts and no `apart_reason`, as one node."""
    with autocast_off(x.device):
        projections = [plan.projection(x) for plan in plans]
        return shared_linear(cast(x, plans[0].casts.x), projections)


def _lora_linear(x: Tensor, p: Projection) -> Tensor:
    return lora_linear(
        x,
        p.weight,
        p.bias,
        p.lora_A,
        p.lora_B,
        p.scaling,
        quant_state=p.quant_state,
        compute_dtype=p.compute_dtype,
        dropout_p=p.dropout_p,
    )


def on_device(values: Tensor, device: torch.device) -> Tensor:
    """A small CPU tensor on `device`; from pinned memory, so that no GPU is waited for."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
