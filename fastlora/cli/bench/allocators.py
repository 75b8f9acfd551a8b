"""The memory allocators that a worker can run under."""

from __future__ import annotations

import os
import sys
from ctypes.util import find_library
from pathlib import Path

from ..errors import CliError

ALLOCATORS = ("glibc", "tcmalloc")
_TCMALLOC = "libtcmalloc_minimal.so.4"
_FOLDERS = (
    *("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib"),
    *("/usr/local/lib", str(Path(sys.prefix) / "lib")),
)
_OTHERS = ("tcmalloc", "jemalloc", "mimalloc")


def current() -> str:
    """The allocator of this process, by its LD_PRELOAD."""
    return "tcmalloc" if "tcmalloc" in os.environ.get("LD_PRELOAD", "") else "glibc"


def tcmalloc() -> str | None:
    """The path of tcmalloc, or None."""
    for folder in _FOLDERS:
        if (Path(folder) / _TCMALLOC).is_file():
            return str(Path(folder) / _TCMALLOC)
    # A name alone is enough for the dynamic linker.
    return find_library("tcmalloc_minimal")


def environment(allocator: str) -> dict[str, str]:
    """The environment of a process under `allocator`.

    Raises:
        CliError: tcmalloc is not found.
    """
    env = os.environ.copy()
    words = env.pop("LD_PRELOAD", "").replace(":", " ").split()
    preload = [word for word in words if not any(name in word for name in _OTHERS)]
    if allocator == "tcmalloc":
        path = tcmalloc()
        if path is None:
            raise CliError(
                f"--allocators: {_TCMALLOC} is not found; Debian and Ubuntu have it in the package "
                "libtcmalloc-minimal4"
            )
        preload.insert(0, path)
    if preload:
        env["LD_PRELOAD"] = ":".join(preload)
    return env
