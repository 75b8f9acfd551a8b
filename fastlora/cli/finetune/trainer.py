"""The Transformers Trainer of a run: its settings, and callbacks that wait, report and stop."""

from __future__ import annotations

import math
from typing import Any

from ..options import torch_dtype
from .job import Job, Observer
from .model import cast_adapter
from .records import Log


class Stop:
    """Whether the run was asked to stop, or has to."""

    asked = False
    # Where the loss or the gradient was not finite first: the step, and the loss.
    diverged: tuple[int, float] | None = None

    def ask(self) -> None:
        """The first call lets the step end and save; the second breaks off."""
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


def make_trainer(
    job: Job,
    model: Any,
    examples: list[Any],
    collator: Any,
    log: Log,
    observer: Observer,
    stop: Stop,
) -> Any:
    """The Trainer for `job`.

    Args:
        examples, collator: the training data, and how to batch it.
        log: gets an entry for each step.
        observer: gets every step, and opens its gate.
        stop: asked after every step; told when the loss is not finite.
    """
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    from ...integrations.transformers import ThroughputCallback, peak_memory

    throughput = ThroughputCallback()
    on_cpu = next(model.parameters()).device.type == "cpu"

    class Gate(TrainerCallback):
        """Waits before the clock starts."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            observer.gate("step", state.global_step)

    class Report(TrainerCallback):
        """Reports after the clock has stopped."""

        first = True
        start_memory_mb = 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            # The peak has just been reset: this is the model, the adapter and the libraries.
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
            if not (math.isfinite(logs["loss"]) and math.isfinite(logs.get("grad_norm", 0.0))):
                # The adapter has lost its values in this step, which is not to be saved.
                stop.diverged = state.global_step, logs["loss"]
                control.should_training_stop, control.should_save = True, False

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop |= stop.asked
            # The last step is saved too, so that a kill during the evaluation loses no training.
            control.should_save |= stop.asked or state.global_step >= state.max_steps

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            observer.emit("saved", step=state.global_step)

    class LoraTrainer(Trainer):
        """Keeps the adapter's dtype: PEFT loads every adapter in fp32."""

        def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            super()._load_from_checkpoint(*args, **kwargs)
            cast_adapter(self.model, torch_dtype(job.adapter_dtype))

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
        # A NaN loss must be shown, not replaced by the mean of the losses before it.
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
