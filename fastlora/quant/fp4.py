"""FP4 of bitsandbytes."""

from __future__ import annotations

from .absmax import AbsmaxFormat

# Sign, two exponent bits, one mantissa bit, over 12, rounded to fp32. Code 8 is +0, as code 0.
FP4 = AbsmaxFormat(
    "fp4",
    code=(
        0.0,
        0.0052083334885537624,
        0.6666666865348816,
        1.0,
        0.3333333432674408,
        0.5,
        0.1666666716337204,
        0.25,
        0.0,
        -0.0052083334885537624,
        -0.6666666865348816,
        -1.0,
        -0.3333333432674408,
        -0.5,
        -0.1666666716337204,
        -0.25,
    ),
)
