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
    except CliError as error:
        if args.debug:
            raise
        print(f"fastlora {args.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if args.debug:
            raise
        print(f"fastlora {args.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # `fastlora info | head`: nobody reads the rest. The interpreter must not complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if args.debug or missing not in _PEERS:
            raise
        print(
            f"fastlora {args.command}: error: missing: {missing}; in fastlora's source folder, "
            "`pip install '.[finetune]'` installs it",
            file=sys.stderr,
        )
        return 2
    except Exception as error:
        if args.debug:
            raise
        print(
            f"fastlora {args.command}: {type(error).__name__}: {_first_line(error)} "
            "(--debug shows where)",
            file=sys.stderr,
        )
        return 1


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


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else "no message"
