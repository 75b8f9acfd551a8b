"""`fastlora merge`: merges an adapter into its model, and reports the rounding error."""

from __future__ import annotations

import argparse
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

from .console import layer_bar, quiet_libraries, wide_console
from .errors import CliError, check_writable
from .options import SHORT_DTYPES, add_double_quant, positive, torch_dtype

# Tokens in an example of the text that --calibrate names.
_LENGTH = 512
_EXAMPLES_AT_ONCE = 4


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """The command's arguments."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "merge",
        help="merge an adapter into its model, dense or 4-bit, with the rounding error",
        description=(
            "Merges a PEFT adapter into its model and writes the merged model. Sums are in fp32 "
            "and rounded once. A table shows how much of the update rounding loses."
        ),
    )
    parser.add_argument("--model", metavar="FOLDER", required=True, help="model, dense or 4-bit")
    parser.add_argument("--adapter", metavar="FOLDER", required=True, help="as PEFT saves it")
    parser.add_argument("--out", metavar="FOLDER", required=True, help="must not exist")
    parser.add_argument(
        "--into", choices=("dense", "4bit"), default="dense", help="weights to write (dense)"
    )
    parser.add_argument(
        "--quant",
        choices=("nf4", "fp4"),
        help="quantise a dense model first, as its training did: --into dense then writes the "
        "decoded 4-bit weights plus the adapter; --into 4bit implies nf4",
    )
    add_double_quant(parser)
    parser.add_argument("--dtype", choices=SHORT_DTYPES, help="of dense weights (the model's own)")
    parser.add_argument(
        "--base",
        metavar="FOLDER",
        help="16-bit weights that a 4-bit --model was quantised from; not for a dense --model",
    )
    parser.add_argument(
        "--calibrate",
        metavar="FILE",
        help="text or JSONL: --into 4bit of a 4-bit --model then minimises the error on the "
        "model's inputs for this text; use it if the 16-bit weights are not available",
    )
    parser.add_argument(
        "--examples", type=positive, default=32, metavar="N", help=f"of {_LENGTH} tokens (32)"
    )
    parser.add_argument("--layers", action="store_true", help="a line of the table for each layer")
    return parser


def run(args: argparse.Namespace) -> int:
    """Loads, merges, prints the table, writes."""
    out = Path(args.out)
    _check(args, out)
    if args.dtype is not None:
        args.dtype = torch_dtype(args.dtype)
    quiet_libraries()
    console = wide_console()
    from ..integrations.peft.loading import adapter_config, load_adapter, trained_tensors
    from ..integrations.peft.merge.merge import merge_adapter

    try:
        config, heads = adapter_config(args.adapter), trained_tensors(args.adapter)
    except (FileNotFoundError, ValueError) as error:
        raise CliError(f"--adapter: {error}") from error
    model, originals = _load(args, config.task_type, heads)
    tokenizer = _tokenizer(args.model)
    if tokenizer is not None and (trained := _tokenizer(args.adapter)) is not None:
        tokenizer.chat_template = trained.chat_template or tokenizer.chat_template
    try:
        model = load_adapter(model, args.adapter).eval()
    except ValueError as error:
        raise CliError(f"--adapter: {error}") from error
    moments = _moments(args, model, tokenizer) if args.calibrate else None
    try:
        with layer_bar(console, "merging") as progress:
            report = merge_adapter(
                model,
                into=args.into,
                dtype=args.dtype,
                base=originals,
                moments=moments,
                progress=progress,
            )
    except ValueError as error:
        raise CliError(str(error)) from error
    with warnings.catch_warnings():
        # It would warn that everything is merged already.
        warnings.simplefilter("ignore")
        model = model.merge_and_unload()
    if args.into == "dense":
        from ..integrations.bitsandbytes import make_dense

        make_dense(model, args.dtype)
    console.print(report.table(each=args.layers))
    console.print(report.summary(), highlight=False)
    _write(model, tokenizer, out)
    console.print(f"written: {out}", highlight=False, markup=False, soft_wrap=True)
    return 0


def _check(args: argparse.Namespace, out: Path) -> None:
    """Finds wrong arguments before a model is loaded."""
    if out.exists():
        raise CliError(f"--out: {out} exists; nothing is overwritten")
    check_writable("--out", out)
    if not (Path(args.model) / "config.json").is_file():
        raise CliError(f"--model: expected a folder with config.json, got {args.model}")
    if args.calibrate and args.into != "4bit":
        raise CliError("--calibrate: only --into 4bit rounds by it")
    if args.calibrate and (args.base or not _is_stored_in_4bit(args.model)):
        raise CliError(
            "--calibrate: with 16-bit weights, those of --base or a dense --model, plain rounding "
            "gives a better model"
        )
    if args.base and not list(Path(args.base).glob("*.safetensors")):
        raise CliError(f"--base: expected a folder with *.safetensors files, got {args.base}")


def _is_stored_in_4bit(folder: str) -> bool:
    return getattr(_config(folder), "quantization_config", None) is not None


def _config(folder: str) -> Any:
    from ..integrations.transformers.loading import load_config

    try:
        return load_config(folder)
    except ValueError as error:
        raise CliError(f"--model: {error}") from error


def _load(
    args: argparse.Namespace, task: str | None, heads: dict[str, Any]
) -> tuple[Any, str | None]:
    """The model, and the folder of the weights that its 4-bit layers were quantised from.

    Args:
        task: of the adapter.
        heads: the tensors that the adapter has trained as a whole.
    """
    import torch

    from ..integrations.bitsandbytes import disable_cpu_repacking
    from ..integrations.transformers.loading import load_model, model_class

    stored = _is_stored_in_4bit(args.model)
    options: dict[str, Any] = {"dtype": args.dtype or "auto"}
    originals = args.base
    quant = args.quant or ("nf4" if args.into == "4bit" and not stored else None)
    if quant is not None:
        if stored:
            raise CliError(f"--quant: {args.model} is stored quantised already")
        from ..integrations.transformers import four_bit

        dtype = args.dtype or _stored_dtype(args.model)
        options["quantization_config"] = four_bit(quant, args.double_quant, dtype)
        if args.into == "4bit":
            originals = originals or args.model
    elif args.base and not stored:
        raise CliError("--base: --model is dense, and has these weights itself")
    if quant is not None or stored or torch.cuda.is_available():
        options["device_map"] = {"": "cuda" if torch.cuda.is_available() else "cpu"}
    if (labels := _labels(heads)) is not None and task in ("SEQ_CLS", "TOKEN_CLS"):
        options["num_labels"] = labels
    try:
        model = load_model(args.model, model_class(args.model, task), heads, **options)
    except ValueError as error:
        raise CliError(f"--model: {error}") from error
    disable_cpu_repacking(model)
    return model, originals


def _labels(heads: dict[str, Any]) -> int | None:
    """How many labels the head of an adapter's classifier has."""
    for name in ("score.weight", "classifier.weight", "classifier.out_proj.weight"):
        if name in heads:
            return int(heads[name].shape[0])
    return None


def _stored_dtype(folder: str) -> Any:
    import torch

    config = _config(folder)
    return getattr(config, "dtype", None) or getattr(config, "torch_dtype", None) or torch.bfloat16


def _tokenizer(folder: str) -> Any:
    from ..integrations.transformers import load_tokenizer

    try:
        return load_tokenizer(folder)
    except FileNotFoundError:
        return None


def _moments(args: argparse.Namespace, model: Any, tokenizer: Any) -> Any:
    from ..integrations.peft.merge.moments import InputMoments
    from .finetune.data import batches, collator_for, load_data

    if tokenizer is None:
        raise CliError(f"--calibrate: {args.model} has no tokenizer")
    data = load_data([args.calibrate], tokenizer, _LENGTH, 0.0)
    collator, examples = collator_for(model, tokenizer, data), data.train[: args.examples]
    kept = ("input_ids", "attention_mask")
    return InputMoments(
        model,
        [
            {name: batch[name].to(model.device) for name in kept}
            for batch in batches(examples, collator, _EXAMPLES_AT_ONCE)
        ],
    )


def _write(model: Any, tokenizer: Any, out: Path) -> None:
    """Writes to a temporary folder, which is renamed when it is complete."""
    from ..integrations.transformers import make_savable

    make_savable(model)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        # Only the owner can read mkdtemp's folder.
        partial.chmod(0o755)
        model.save_pretrained(partial, safe_serialization=True)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        if out.exists():
            raise CliError(f"--out: {out} was created in the meantime; nothing is overwritten")
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
