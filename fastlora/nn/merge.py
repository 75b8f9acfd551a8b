"""By how much a merged weight misses the exact one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MergeError:
    """By how much a merged weight W', as it is stored, misses `E = W + scaling * B A`.

    max_abs: `max|W' - E|`.
    relative: `||W' - E|| / ||E||` (Frobenius).
    relative_to_update: `||W' - E|| / ||E - W||`; near or above 1, rounding drowns the adapter.
    """

    max_abs: float
    relative: float
    relative_to_update: float

    @classmethod
    def of(cls, before: Tensor, exact: Tensor, stored: Tensor) -> MergeError:
        """The error of `stored`, if `exact` was to replace `before`; all dense."""
        off = stored.to(exact.dtype) - exact
        size = torch.linalg.vector_norm(off)
        return cls(
            max_abs=float(off.abs().amax()) if off.numel() else 0.0,
            relative=_ratio(size, torch.linalg.vector_norm(exact)),
            relative_to_update=_ratio(size, torch.linalg.vector_norm(exact - before)),
        )


def _ratio(part: Tensor, whole: Tensor) -> float:
    return float(part / whole) if part else 0.0
