"""Ops of several layers, composed of those of one: for backends without a kernel for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ..layer import Grads, Layer, Needs
from .contract import Backend


class Composed(Backend):
    """A backend with `lora_linear_fwd` and `lora_linear_bwd`, which run layer by layer.

    Experts are not copied, and have no dropout; reading their offsets on a GPU waits for it once.
    """

    def shared_linear_fwd(
        self, x: Tensor, layers: Sequence[Layer]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        return reference.shared_linear_fwd(x, layers, self.lora_linear_fwd)

    def shared_linear_bwd(
        self,
        dys: Sequence[Tensor | None],
        x: Tensor,
        layers: Sequence[Layer],
        Ss: Sequence[Tensor],
        needs: Sequence[Needs],
    ) -> tuple[Tensor | None, tuple[Grads, ...]]:
        """Each layer rounds its part of dx; their sum is taken in fp32 and rounded once more."""
        total: Tensor | None = None
        grads: list[Grads] = []
        for dy, layer, S, need in zip(dys, layers, Ss, needs, strict=True):
            own = Grads() if dy is None else self.lora_linear_bwd(dy, x, layer, S, need)
            grads.append(own._replace(x=None))
            if own.x is None:
                continue
            if total is None:
                total = own.x.to(torch.promote_types(own.x.dtype, torch.float32))
            else:
                total.add_(own.x)
        return None if total is None else total.to(x.dtype), tuple(grads)

    def grouped_lora_linear_fwd(self, x: Tensor, layer: Layer) -> tuple[Tensor, Tensor]:
        return reference.grouped_lora_linear_fwd(
            x, layer, lambda x, expert, _: self.lora_linear_fwd(x, expert)
        )

    def grouped_lora_linear_bwd(
        self, dy: Tensor, x: Tensor | None, layer: Layer, S: Tensor | None, needs: Needs
    ) -> Grads:
        return reference.grouped_lora_linear_bwd(
            dy, x, layer, S, needs, lambda *args: self.lora_linear_bwd(*args[:-1])
        )
