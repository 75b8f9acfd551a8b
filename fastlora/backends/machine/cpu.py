"""This machine's processor, and the tile sizes that `fastlora tune` found to be fastest on it."""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ... import tuning

_OP = "tile_sizes"


def cpuinfo() -> dict[str, str]:
    """The first processor of /proc/cpuinfo, by the kernel's names; empty if there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}


def caches() -> dict[int, str]:
    """Sizes of the first processor's data caches by level, as "512K"; empty if they're hidden."""
    found = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            kind, level, size = (
                (folder / name).read_text().strip() for name in ("type", "level", "size")
            )
        except OSError:
            continue
        if kind != "Instruction":
            found[int(level)] = size
    return found


def device(isa: str) -> str:
    """The key of measured tile sizes: processor, caches, instruction set and fastlora.

    Virtual machines hide the processor's model, and give one model different caches.
    """
    model = cpuinfo().get("model name", platform.machine())
    sizes = " ".join(f"L{level} {size}" for level, size in caches().items())
    return tuning.device_key(model, sizes, f"{os.cpu_count()} processors", isa)


def tuned(isa: str) -> tuning.Choice | None:
    """The tile sizes kept for this processor, or None."""
    return tuning.lookup(device(isa), _OP, "all")


def use_tuned(library: Any) -> None:
    """Gives the kernels of `library`, fastlora._C, the sizes that were measured, if there are any.

    Sizes that the kernels refuse are left alone, with a warning that names the file.
    """
    isa = library.build_info()["cpu_isa"]
    sizes = tuned(isa)
    if sizes is None:
        return
    try:
        library.set_tile_sizes(**sizes)
    except (TypeError, ValueError, OverflowError) as error:
        file = tuning.cache_file(device(isa))
        warnings.warn(f"tile sizes in {file} are not used: {error}", stacklevel=2)


def keep(isa: str, sizes: Mapping[str, int]) -> Path:
    """Stores sizes for later processes on this processor; returns the file."""
    return tuning.store(device(isa), _OP, "all", sizes)
