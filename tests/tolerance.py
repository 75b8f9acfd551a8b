"""The error policy as an assertion; the policy itself stands in `fastlora.tolerance`."""

from __future__ import annotations

from torch import Tensor

from fastlora.tolerance import exceeds


def assert_close_to_exact(out: Tensor, exact_f64: Tensor, base: Tensor, *, what: str) -> None:
    """`max|out - exact| <= 2 max|base - exact| + eps(out.dtype) max|exact|`, and the same with RMS.

    Args:
        out: the result under test.
        exact_f64: float64 reference on the already rounded inputs.
        base: the plain torch sequence (PEFT's own) in the working dtypes.
        what: name of the result, for the message.

    Raises:
        AssertionError: a bound is exceeded or `out` is not finite; the message shows both figures.
    """
    __tracebackhide__ = True
    report = exceeds(out, exact_f64, base)
    assert report.ok, f"{what} {tuple(out.shape)} {out.dtype}: {report}"
