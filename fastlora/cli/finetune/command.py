"""`fastlora finetune`: LoRA or QLoRA on a causal LM, with PEFT, with fastlora, or with both."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console

from ..console import quiet_libraries
from ..errors import CliError, check_writable
from ..options import SHORT_DTYPES, not_negative, positive, positive_float, share
from .compare import compare
from .data import load_data, split_weight
from .job import BACKENDS, Diverged, Job, Stopped
from .preview import print_data
from .records import (
    LOCK_FILE,
    LOG_FILE,
    RUN_FILE,
    Locked,
    checkpoints,
    is_checkpoint,
    locked,
    read_log,
    read_run,
    update_run,
)
from .report import CSV_FILE, PLOT_FILE, print_comparison, print_result, write_csv, write_plot
from .terminal import TerminalObserver
from .training import train

# These may differ when a run is resumed: they change at most the rounding, and steps the length.
_FREE_ON_RESUME = ("out", "save_every", "threads", "cache_dir", "steps")
_WRITTEN = (
    *BACKENDS,
    "checkpoint-*",
    "adapter_config.json",
    "adapter_model.safetensors",
    "README.md",
    LOG_FILE,
    CSV_FILE,
    PLOT_FILE,
    RUN_FILE,
    ".replaced-*",
)


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """The command's arguments. Arguments that are not given stay absent, which --resume needs."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "finetune",
        help="fine-tune your model with LoRA or QLoRA, also side by side with PEFT",
        description=(
            "Fine-tunes a causal LM with LoRA (--quant none) or QLoRA through the\n"
            "Transformers Trainer, and writes an adapter that PEFT can load."
        ),
        argument_default=argparse.SUPPRESS,
        usage="fastlora finetune --model PATH --data FILE --out FOLDER [options]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(
            "--backend both runs PEFT and fastlora with the same seed, adapter and data, one\n"
            "step each in turn, and compares time, memory and loss."
        ),
    )
    files = parser.add_argument_group("what to train")
    files.add_argument("--model", metavar="PATH", help="model folder, or a GGUF file")
    files.add_argument(
        "--data",
        metavar="FILE",
        action="append",
        help='text; or JSONL, JSON, CSV, TSV, Parquet or Arrow, also in gz, with "text", "prompt" '
        'and "completion", or "messages"; can be given several times, FILE:2 takes each example '
        "twice in an epoch, FILE:0.5 half of them",
    )
    files.add_argument("--out", metavar="FOLDER", help="for adapter, checkpoints and log")
    again = files.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="continue from the last save in --out")
    again.add_argument("--overwrite", action="store_true", help="replace an earlier run in --out")
    files.add_argument(
        "--dry-run", action="store_true", help="show what would be trained on, and write nothing"
    )
    files.add_argument(
        "--cache-dir", metavar="FOLDER", help="for converted GGUF files (~/.cache/fastlora)"
    )

    model = parser.add_argument_group("model")
    _add(model, "--backend", "who runs the LoRA layers", choices=("fastlora", "peft", "both"))
    _add(model, "--quant", "of the frozen weights", choices=("nf4", "fp4", "none"))
    _add(model, "--double-quant", "absmax in 8 bits as well", action=argparse.BooleanOptionalAction)
    _add(model, "--dtype", "of the frozen weights, or their compute dtype", choices=SHORT_DTYPES)
    _add(model, "--adapter-dtype", "of A and B", choices=SHORT_DTYPES)
    _add(
        model,
        "--gradient-checkpointing",
        "less memory, more time",
        action=argparse.BooleanOptionalAction,
    )

    lora = parser.add_argument_group("LoRA")
    _add(lora, "--r", "rank", type=positive)
    _add(lora, "--alpha", "scaling is alpha / r", type=positive_float)
    _add(lora, "--dropout", "on the adapter's input", type=share(below=1.0))
    _add(lora, "--target-modules", "layers, like q_proj,v_proj", metavar="NAMES")

    training = parser.add_argument_group("training")
    length = training.add_mutually_exclusive_group()
    length.add_argument("--steps", type=positive, metavar="N", help="optimizer steps")
    length.add_argument("--epochs", type=positive_float, metavar="N", help="or epochs (1)")
    _add(training, "--lr", "learning rate of AdamW", type=positive_float)
    _add(training, "--lr-schedule", "", choices=("linear", "cosine", "constant_with_warmup"))
    _add(training, "--warmup-steps", "", type=not_negative)
    _add(training, "--batch-size", "examples in a forward", type=positive)
    _add(training, "--grad-accum", "forwards in a step", type=positive)
    _add(training, "--seq-len", "tokens in an example, at most", type=positive)
    _add(training, "--eval-split", "share held out for the perplexity", type=share(below=0.51))
    _add(training, "--save-every", "steps between saves", type=positive)
    _add(training, "--seed", "", type=not_negative)
    training.add_argument("--threads", type=positive, metavar="N", help="CPU threads (torch's)")
    return parser


def _add(group: Any, flag: str, text: str, **options: Any) -> None:
    default = getattr(Job, flag[2:].replace("-", "_"))
    if isinstance(default, bool):
        default = "on" if default else "off"
    elif "choices" in options:
        text = ": ".join(part for part in (text, " | ".join(options["choices"])) if part)
        options["metavar"] = "NAME"
    else:
        options.setdefault("metavar", "N")
    group.add_argument(flag, help=f"{text} ({default})".strip(), **options)


def run(args: argparse.Namespace) -> int:
    """Checks the arguments, runs the job, prints the table."""
    fields = {f.name for f in dataclasses.fields(Job)}
    given = {k: v for k, v in vars(args).items() if k in fields}
    # A run can be resumed from another working directory.
    for name in ("model", "out"):
        if name in given:
            given[name] = _absolute(given[name])
    if "data" in given:
        given["data"] = [_absolute_source(file) for file in given["data"]]
    resume, dry = getattr(args, "resume", False), getattr(args, "dry_run", False)
    if dry and not resume:
        given.setdefault("out", "")
    if "out" not in given:
        raise CliError("--out: give the folder for adapter, checkpoints and log")
    job = _resumed(given) if resume else new_job(**given)
    if dry:
        _check(job, Console())
        return 0
    return execute(job, resume=resume, overwrite=getattr(args, "overwrite", False))


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().resolve())


def _absolute_source(file: str) -> str:
    path, _ = split_weight(file)
    return _absolute(path) + file.removeprefix(path)


def execute(job: Job, *, resume: bool, overwrite: bool, console: Console | None = None) -> int:
    """Runs a job; returns the exit status."""
    console = console or Console()
    out = Path(job.out)
    if not resume:
        _check_free(out, overwrite)
    check_writable("--out", out)
    _check(job, console)
    with _made(out), locked(out):
        if not resume:
            _check_free(out, overwrite)  # another run may have ended here in the meantime
        with nullcontext() if resume else _replacing(out):
            return _run(job, console, resume)


def _run(job: Job, console: Console, resume: bool) -> int:
    out = Path(job.out)
    backends = BACKENDS if job.backend == "both" else (job.backend,)
    if not resume:
        update_run(out, job=job.as_dict())
    try:
        with TerminalObserver(console, backends) as observer:
            if job.backend == "both":
                results = compare(job, observer, resume=resume)
            else:
                results = {job.backend: train(job, observer, resume=resume)}
    except Stopped as stopped:
        console.print(
            f"Stopped after step {stopped.step} of {stopped.steps}, and saved. Go on with\n"
            f"  fastlora finetune --resume --out {shlex.quote(job.out)}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        return 130
    except Diverged as diverged:
        step, loss, saved = diverged.args
        kept = f"the save after step {saved} is kept" if saved else "nothing was saved"
        console.print(
            f"Diverged at step {step}: loss or gradient is not finite (loss {loss}); {kept}.\n"
            "A lower --lr may help; at the first step, look at the model's weights.",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        return 3
    _report(console, job, results, observer.facts)
    return 0


def _report(
    console: Console, job: Job, results: dict[str, Any], facts: dict[str, dict[str, Any]]
) -> None:
    out = Path(job.out)
    console.print()
    if job.backend == "both":
        print_comparison(console, results)
        write_csv(out)
        logs = {b: read_log(out / b / LOG_FILE) for b in BACKENDS}
        update_run(out, results=results)
        written = f"{'/, '.join(BACKENDS)}/ (adapters, logs), {CSV_FILE}, {RUN_FILE}"
    else:
        print_result(console, job.backend, results[job.backend])
        logs = {job.backend: read_log(out / LOG_FILE)}
        written = f"adapter_model.safetensors, {LOG_FILE}, {RUN_FILE}"
    title = f"{_model_name(job)}, {_method(job)}"
    if write_plot(out / PLOT_FILE, logs, title):
        written += f", {PLOT_FILE}"
    else:
        console.print("No plot: matplotlib is missing (pip install matplotlib).")
    console.print()
    if fast := facts.get("fastlora", {}).get("fast"):
        layers = ", ".join(f"{count} {backend}" for backend, count in sorted(fast.items()))
        console.print(f"fastlora's layers: {layers}", highlight=False, markup=False)
    if facts.get("peft", {}).get("device") == "cpu" and job.quant != "none":
        console.print("PEFT runs with bitsandbytes' CPU repacking off: it would drop gradients.")
    console.print(f"In {job.out}: {written}", highlight=False, markup=False, soft_wrap=True)


# ---- arguments -------------------------------------------------------------------------------


def new_job(**given: Any) -> Job:
    """A job of the arguments given and the command's defaults.

    Raises:
        CliError: model or data is not given.
    """
    for name in ("model", "data"):
        if name not in given:
            raise CliError(f"--{name}: missing (see fastlora finetune --help)")
    return Job(**given)


def _resumed(given: dict[str, Any]) -> Job:
    saved = read_run(Path(given["out"]))
    if saved is None:
        raise CliError(f"--resume: no run in {given['out']} (it has no {RUN_FILE})")
    job = saved.get("job")
    if not isinstance(job, dict) or job.keys() != {f.name for f in dataclasses.fields(Job)}:
        raise CliError(
            f"--resume: {given['out']}/{RUN_FILE} is of another version of fastlora, or damaged; "
            "--overwrite starts the run anew"
        )
    if isinstance(job["data"], str):  # a run of before there could be several
        job["data"] = [job["data"]]
    for name, value in given.items():
        if name not in _FREE_ON_RESUME and value != job[name]:
            flag = "--" + name.replace("_", "-")
            raise CliError(
                f"{flag}: the run in {given['out']} was started with {job[name]}, not {value}; "
                "leave it out to resume"
            )
    return Job(**{**job, **{k: v for k, v in given.items() if k in _FREE_ON_RESUME}})


def _check_free(out: Path, overwrite: bool) -> None:
    """Checks that a new run may write to `out`."""
    if out.exists() and not out.is_dir():
        raise CliError(f"--out: {out} is a file")
    if not out.is_dir() or not any(path.name != LOCK_FILE for path in out.iterdir()):
        return
    if not (out / RUN_FILE).is_file():
        raise CliError(f"--out: {out} holds files but no run of fastlora's; take another folder")
    if not overwrite:
        raise CliError(
            f"--out: {out} holds a run; add --resume to go on or --overwrite to replace it"
        )


@contextmanager
def _made(out: Path) -> Iterator[None]:
    """Makes a folder, and removes what of it and its parents was made if the run is refused."""
    made = [path for path in (out, *out.parents) if not path.exists()]
    try:
        out.mkdir(parents=True)
    except FileExistsError:
        made = []
    try:
        yield
    except Locked:
        raise  # another run is at work there
    except CliError:
        for path in made:
            if path == out:
                shutil.rmtree(path)
            else:
                with suppress(OSError):  # another run has made a folder beside it
                    path.rmdir()
        raise


@contextmanager
def _replacing(out: Path) -> Iterator[None]:
    """Sets the files of an earlier run in `out` aside, and puts them back if the new one is refused
    or ends before it has saved anything.
    """
    aside = Path(tempfile.mkdtemp(prefix=".replaced-", dir=out))
    saved = False
    try:
        for path in _files_of_a_run(out, but=aside):
            path.rename(aside / path.name)
        yield
        saved = _has_saved(out)
    except CliError:
        raise
    except BaseException:
        saved = _has_saved(out)
        raise
    finally:
        if not saved:
            for path in _files_of_a_run(out, but=aside):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            for path in aside.iterdir():
                path.rename(out / path.name)
        shutil.rmtree(aside)


def _has_saved(out: Path) -> bool:
    """Whether a run in `out` has saved anything to go on from, or its result."""
    folders = out, *(out / backend for backend in BACKENDS)
    return any(checkpoints(f) or (f / "adapter_model.safetensors").is_file() for f in folders)


def _files_of_a_run(out: Path, but: Path) -> list[Path]:
    """What runs have written to `out`, and nothing else."""
    found = [path for pattern in _WRITTEN for path in out.glob(pattern) if path != but]
    return [path for path in found if not path.match("checkpoint-*") or is_checkpoint(path)]


def _check(job: Job, console: Console) -> None:
    """Checks model and data before anything is written, and shows them; converts a GGUF file."""
    for path, _ in map(split_weight, job.data):
        if not Path(path).exists():
            raise CliError(f"--data: no such file: {path}")
    if not Path(job.model).exists():
        raise CliError(
            f"--model: no such folder or file: {job.model}; a model of the Hugging Face Hub comes "
            "by `hf download NAME --local-dir FOLDER`"
        )
    _check_packages(job)
    quiet_libraries()
    from ...integrations.transformers import load_tokenizer, model_folder

    try:
        _announce_conversion(job, console)
        tokenizer = load_tokenizer(model_folder(job.model, job.cache_dir))
    except (FileNotFoundError, ValueError) as error:
        raise CliError(f"--model: {error}") from error
    data = load_data(job.data, tokenizer, job.seq_len, job.eval_split)
    console.print(
        f"model    {_model_name(job)}\nmethod   {_method(job)}\n", highlight=False, markup=False
    )
    print_data(console, data, tokenizer, job)


def _announce_conversion(job: Job, console: Console) -> None:
    """Explains why the first run with a GGUF file takes a minute longer."""
    from ...integrations.transformers import gguf_cache_folder, is_gguf

    if is_gguf(job.model):
        folder = gguf_cache_folder(job.model, job.cache_dir)
        if not folder.is_dir():
            console.print(
                f"Converting the GGUF file, once; the result is kept in\n{folder.parent}",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )


def _check_packages(job: Job) -> None:
    needed = ["transformers", "peft", "accelerate"]
    if job.quant != "none":
        needed.append("bitsandbytes")
    if Path(job.model).is_file():
        needed.append("gguf")
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise CliError(
            f"missing: {', '.join(missing)}; in fastlora's source folder, "
            "`pip install '.[finetune]'` installs it"
        )


def _model_name(job: Job) -> str:
    path = Path(job.model).expanduser().resolve()
    return path.stem if path.is_file() else path.name


def _method(job: Job) -> str:
    dtype, adapter = SHORT_DTYPES[job.dtype], SHORT_DTYPES[job.adapter_dtype]
    if job.quant == "none":
        return f"LoRA on {dtype}, {adapter} adapter"
    double = " + double quant" if job.double_quant else ""
    return f"QLoRA on {job.quant}{double}, {dtype} compute, {adapter} adapter"
