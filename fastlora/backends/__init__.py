"""Which backend runs an op.

`backend=` decides, then `with use_backend(...)`, FASTLORA_BACKEND, and the device's own order.

A backend is a `contract.Backend`, which itself is the reference; a name may stand for one on CPUs
and one on GPUs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..layer import Layer
from . import native, triton
from .contract import Backend, Entry, Request
from .machine import tuned

BACKENDS: dict[str, Entry] = {"native": native, "triton": triton.TRITON, "reference": Backend()}
DEVICE_ORDER: dict[str, tuple[str, ...]] = {
    "cpu": ("native", "reference"),
    "cuda": ("native", "triton", "reference"),
}
_DEFAULT_ORDER = ("reference",)


@dataclass(eq=False)
class _Forced:
    """The name that one `use_backend` block has given."""

    name: str


_forced: list[_Forced] = []  # of the `use_backend` blocks, the innermost last


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Every op inside the `with` block runs on backend `name`, or raises why it can't.

    The choice holds for the whole process, other threads included.
    """
    own = _Forced(_checked(name, "use_backend(name)"))
    _forced.append(own)
    try:
        yield
    finally:
        # Not the last: a block of another thread may have begun since.
        _forced[:] = [each for each in _forced if each is not own]


# `backend=` for a call whose backend was settled before: none is forced.
UNFORCED = "(unforced)"


def forced_backend(backend: str | None = None) -> str | None:
    """The backend that the caller, a `use_backend` block or FASTLORA_BACKEND asks for, or None.

    `UNFORCED` for `backend` gives None, whatever the block and the variable say.
    """
    if backend == UNFORCED:
        return None
    if backend is not None:
        return _checked(backend, "backend")
    if _forced:
        return _forced[-1].name
    if name := os.environ.get("FASTLORA_BACKEND", ""):
        return _checked(name, "FASTLORA_BACKEND")
    return None


def choose(request: Request, backend: str | None = None, prefer: str | None = None) -> Backend:
    """The first backend of the device's order that supports a request.

    Args:
        request: the op, and what `unsupported` looks at.
        backend: a backend's name; it alone is asked.
        prefer: the one to ask before the others, if the order has it.

    Raises:
        ValueError: unknown name. RuntimeError: the forced backend, or every backend, declines.
    """
    name = forced_backend(backend)
    order = (name,) if name else DEVICE_ORDER.get(request.device, _DEFAULT_ORDER)
    if prefer in order:
        order = (prefer, *(candidate for candidate in order if candidate != prefer))
    reasons = []
    for candidate in order:
        reason = BACKENDS[candidate].unsupported(request)
        if reason is None:
            return BACKENDS[candidate].on(request.device)
        reasons.append(f"{candidate}: {reason}")
    raise RuntimeError(f"no backend can run {request.op} on {request.device}. {' '.join(reasons)}")


# The backend that runs a layer's op for one kind of layer, its entry and the entry's `unsupported`.
# A backend that supports a kind of layer once always supports it, and BACKENDS and DEVICE_ORDER are
# constant while a process runs.
_serving: dict[tuple[Any, ...], tuple[Backend, Entry, Any]] = {}


def choose_linear(op: str, x: Tensor, layer: Layer, backend: str | None) -> Backend:
    """`choose` for an op of one linear layer, whose answer for a kind of layer is kept.

    On a GPU the backend that `fastlora tune` found faster is asked first.
    """
    name = forced_backend(backend)
    kept = tuned.kept(op, x, layer) if name is None else None
    if name is not None or kept is not None or torch.compiler.is_compiling():
        # torch.compile takes no function that keeps its answer.
        prefer = None if kept is None else kept.backend
        return choose(Request.of(op, x, layer), name or UNFORCED, prefer)
    four_bit = layer.quant_state is not None
    key = (op, x.device, x.dtype, layer.lora_A.dtype, layer.compute_dtype, four_bit)
    found = _serving.get(key)
    if found is not None and found[1].unsupported == found[2]:
        return found[0]
    chosen = choose(Request.of(op, x, layer), UNFORCED)
    entry = BACKENDS[chosen.name]
    _serving[key] = chosen, entry, entry.unsupported
    return chosen
