"""The keys of dropout masks, and what keeps a recomputed forward on the mask of the first.

Activation checkpointing runs a forward again in the backward. If it restores the random state, the
key is drawn again as it was. FSDP2's wrapper in accelerate and others switch that off
(`preserve_rng_state=False`); the mask would then be another, and the gradients of another network.
So each dropout remembers the keys of its forwards until they have been replayed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# On a dropout's module: what is known of the forwards that were not replayed, the oldest first.
_PENDING = "_fastlora_pending_seeds"
# Forwards without a backward leave theirs. More than these are taken for such.
_MOST = 16


def draw_seed(device: torch.device) -> Tensor:
    """The key of a dropout, so that torch.manual_seed and checkpointing replay the mask."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


def seed_of(dropout: nn.Module, device: torch.device) -> Tensor:
    """The key of a call of `dropout`; in a recomputed forward, that of the forward it repeats.

    Args:
        dropout: the module that remembers.
        device: of x.

    Raises:
        RuntimeError: the random state was not restored, and several forwards may be meant.
    """
    on_gpu = device.type != "cpu"
    if torch.compiler.is_compiling() or (on_gpu and torch.cuda.is_current_stream_capturing()):
        return draw_seed(device)
    # The state that a draw starts from tells keys apart without waiting for a GPU.
    state = _state_of_generator(device) if on_gpu else None
    seed = draw_seed(device)
    mark = state if on_gpu else int(seed)
    pending: list[tuple[object, Tensor]] = dropout.__dict__.setdefault(_PENDING, [])
    if torch._C._current_graph_task_id() < 0:  # no backward is running
        pending.append((mark, seed))
        del pending[:-_MOST]
        return seed
    for place, (known, _) in enumerate(pending):
        if known == mark:
            del pending[place]
            return seed
    if not pending:
        return seed
    if len(pending) > 1:
        raise RuntimeError(
            "a checkpointed forward with dropout runs again without its random state, and "
            f"{len(pending)} forwards may be meant; checkpoint with preserve_rng_state=True"
        )
    return pending.pop()[1]


def _state_of_generator(device: torch.device) -> object:
    index = torch.cuda.current_device() if device.index is None else device.index
    generator = torch.cuda.default_generators[index]
    return generator.initial_seed(), generator.get_offset()
