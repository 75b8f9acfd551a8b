"""Several LoRA linears of one input."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..backends import choose
from ..backends.machine.tuned import preferred
from ..quant import as_quant_state
from ..reference import Projection
from .checks import check_backward, check_common, check_packed, check_weight

_Trio = tuple[Tensor | None, Tensor | None, Tensor | None]


def shared_linear_fwd(
    x: Tensor, projections: Sequence[Projection], *, backend: str | None = None
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Several LoRA linears of one x: all y_i, all S_i; see `reference.shared_linear_fwd`.

    Raises:
        ValueError: a shape or a seed does not fit; no projection, or dense and 4-bit ones mixed.
        TypeError: a dtype does not fit, or differs from that of the first projection.
        RuntimeError: the backend asked for can't run the op; the message says why.
    """
    projections = _check_projections(x, projections)
    b = _choose("fwd", x, projections, backend)
    return b.shared_linear_fwd(x, projections)


def shared_linear_bwd(
    dys: Sequence[Tensor | None],
    x: Tensor,
    projections: Sequence[Projection],
    Ss: Sequence[Tensor],
    need_dx: bool,
    needs: Sequence[tuple[bool, bool, bool]],
    *,
    backend: str | None = None,
) -> tuple[Tensor | None, tuple[_Trio, ...]]:
    """`dx` and each `(dA, dB, dbias)`; see `reference.shared_linear_bwd`.

    Raises:
        ValueError: a shape, a number of arguments or a seed does not fit.
        TypeError: a dtype does not fit, or differs from that of the first projection.
        RuntimeError: the backend asked for can't run the op; the message says why.
    """
    projections = _check_projections(x, projections)
    for name, given in (("dys", dys), ("Ss", Ss), ("needs", needs)):
        if len(given) != len(projections):
            raise ValueError(
                f"{name} must have {len(projections)} entries, one for each projection, "
                f"got {len(given)}"
            )
    for dy, p, S in zip(dys, projections, Ss, strict=True):
        if dy is not None:
            check_backward(dy, x, p.lora_B, S)
    b = _choose("bwd", x, projections, backend)
    return b.shared_linear_bwd(dys, x, projections, Ss, need_dx, needs)


def _check_projections(x: Tensor, projections: Sequence[Projection]) -> list[Projection]:
    """The projections with flat bytes and fastlora's quant states, after checking all of them."""
    if not projections:
        raise ValueError("projections must name at least one linear, got none")
    checked: list[Projection] = []
    for p in projections:
        if (p.quant_state is None) != (projections[0].quant_state is None):
            raise ValueError("projections must be all dense or all 4-bit, got both")
        if p.quant_state is None:
            check_weight(x, p.weight, p.lora_B)
        else:
            state = as_quant_state(p.quant_state)
            weight = check_packed(x, p.weight, state, p.lora_B)
            p = p._replace(weight=weight, quant_state=state)
        check_common(x, p.bias, p.lora_A, p.lora_B, p.dropout_p, p.seed)
        checked.append(p)
        for name, dtype in _dtypes([p]).items():
            if dtype != (first := _dtypes(checked)[name]):
                raise TypeError(f"{name} must be the same in all projections, {first}, got {dtype}")
    return checked


def _choose(
    direction: str, x: Tensor, projections: Sequence[Projection], backend: str | None
) -> ModuleType:
    """The backend of the single op: one that has it runs several of them, too."""
    first = projections[0]
    what: dict[str, Any] = {"dtype": x.dtype, "index": x.device.index, **_dtypes(projections)}
    if first.quant_state is None:
        return choose(f"lora_linear_{direction}", x.device.type, backend, **what)
    op, dtype = f"qlora_linear_{direction}", first.compute_dtype or x.dtype
    prefer = preferred(op, x, dtype, *first.lora_B.shape)
    return choose(op, x.device.type, backend, prefer=prefer, **what)


def _dtypes(projections: Sequence[Projection]) -> dict[str, torch.dtype | None]:
    """What `choose` asks of projections whose dtypes are those of the first."""
    first = projections[0]
    compute = None if first.quant_state is None else first.compute_dtype
    return {"adapter_dtype": first.lora_A.dtype, "compute_dtype": compute}
