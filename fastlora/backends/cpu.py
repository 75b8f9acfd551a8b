"""This machine's processor, and the tile sizes that `fastlora tune` found to be fastest on it."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import tuning

_OP = "tile_sizes"


def cpuinfo() -> dict[str, str]:
    """The first processor of /proc/cpuinfo, by the kernel's names; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}


def device(isa: str) -> str:
    """What measured tile sizes hold for: the processor, the instruction set and fastlora."""
    return tuning.device_key(cpuinfo().get("model name", platform.machine()), isa)


def use_tuned(library: Any) -> None:
    """Gives the kernels of `library`, fastlora._C, the sizes that were measured, if there are any.

    Sizes that the kernels refuse are left alone, with a warning that names the file.
    """
    key = device(library.build_info()["cpu_isa"])
    sizes = tuning.lookup(key, _OP, "all")
    if sizes is None:
        return
    try:
        library.set_tile_sizes(**sizes)
    except (TypeError, ValueError) as error:
        warnings.warn(f"tile sizes in {tuning.cache_file(key)} are not used: {error}", stacklevel=2)


def keep(isa: str, sizes: Mapping[str, int]) -> Path:
    """Stores sizes for later processes on this processor; returns the file."""
    return tuning.store(device(isa), _OP, "all", sizes)
