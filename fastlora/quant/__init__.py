"""4-bit weights: how they are decoded (`QuantState`), and their formats (`FORMATS`).

A format is one instance in one file: `nf4`, `fp4` and `mxfp4`. Adding one touches its file, the
tuple in `registry` and the bases in tests/cases.py.
"""

from __future__ import annotations

from .absmax import BLOCKSIZES, AbsmaxFormat, dynamic_code, quantize_bounds
from .format import Format
from .mxfp4 import from_mxfp4, to_mxfp4
from .registry import FORMATS, QUANT_TYPES, as_quant_state, find_format
from .state import NESTED_BLOCKSIZE, QuantState, packed_bytes

# Pickles name the module of a class: QuantState keeps naming this one.
QuantState.__module__ = __name__
