"""One fine-tuning run with one backend, through the Transformers Trainer."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ...version import __version__
from ..errors import CliError
from .records import (
    LOG_FILE,
    RUN_FILE,
    Log,
    RunFile,
    is_last,
    newest_checkpoint,
    step_of,
    summarise,
)

BACKENDS = ("peft", "fastlora")


@dataclass(frozen=True)
class Job:
    """Everything that decides what a run computes. `run.json` keeps it, `--resume` compares it."""

    model: str
    data: str
    out: str
    backend: str
    quant: str
    double_quant: bool
    r: int
    alpha: float
    dropout: float
    target_modules: str
    lr: float
    lr_schedule: str
    warmup_steps: int
    steps: int | None
    epochs: float | None
    batch_size: int
    grad_accum: int
    seq_len: int
    dtype: str
    adapter_dtype: str
    gradient_checkpointing: bool
    eval_split: float
    save_every: int
    seed: int
    threads: int | None
    cache_dir: str | None

    def as_dict(self) -> dict[str, Any]:
        """As JSON keeps it."""
        return dataclasses.asdict(self)


class Observer(Protocol):
    """Who watches a run: the terminal, or the process that compares two runs."""

    def emit(self, event: str, **fields: Any) -> None:
        """Something happened: "status", "facts", "begin", "step", "saved"."""

    def gate(self, name: str, step: int) -> None:
        """Returns when the run may go on. Names: "start", "step" before each step, "end"."""


class Stopped(Exception):
    """The run was asked to stop (Ctrl-C): it has saved and can be resumed."""

    def __init__(self, step: int, steps: int) -> None:
        super().__init__(step, steps)
        self.step = step
        self.steps = steps


def train(job: Job, observer: Observer, *, resume: bool) -> dict[str, Any]:
    """Runs `job` and returns its results, which also stand in `run.json`.

    Args:
        job: what to do; `job.backend` is "peft" or "fastlora".
        observer: told of every step.
        resume: go on from the newest complete checkpoint in `job.out`, where there is one.

    Raises:
        CliError: an argument does not fit the model. Stopped: interrupted, saved.
    """
    observer.emit("status", text="loading libraries")
    quiet_libraries()
    import torch
    from transformers import set_seed

    from ...integrations import transformers as hf
    from .data import Collator, batches, load_data

    if job.threads:
        torch.set_num_threads(job.threads)
    out = Path(job.out)
    out.mkdir(parents=True, exist_ok=True)
    run = RunFile(out / RUN_FILE)
    checkpoint = newest_checkpoint(out) if resume else None

    observer.emit("status", text="loading the model")
    try:
        model, tokenizer = hf.load_causal_lm(
            job.model,
            quant=job.quant,
            double_quant=job.double_quant,
            dtype=getattr(torch, job.dtype),
            cache_dir=job.cache_dir,
        )
    except (FileNotFoundError, ValueError) as error:
        raise CliError(f"--model: {error}") from error
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", job.seq_len)
    if job.seq_len > limit:
        raise CliError(f"--seq-len: the model takes {limit} tokens, not {job.seq_len}")
    data = load_data(job.data, tokenizer, job.seq_len, job.eval_split)
    collator = Collator(tokenizer)

    set_seed(job.seed)
    model = _with_adapter(model, job)
    adapter = trainable_digest(model)
    fast = _accelerate(model) if job.backend == "fastlora" else None
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    digest = data.digest()
    if checkpoint is not None and run.read().get("data_digest") != digest:
        raise CliError(f"--data: {job.data} has changed since the run began")
    run.update(fastlora=__version__, job=job.as_dict(), data_digest=digest)
    observer.emit(
        "facts",
        data=data.description,
        data_digest=digest,
        adapter_digest=adapter,
        trainable=trainable,
        adapted=_adapted_layers(model),
        fast=fast,
        device=str(next(model.parameters()).device),
        threads=torch.get_num_threads(),
        resumed=step_of(checkpoint) if checkpoint else 0,
    )

    def held_out_perplexity() -> float | None:
        if not data.held_out:
            return None
        observer.emit("status", text=f"perplexity of {len(data.held_out)} held-out examples")
        return hf.perplexity(model, batches(data.held_out, collator, job.batch_size))

    if checkpoint is None:
        observer.gate("evaluate", 0)
        run.update(perplexity_before=held_out_perplexity())
    observer.gate("start", 0)

    log = Log(out / LOG_FILE, keep_to_step=step_of(checkpoint) if checkpoint else 0)
    with _stop_on_signal() as stop:
        trainer = _trainer(job, model, data.train, collator, log, observer, stop)
        set_seed(job.seed)
        if checkpoint is not None and is_last(checkpoint):
            # The Trainer would take one step more.
            model.load_adapter(checkpoint, "default", is_trainable=True)
            cast_adapter(model, getattr(torch, job.adapter_dtype))
            steps = step_of(checkpoint)
        else:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            steps = trainer.state.max_steps
            if trainer.state.global_step < steps:
                raise Stopped(trainer.state.global_step, steps)
    observer.gate("end", steps)

    result = {
        **summarise(log.entries()),
        "perplexity_before": run.read()["perplexity_before"],
        "perplexity_after": held_out_perplexity(),
        "trainable": trainable,
    }
    model.save_pretrained(out)
    run.update(result=result)
    observer.emit("status", text="done")
    return result


# ---- the model -------------------------------------------------------------------------------


def _with_adapter(model: Any, job: Job) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=job.r,
        lora_alpha=job.alpha,
        lora_dropout=job.dropout,
        target_modules=_target_modules(model, job.target_modules),
    )
    if job.gradient_checkpointing:
        model.config.use_cache = False
        # Transformers 5.2x renamed it.
        enable = getattr(
            model, "activation_checkpointing_enable", model.gradient_checkpointing_enable
        )
        enable({"use_reentrant": False})
    model = get_peft_model(model, config)
    cast_adapter(model, getattr(torch, job.adapter_dtype))
    return model


def cast_adapter(model: Any, dtype: Any) -> None:
    """Keeps everything that trains in `dtype`."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def _target_modules(model: Any, given: str) -> str | list[str]:
    if given == "all-linear":
        return given
    import torch
    from transformers.pytorch_utils import Conv1D

    linear = (torch.nn.Linear, Conv1D)
    names = [name for name, module in model.named_modules() if isinstance(module, linear)]
    targets = [t.strip() for t in given.split(",") if t.strip()]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            known = sorted({name.rsplit(".", 1)[-1] for name in names})
            raise CliError(
                f"--target-modules: the model has no linear layer {target!r}; "
                f"it has {', '.join(known)}"
            )
    if not targets:
        raise CliError("--target-modules: give all-linear or names of layers, like q_proj,v_proj")
    return targets


def _adapted_layers(model: Any) -> int:
    from peft.tuners.lora import LoraLayer

    return sum(isinstance(m, LoraLayer) for m in model.modules())


def _accelerate(model: Any) -> dict[str, int]:
    """Puts the model on fastlora's kernels; returns how many layers each backend got."""
    from ...integrations.peft import accelerate, explain

    accelerate(model, verbose=False)
    counts: dict[str, int] = {}
    for row in explain(model).rows:
        backend = row.backend or "PEFT's own"
        counts[backend] = counts.get(backend, 0) + 1
    return counts


def trainable_digest(model: Any) -> str:
    """A hash of every trainable parameter: equal for equal adapters."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()


# ---- the Trainer -----------------------------------------------------------------------------


def _trainer(
    job: Job,
    model: Any,
    examples: list[Any],
    collator: Any,
    log: Log,
    observer: Observer,
    stop: _Stop,
) -> Any:
    import torch
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    from ...integrations.transformers import ThroughputCallback, peak_memory

    throughput = ThroughputCallback()
    on_cpu = next(model.parameters()).device.type == "cpu"

    class Gate(TrainerCallback):
        """Comes before the clock starts."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            observer.gate("step", state.global_step)

    class Report(TrainerCallback):
        """Comes after the clock has stopped."""

        first = True
        start_memory_mb = 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            # The model, the adapter and the libraries: the peak has just been reset.
            self.start_memory_mb = peak_memory(args.device) / 2**20
            observer.emit("begin", step=state.global_step, steps=state.max_steps)

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            logs = kwargs["logs"]
            if "loss" not in logs:
                return
            entry = {
                "step": state.global_step,
                "epoch": logs["epoch"],
                "loss": logs["loss"],
                "grad_norm": logs.get("grad_norm"),
                "learning_rate": logs["learning_rate"],
                "first": self.first,
                "start_memory_mb": self.start_memory_mb,
                **throughput.last,
            }
            self.first = False
            log.write(entry)
            observer.emit("step", **entry)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop |= stop.asked
            # The last step is saved too, so that a kill during the evaluation costs no training.
            control.should_save |= stop.asked or state.global_step >= state.max_steps

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            observer.emit("saved", step=state.global_step)

    class LoraTrainer(Trainer):
        """Keeps the adapter's dtype: PEFT reads every adapter back in fp32."""

        def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            super()._load_from_checkpoint(*args, **kwargs)
            cast_adapter(self.model, getattr(torch, job.adapter_dtype))

    args = TrainingArguments(
        output_dir=job.out,
        per_device_train_batch_size=job.batch_size,
        gradient_accumulation_steps=job.grad_accum,
        learning_rate=job.lr,
        lr_scheduler_type=job.lr_schedule,
        warmup_steps=job.warmup_steps,
        max_steps=job.steps or -1,
        num_train_epochs=job.epochs or 1,
        optim="adamw_torch",
        seed=job.seed,
        use_cpu=on_cpu,
        logging_steps=1,
        # A loss that is not a number must be seen, not replaced by the mean of those before it.
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="non_padding",
        save_strategy="steps",
        save_steps=job.save_every,
        save_total_limit=2,
        eval_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=not on_cpu,
    )
    trainer = LoraTrainer(
        model=model,
        args=args,
        train_dataset=examples,
        data_collator=collator,
        callbacks=[Gate(), throughput, Report()],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


class _Stop:
    """Whether a signal has asked the run to stop."""

    asked = False


@contextmanager
def _stop_on_signal() -> Iterator[_Stop]:
    """The first Ctrl-C (or SIGTERM) lets the step end and saves; the second breaks off."""
    stop = _Stop()

    def handler(number: int, frame: Any) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def quiet_libraries() -> None:
    """Leaves the terminal to our own lines; errors still come through."""
    import logging
    import warnings

    # It warns of kernels that it can't fetch as soon as it is imported.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    set_verbosity_error()
    disable_progress_bar()
    # Raised once a run inside torch and the peers, about their own future.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="peft|torch|transformers")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
