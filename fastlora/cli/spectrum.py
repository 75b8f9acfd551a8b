"""`fastlora spectrum`: ranks the layers of a model as targets for adapters."""

from __future__ import annotations

import argparse
import json
from typing import Any

from rich.console import Console

from .console import layer_bar, quiet_libraries
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
    from ..integrations.spectrum import spectrum

    console = Console(stderr=args.json)
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
    console.print(
        f"\ntarget_modules for PEFT, as one regular expression:\n{ranking.regex}",
        highlight=False,
        soft_wrap=True,
    )
    return 0
