"""The settings of a fine-tuning run, and the interface of its observers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Protocol

BACKENDS = ("peft", "fastlora")


@dataclass(frozen=True)
class Job:
    """Everything that decides what a run computes, with the command's defaults.

    `run.json` stores it, and `--resume` compares it.
    """

    model: str
    data: list[str]  # "FILE" or "FILE:WEIGHT"
    out: str
    backend: str = "fastlora"
    quant: str = "nf4"
    double_quant: bool = True
    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    target_modules: str = "all-linear"
    lr: float = 2e-4
    lr_schedule: str = "linear"
    warmup_steps: int = 0
    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 4
    grad_accum: int = 1
    seq_len: int = 512
    dtype: str = "bfloat16"
    adapter_dtype: str = "float32"
    gradient_checkpointing: bool = False
    eval_split: float = 0.05
    save_every: int = 50
    seed: int = 0
    threads: int | None = None
    cache_dir: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """As JSON stores it."""
        return dataclasses.asdict(self)


class Observer(Protocol):
    """Watches a run: the terminal, or the process that compares two runs."""

    def emit(self, event: str, **fields: Any) -> None:
        """Something happened: "status", "facts", "begin", "step", "saved"."""

    def gate(self, name: str, step: int) -> None:
        """Returns when the run may go on. Names: "evaluate", "start", "step", "end"."""


class Diverged(Exception):
    """The loss or the gradient is not finite. Nothing was saved since."""

    def __init__(self, step: int, loss: float, saved: int) -> None:
        super().__init__(step, loss, saved)
        self.step = step
        self.loss = loss
        self.saved = saved  # the step of the last save, 0 if there is none


class Stopped(Exception):
    """The run was asked to stop (Ctrl-C). It has saved and can be resumed."""

    def __init__(self, step: int, steps: int) -> None:
        super().__init__(step, steps)
        self.step = step
        self.steps = steps
