"""The one error policy: a result may be off by twice as much as plain torch in the same dtypes.

    max|out - exact| <= 2 max|base - exact| + eps(out.dtype) max|exact|
    rms(out - exact) <= 2 rms(base - exact) + eps(out.dtype) rms(exact)

`exact` is the float64 reference on the already rounded inputs and `base` the plain torch sequence
in the working dtypes. Both bounds have to hold: the largest error alone hides a bias, the RMS error
alone hides one bad tile. The tests and `fastlora verify` both use this policy, so a user's machine
is held to the same bounds.

Source: the test of flash-attention (largest error, factor two); the RMS bound is added here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

FACTOR = 2.0


@dataclass(frozen=True)
class Report:
    """Errors and bounds. Ratios are error / bound: up to 1 is allowed, inf is a NaN or Inf."""

    max_error: float
    max_bound: float
    rms_error: float
    rms_bound: float

    @property
    def max_ratio(self) -> float:
        """Largest error over its bound."""
        return _ratio(self.max_error, self.max_bound)

    @property
    def rms_ratio(self) -> float:
        """RMS error over its bound."""
        return _ratio(self.rms_error, self.rms_bound)

    @property
    def ok(self) -> bool:
        """True when both errors are within their bounds."""
        return self.max_ratio <= 1.0 and self.rms_ratio <= 1.0

    def __str__(self) -> str:
        return (
            f"largest error {self.max_error:.3g} (allowed {self.max_bound:.3g}), "
            f"RMS error {self.rms_error:.3g} (allowed {self.rms_bound:.3g})"
        )


def exceeds(out: torch.Tensor, exact: torch.Tensor, base: torch.Tensor) -> Report:
    """Compares `out` with `exact`, allowing twice the error of `base`.

    Args:
        out: the result under test, any shape, fp64, fp32, bf16 or fp16; its dtype gives eps.
        exact: the same shape, float64: the reference on the already rounded inputs.
        base: the same shape: plain torch in the working dtypes.

    Raises:
        TypeError: `exact` is not float64, or `out` is not floating point.
        ValueError: the shapes differ.
    """
    if exact.dtype != torch.float64:
        raise TypeError(f"exact must be torch.float64, got {exact.dtype}")
    if not out.dtype.is_floating_point:
        raise TypeError(f"out must be floating point, got {out.dtype}")
    for name, tensor in (("out", out), ("base", base)):
        if tensor.shape != exact.shape:
            raise ValueError(
                f"{name} must have exact's shape {tuple(exact.shape)}, got {tuple(tensor.shape)}"
            )
    if exact.numel() == 0:
        return Report(0.0, 0.0, 0.0, 0.0)
    exact = exact.detach()
    error = (out.detach().to(exact.device, torch.float64) - exact).abs()
    allowed = (base.detach().to(exact.device, torch.float64) - exact).abs()
    eps = torch.finfo(out.dtype).eps
    return Report(
        max_error=float(error.max()),
        max_bound=FACTOR * float(allowed.max()) + eps * float(exact.abs().max()),
        rms_error=_rms(error),
        rms_bound=FACTOR * _rms(allowed) + eps * _rms(exact),
    )


def _rms(tensor: torch.Tensor) -> float:
    return float(tensor.square().mean().sqrt())


def _ratio(error: float, bound: float) -> float:
    # A NaN compares false with everything, so it has to be turned into a failure by hand. A bound
    # that is not finite means that the reference or plain torch overflowed: then nothing was
    # compared, which is no pass either.
    if not (math.isfinite(error) and math.isfinite(bound)):
        return math.inf
    if bound == 0.0:
        return 0.0 if error == 0.0 else math.inf
    return error / bound
