"""The ops `torch.ops.fastlora_triton.*`: the kernels behind the schemas.

`shrink` and `skinny_bwd` are the parts of a layer without W, for products with W by other kernels.
Triton is imported when one of the ops first runs.
"""

from __future__ import annotations

from torch import Tensor

from ...layer import Layer, Needs
from .. import schemas
from ..schemas import Packed, filled


def lora_linear_fwd(x: Tensor, layer: Layer) -> tuple[Tensor, Tensor]:
    """`reference.lora_linear_fwd`."""
    from . import launch, linear

    return linear.lora_linear_fwd(launch.launcher(x), x, layer)


def lora_linear_bwd(
    dy: Tensor, x: Tensor, layer: Layer, S: Tensor, needs: Needs
) -> tuple[Tensor, ...]:
    """`reference.lora_linear_bwd`."""
    from . import launch, linear

    return filled(linear.lora_linear_bwd(launch.launcher(x), dy, x, layer, S, needs), x)


def dequantize_4bit_out(weight: Packed, out: Tensor) -> None:
    """`reference.dequantize_4bit` into `out`."""
    from . import launch
    from .kernels import dequantize_4bit

    dequantize_4bit.dequantize_4bit(launch.launcher(out), weight, out)


def shrink(x: Tensor, lora_A: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    """`reference.shrink`."""
    from . import launch, linear

    return linear.tokens_times_A(launch.launcher(x), x, lora_A, dropout_p, seed)


def skinny_bwd(dy: Tensor, x: Tensor, layer: Layer, S: Tensor, needs: Needs) -> tuple[Tensor, ...]:
    """`reference.skinny_bwd`; `needs.x` is not looked at: dS is always computed."""
    from . import launch, linear

    dS, grads = linear.skinny_bwd(launch.launcher(x), dy, x, layer, S, needs._replace(x=True))
    # An op may not return what it was given.
    dS = S.new_zeros(S.shape) if dS is S else dS
    return dS, *filled(grads, x)[1:]


LIBRARY = schemas.define("fastlora_triton", schemas.TRITON_OPS)
for _kernel in (lora_linear_fwd, lora_linear_bwd, dequantize_4bit_out, shrink, skinny_bwd):
    _flat = schemas.gathered(_kernel.__name__, _kernel)
    for _key in ("CPU", "CUDA"):
        LIBRARY.impl(_kernel.__name__, _flat, _key)
