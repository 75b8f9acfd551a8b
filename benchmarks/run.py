"""`python -m benchmarks.run`: measures and appends to benchmarks/results/<device>.csv."""

from __future__ import annotations

import argparse
import sys

from fastlora.cli import bench


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    commands = parser.add_subparsers(required=True)
    bench.add_parser(commands)
    args = parser.parse_args(["bench", *sys.argv[1:]])
    return bench.run(args)


if __name__ == "__main__":
    sys.exit(main())
