"""The reference as a backend: runs everywhere, on any device and dtype, at plain torch's speed."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import reference
from ..layer import Grads, Layer, Needs
from .contract import Backend, Request, SkinnyBackend


class Reference(SkinnyBackend):
    """`fastlora.reference`; the ops that are not here are the reference's already."""

    name = "reference"

    def unsupported(self, request: Request) -> str | None:
        """None: the reference runs every op."""
        return None

    def lora_linear_fwd(self, x: Tensor, layer: Layer) -> tuple[Tensor, Tensor]:
        return reference.lora_linear_fwd(x, layer)

    def lora_linear_bwd(
        self, dy: Tensor, x: Tensor, layer: Layer, S: Tensor, needs: Needs
    ) -> Grads:
        return reference.lora_linear_bwd(dy, x, layer, S, needs)

    def shared_linear_bwd(
        self,
        dys: Sequence[Tensor | None],
        x: Tensor,
        layers: Sequence[Layer],
        Ss: Sequence[Tensor],
        needs: Sequence[Needs],
    ) -> tuple[Tensor | None, tuple[Grads, ...]]:
        return reference.shared_linear_bwd(dys, x, layers, Ss, needs)

    def grouped_lora_linear_fwd(self, x: Tensor, layer: Layer) -> tuple[Tensor, Tensor]:
        return reference.grouped_lora_linear_fwd(x, layer)

    def grouped_lora_linear_bwd(
        self, dy: Tensor, x: Tensor | None, layer: Layer, S: Tensor | None, needs: Needs
    ) -> Grads:
        return reference.grouped_lora_linear_bwd(dy, x, layer, S, needs)

    def shrink(self, x: Tensor, layer: Layer) -> Tensor:
        return reference.shrink(x, layer)

    def skinny_bwd(
        self, dy: Tensor, x: Tensor, layer: Layer, S: Tensor, needs: Needs
    ) -> tuple[Tensor, Grads]:
        return reference.skinny_bwd(dy, x, layer, S, needs)


REFERENCE = Reference()
unsupported = REFERENCE.unsupported


def on(device: str) -> Backend:
    """The reference, whatever the device."""
    return REFERENCE
