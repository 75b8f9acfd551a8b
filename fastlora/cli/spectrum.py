"""`fastlora spectrum`: ranks the layers of a model as targets for adapters."""

from __future__ import annotations

import argparse
import json
from typing import Any

from rich.console import Console

from .console import layer_bar, quiet_libraries, wide_console
from .errors import CliError


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """The command's arguments."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "spectrum",
        help="rank a model's layers by signal-to-noise, as targets for adapters",
        description=(
            "Ranks the linear layers of a model by the signal-to-noise ratio of their singular "
            "values (Spectrum, arXiv:2406.06623), each kind of layer separately, and prints the "
            "top share of each kind as target_modules for PEFT. Reads one weight at a time."
        ),
    )
    parser.add_argument("--model", metavar="FOLDER", required=True, help="model folder")
    parser.add_argument(
        "--share", type=float, metavar="P", default=0.25, help="share of each kind to choose (0.25)"
    )
    parser.add_argument("--json", action="store_true", help="print every layer and figure as JSON")
    return parser


def run(args: argparse.Namespace) -> int:
    """Ranks and prints."""
    quiet_libraries()
    from ..integrations.spectrum import peft_target, spectrum

    console = Console(stderr=True) if args.json else wide_console()
    try:
        with layer_bar(console, "reading") as progress:
            ranking = spectrum(args.model, args.share, progress=progress)
    except ValueError as error:
        flag = "--share" if str(error).startswith("share") else "--model"
        raise CliError(f"{flag}: {error}") from error
    if args.json:
        print(json.dumps(ranking.as_dict(), indent=2))
        return 0
    console.print(ranking)
    target = peft_target(args.model, ranking)
    if target is None:
        text = (
            "PEFT adapts other layers of this model, whether by names or by an expression: it takes"
            " their last names for those of experts. The chosen layers are\n"
            f"{json.dumps(ranking.target_modules)}"
        )
    elif isinstance(target, str):
        text = f"target_modules for PEFT, as one regular expression:\n{target}"
    else:
        text = f"target_modules for PEFT:\n{json.dumps(target)}"
    console.print(f"\n{text}", highlight=False, soft_wrap=True)
    return 0
