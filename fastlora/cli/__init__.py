"""The command line: `fastlora info | verify | bench | tune | finetune | merge | ...`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from ..version import __version__
from . import info, merge, spectrum, verify
from .bench import command as bench
from .errors import CliError
from .finetune import command as finetune
from .finetune import demo
from .tune import gpu as tune

# Packages that fastlora runs without, but some commands don't.
_PEERS = ("accelerate", "bitsandbytes", "datasets", "gguf", "matplotlib", "peft", "transformers")
_COMMANDS = (info, verify, bench, tune, spectrum, finetune, merge, demo)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status.

    0: done, or every check passed. 1: a check failed, or an unexpected error. 2: a wrong argument.
    3: a training diverged. 130: interrupted.
    """
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args))
    except BrokenPipeError:
        # `fastlora info | head`: nobody reads the rest. The interpreter must not complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Exception, KeyboardInterrupt) as error:
        if args.debug:
            raise
        status, text = _explained(error)
        print(f"fastlora {args.command}: {text}", file=sys.stderr)
        return status


class _Parser(argparse.ArgumentParser):
    """Reports an error in one line, without a page of usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fastlora", description="Fused LoRA and QLoRA linear layers for PyTorch.")
    parser.add_argument("--version", action="version", version=f"fastlora {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for command in _COMMANDS:
        sub = command.add_parser(commands)
        sub.add_argument(
            "--debug",
            action="store_true",
            default=False,
            help="show the whole traceback when something fails",
        )
        sub.set_defaults(run=command.run)
    return parser


def _explained(error: BaseException) -> tuple[int, str]:
    """The exit status of an error, and what is said of it."""
    if isinstance(error, CliError):
        return 2, f"error: {error}"
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, ModuleNotFoundError):
        missing = (error.name or "").partition(".")[0]
        if missing in _PEERS:
            cure = "in fastlora's source folder, `pip install '.[finetune]'` installs it"
            return 2, f"error: missing: {missing}; {cure}"
    first_line = (str(error).strip() or "no message").splitlines()[0]
    return 1, f"{type(error).__name__}: {first_line} (--debug shows where)"
