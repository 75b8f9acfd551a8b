"""`python -m benchmarks.report.plot results.csv [folder]`: the plots of a file of results."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastlora.cli.bench import rows
from fastlora.cli.bench.plot import write_plots


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report.plot", description=__doc__)
    parser.add_argument("csv", type=Path)
    parser.add_argument("folder", type=Path, nargs="?", help="default: beside the file")
    args = parser.parse_args()
    for path in write_plots(rows.read(args.csv), args.folder or args.csv.with_suffix("")):
        print(path)


if __name__ == "__main__":
    main()
