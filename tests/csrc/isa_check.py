"""Proves that code compiled for one instruction set can't run on a processor without it.

    python isa_check.py [--nm NM] OBJECT...     CMake's paths, which hold fastlora_cpu_<isa>.dir

There are two ways of escape. Both raise SIGILL on an older processor and go unseen on a new one:
- A weak symbol (inline function, template instance) outside `fastlora::<isa>`. The linker keeps
  one of all objects' copies, perhaps the AVX-512 one, and the scalar kernels then call that.
- A constructor that runs when the library is loaded, before any choice by cpuid.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys

# nm's letters for what the linker merges with a namesake: weak function or object, unique global.
WEAK = "WVu"


def escapes(symbols: str, isa: str) -> list[str]:
    """Names in the output of `nm -C --defined-only` that could escape from the objects of `isa`."""
    found = []
    for line in symbols.splitlines():
        match = re.match(r"[0-9a-f]* *(\w) (.+)", line)
        if match is None:
            continue
        letter, name = match.groups()
        # DW.ref.* is data, the same in every object: where exceptions find their handler.
        merged = (
            letter in WEAK and f"fastlora::{isa}::" not in name and not name.startswith("DW.ref.")
        )
        if merged or name.startswith(
            ("_GLOBAL__sub_I_", "__static_initialization_and_destruction")
        ):
            found.append(name)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nm", default="nm")
    parser.add_argument("objects", nargs="+")
    args = parser.parse_args()
    bad = checked = 0
    for path in args.objects:
        match = re.search(r"fastlora_cpu_(\w+)\.dir", path)
        if match is None:
            sys.exit(f"{path}: the path names no instruction set (fastlora_cpu_<isa>.dir)")
        if match[1] == "scalar":
            continue  # runs everywhere, so it may be merged with anything
        command = [args.nm, "-C", "--defined-only", path]
        symbols = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        for name in escapes(symbols, match[1]):
            print(f"{path}: {name} may run on a processor without {match[1]}")
            bad += 1
        checked += 1
    print(f"isa-check: {checked} objects, {bad} symbols that escape")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
