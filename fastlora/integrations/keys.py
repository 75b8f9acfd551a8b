"""Whether the tensors of a file are those that a model has."""

from __future__ import annotations

import os
from collections.abc import Iterable

# Dtypes of weights that are no codes, as safetensors and torch name them.
WEIGHT_DTYPES = ("F64", "F32", "F16", "BF16", "float64", "float32", "float16", "bfloat16")
_SHOWN = 4


def check_keys(
    source: str | os.PathLike[str], missing: Iterable[str], unexpected: Iterable[str]
) -> None:
    """Raises a ValueError that names the tensors which `source` lacks, or has in vain."""
    faults = []
    for keys, what in ((missing, "lacks"), (unexpected, "has, and the model has no place for,")):
        if names := sorted(keys):
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            count = f"{len(names)} tensor{'s' if len(names) > 1 else ''}"
            faults.append(f"it {what} {count}: {', '.join(names[:_SHOWN])}{more}")
    if faults:
        raise ValueError(f"{source} doesn't fit the model: {'; '.join(faults)}")


def first_line(error: Exception) -> str:
    """The first line of an error's message; the type's name where it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
