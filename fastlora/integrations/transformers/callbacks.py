"""Callbacks for the Transformers Trainer."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import TrainerCallback

from .memory import peak_memory, reset_peak_memory


class FastLoraCallback(TrainerCallback):
    """Runs the Trainer's PEFT model on fastlora's kernels, from the Trainer's construction on.

    So `evaluate`, `predict` and reference passes before `train` run on them, too, and the model is
    not wrapped yet (FSDP2, DDP, compile). A callback that is added later acts when training begins.

    Args:
        restore: give the model PEFT's own layers back when training ends.
        options: as `fastlora.accelerate` takes them.
    """

    def __init__(self, restore: bool = False, **options: Any) -> None:
        self.restore = restore
        self.options = options

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Other models than PEFT's may become such before training.
        if _unaccelerated(kwargs["model"]):
            self._accelerate(kwargs["model"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        # Again for layers that were added since; for a model without any, the warning.
        if _unaccelerated(model) or not _accelerated(model):
            self._accelerate(model)

    def _accelerate(self, model: Any) -> None:
        from ..peft import accelerate

        accelerate(model, **self.options)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.restore:
            from ..peft import restore

            restore(kwargs["model"])


def _unaccelerated(model: Any) -> bool:
    """Whether the model has layers of PEFT's that fastlora has a class for."""
    from ..peft.swap import fast_class

    return any(fast_class(module) is not None for module in model.modules())


def _accelerated(model: Any) -> bool:
    from ..peft.swap import is_fast

    return any(is_fast(module) for module in model.modules())


class ThroughputCallback(TrainerCallback):
    """Adds `seconds`, `tokens`, `tokens_per_second` and `peak_memory_mb` to every log entry.

    They describe the last step, from its first forward to the end of the optimizer's step. Saving,
    evaluating and reading data don't count. The Trainer counts the tokens, so they need
    `TrainingArguments(include_num_input_tokens_seen=...)`. Peak memory counts from the start of
    training (CUDA: allocated; CPU: resident).

    `last` and the callbacks added after this one see the fields. The Trainer's own log_history is
    written earlier, without them.
    """

    def __init__(self) -> None:
        self.last: dict[str, float] = {}
        self._began = 0.0
        self._tokens_before = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._device = args.device
        self._tokens_before = int(state.num_input_tokens_seen)
        reset_peak_memory(self._device)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._synchronize()
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._synchronize()
        seconds = time.perf_counter() - self._began
        # Count from the end of the last step: Transformers 4 counts a batch before its step begins.
        tokens = int(state.num_input_tokens_seen) - self._tokens_before
        self._tokens_before += tokens
        self.last = {
            "seconds": seconds,
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "peak_memory_mb": peak_memory(self._device) / 2**20,
        }

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if "loss" in kwargs["logs"]:
            kwargs["logs"].update(self.last)

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
