"""One fine-tuning run with one backend, through the Transformers Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...version import __version__
from ..console import quiet_libraries
from ..errors import CliError
from ..options import torch_dtype
from ..process import on_stop_signal
from .data import batches, collator_for, load_data
from .job import Diverged, Job, Observer, Stopped
from .model import accelerate, adapted_layers, cast_adapter, trainable_digest, with_adapter
from .records import (
    Log,
    check_files,
    checkpoints,
    is_last,
    newest_checkpoint,
    read_run,
    step_of,
    summarise,
    update_run,
)
from .trainer import Stop, make_trainer


def train(job: Job, observer: Observer, *, resume: bool) -> dict[str, Any]:
    """Runs `job` and returns its results, which it also writes to `run.json`.

    Args:
        job: what to do; `job.backend` is "peft" or "fastlora".
        observer: gets every step.
        resume: continue from the newest complete checkpoint in `job.out`, if there is one.

    Raises:
        CliError: an argument does not fit the model. Stopped: interrupted, saved. Diverged: the
            loss is not finite.
    """
    observer.emit("status", text="loading libraries")
    quiet_libraries()
    import torch
    from transformers import set_seed

    from ...integrations import transformers as hf

    if job.threads:
        torch.set_num_threads(job.threads)
    out = Path(job.out)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = newest_checkpoint(out) if resume else None

    observer.emit("status", text="loading the model")
    try:
        model, tokenizer = hf.load_causal_lm(
            job.model,
            quant=job.quant,
            double_quant=job.double_quant,
            dtype=torch_dtype(job.dtype),
            cache_dir=job.cache_dir,
        )
    except (FileNotFoundError, ValueError) as error:
        raise CliError(f"--model: {error}") from error
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", job.seq_len)
    if job.seq_len > limit:
        raise CliError(f"--seq-len: the model takes {limit} tokens, not {job.seq_len}")
    data = load_data(job.data, tokenizer, job.seq_len, job.eval_split)
    collator = collator_for(model, tokenizer, data)

    set_seed(job.seed)
    model = with_adapter(model, job, observer)
    adapter = trainable_digest(model)
    fast = accelerate(model) if job.backend == "fastlora" else None
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    digest = data.digest()
    if checkpoint is not None and (read_run(out) or {}).get("data_digest") != digest:
        files = ", ".join(job.data)
        raise CliError(f"--data: the content of {files} has changed since the run began")
    if checkpoint is not None:
        _check_checkpoint(model, checkpoint)
    update_run(out, fastlora=__version__, job=job.as_dict(), data_digest=digest)
    observer.emit(
        "facts",
        data_digest=digest,
        adapter_digest=adapter,
        trainable=trainable,
        adapted=adapted_layers(model),
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
        update_run(out, perplexity_before=held_out_perplexity())
    observer.gate("start", 0)

    log = Log(out, keep_to_step=step_of(checkpoint) if checkpoint else 0)
    stop = Stop()
    with on_stop_signal(stop.ask):
        trainer = make_trainer(job, model, data.train, collator, log, observer, stop)
        set_seed(job.seed)
        if checkpoint is not None and is_last(checkpoint, job.steps):
            # The run was complete. The Trainer would do one more step.
            model.load_adapter(checkpoint, "default", is_trainable=True)
            cast_adapter(model, torch_dtype(job.adapter_dtype))
            steps = step_of(checkpoint)
        else:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            steps = trainer.state.max_steps
            if stop.diverged is not None:
                saved = newest_checkpoint(out)
                raise Diverged(*stop.diverged, step_of(saved) if saved else 0)
            if trainer.state.global_step < steps:
                raise Stopped(trainer.state.global_step, steps)
    observer.gate("end", steps)

    result = {
        **summarise(log.entries()),
        "perplexity_before": (read_run(out) or {})["perplexity_before"],
        "perplexity_after": held_out_perplexity(),
        "trainable": trainable,
    }
    model.save_pretrained(out)
    update_run(out, result=result)
    observer.emit("status", text="done")
    return result


def _check_checkpoint(model: Any, checkpoint: Path) -> None:
    """Checks that a checkpoint can be loaded whole into `model`."""
    from ...integrations.peft.loading import check_saved

    try:
        check_files(checkpoint)
        check_saved(model, checkpoint)
    except (FileNotFoundError, ValueError) as error:
        step = step_of(checkpoint)
        before = [c.name for c in checkpoints(checkpoint.parent) if step_of(c) < step]
        cure = (
            f"remove it to go on from {before[0]}"
            if before
            else "there is no save before it, --overwrite starts anew"
        )
        raise CliError(f"--resume: {checkpoint} is damaged: {error}; {cure}") from error
