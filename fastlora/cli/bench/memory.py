"""Peak memory of a training step, measured in a worker.

There are four layers in a row, so that what a forward keeps for the backward adds up as in a model.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...integrations.transformers import peak_memory, reset_peak_memory
from ..process import Leader
from .case import Case
from .inputs import Built, Setup
from .providers import PROVIDERS

LAYERS = 4
_STEPS = 3


def work(request: dict[str, Any], leader: Leader) -> dict[str, float]:
    """The memory of `request["case"]` with `request["provider"]`; see `measure`."""
    if threads := request["plan"]["threads"]:
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
    # Several: what one step leaves in the allocator adds to the next.
    peak = peak_mb(lambda: _step(chain, x, dy, case.mode), _STEPS)
    elements = case.M * sum(setups[i % len(setups)].layer.K for i in range(LAYERS))
    saved = 0
    if case.mode == "step":
        leaf = x.detach().requires_grad_()
        saved = saved_bytes(lambda: _forward(chain, leaf), _own(chain, setups))
    return {"peak_mb": peak, "saved_bytes": saved / elements}


def _step(chain: list[Built], x: Tensor, dy: Tensor, mode: str) -> None:
    with torch.set_grad_enabled(mode == "step"):
        leaf = x.detach().requires_grad_(mode == "step")
        y = _forward(chain, leaf)
        if mode == "step":
            adapters = [t for built in chain for t in built.adapter]
            torch.autograd.grad(y, (leaf, *adapters), dy)


def _forward(chain: list[Built], x: Tensor) -> Tensor:
    for built in chain:
        x = built.call(x)
    return x


def _own(chain: list[Built], setups: list[Setup]) -> list[Tensor]:
    """Weights and adapters."""
    own = [tensor for built in chain for tensor in built.adapter]
    for setup in setups:
        own += setup.__dict__.get("dense", [])
        for weight, state in setup.weights:
            own.append(weight)
            if state is not None:
                own += [state.code, *(t for t in state.tensors() if t is not None)]
    return own


def saved_bytes(
    forward: Callable[[], Tensor],
    own: Iterable[Tensor],
    counts: Callable[[Tensor], bool] = lambda tensor: True,
) -> int:
    """Bytes of all storage that a graph's saved tensors keep alive, each counted once.

    Args:
        forward: builds the graph.
        own: what is alive without the graph, and not counted.
        counts: which saved tensors are.
    """
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if counts(tensor):
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    # The result keeps every tensor alive: another could take the address of one that was freed.
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    for tensor in own:
        held.pop(tensor.untyped_storage().data_ptr(), None)
    del result
    return sum(held.values())


def peak_mb(call: Callable[[], object], times: int) -> float:
    """Growth of the resident memory in MiB, at its peak, in so many calls."""
    device = torch.device("cpu")
    _release_free_memory()
    reset_peak_memory(device)
    before = peak_memory(device)
    for _ in range(times):
        call()
    return (peak_memory(device) - before) / 2**20


def _release_free_memory() -> None:
    """Returns free memory of tcmalloc to the system; `reset_peak_memory` does so for glibc."""
    release = getattr(ctypes.CDLL(None), "MallocExtension_ReleaseFreeMemory", None)
    if release is not None:
        release()
