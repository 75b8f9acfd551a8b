"""Peak memory of a training step, measured in a worker.

There are four layers in a row, so that what a forward keeps for the backward adds up as in a model.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..process import Leader
from .case import Case

if TYPE_CHECKING:
    from torch import Tensor

    from .inputs import Built, Setup

LAYERS = 4
_STEPS = 3


def work(request: dict[str, Any], leader: Leader) -> dict[str, float]:
    """The memory of `request["case"]` with `request["provider"]`; see `measure`."""
    if threads := request["plan"]["threads"]:
        import torch

        torch.set_num_threads(threads)
    return measure(Case.from_dict(request["case"]), request["provider"])


def measure(case: Case, provider: str) -> dict[str, float]:
    """Runs steps of `LAYERS` layers (N x K, K x N, N x K, ...) and returns the columns

        peak_mb: growth of the resident memory in MiB over weights, adapters, x and dy
        saved_bytes: bytes that autograd keeps for the backward, for each element of the layers'
            inputs, without weights and adapters; 0 in inference

    Call it in a fresh process.

    Args:
        case: its mode is "step" or "inference".
        provider: a name in PROVIDERS.
    """
    import torch

    from ...integrations.transformers import peak_memory, reset_peak_memory
    from .inputs import Setup
    from .providers import PROVIDERS

    layer = case.layer
    turned = replace(layer, N=layer.K, K=layer.N)
    setups = [Setup(layer, LAYERS)]
    if turned != layer:
        setups = [Setup(layer, LAYERS // 2), Setup(turned, LAYERS // 2)]
    chain = [
        PROVIDERS[provider].build(setups[i % len(setups)], i // len(setups)) for i in range(LAYERS)
    ]
    for built in chain:
        built.train(case.mode == "step")
    dy = torch.randn(case.M, layer.N if len(setups) == 1 else layer.K).to(setups[0].dtype)
    x = setups[0].tokens(case.M)[0]

    # The first step, on few tokens, loads code and starts threads.
    _step(chain, x[:2], dy[:2], case.mode)
    device = torch.device("cpu")
    release_free_memory()
    reset_peak_memory(device)
    before = peak_memory(device)
    # Several: what one step leaves in the allocator adds to the next.
    for _ in range(_STEPS):
        _step(chain, x, dy, case.mode)
    peak = peak_memory(device) - before
    elements = case.M * sum(setups[i % len(setups)].layer.K for i in range(LAYERS))
    saved = _saved_bytes(chain, setups, x, dy) if case.mode == "step" else 0
    return {"peak_mb": peak / 2**20, "saved_bytes": saved / elements}


def _step(chain: list[Built], x: Tensor, dy: Tensor, mode: str) -> None:
    import torch

    with torch.set_grad_enabled(mode == "step"):
        leaf = x.detach().requires_grad_(mode == "step")
        y = leaf
        for built in chain:
            y = built.call(y)
        if mode == "step":
            adapters = [t for built in chain for t in built.adapter]
            torch.autograd.grad(y, (leaf, *adapters), dy)


def _saved_bytes(chain: list[Built], setups: Iterable[Setup], x: Tensor, dy: Tensor) -> int:
    """Bytes of all storage that saved tensors keep alive, each counted once."""
    import torch

    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    # No tensor may be freed here: another could take its address.
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = x.detach().requires_grad_()
        for built in chain:
            y = built.call(y)
    for setup in setups:
        for tensor in _constants(setup):
            held.pop(tensor.untyped_storage().data_ptr(), None)
    for built in chain:
        for tensor in built.adapter:
            held.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(held.values())


def _constants(setup: Setup) -> list[Tensor]:
    tensors: list[Tensor] = [*setup.__dict__.get("dense", [])]
    for weight, state in setup.weights:
        tensors.append(weight)
        tensors += [t for t in state.tensors() if t is not None] if state is not None else []
        tensors += [state.code] if state is not None else []
    return tensors


def release_free_memory() -> None:
    """Returns free memory of tcmalloc to the system; `reset_peak_memory` does so for glibc."""
    release = getattr(ctypes.CDLL(None), "MallocExtension_ReleaseFreeMemory", None)
    if release is not None:
        release()
