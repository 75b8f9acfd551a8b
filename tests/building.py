"""What the tests build with CMake, one at a time."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BUILD = Path(__file__).resolve().parents[1] / "build"


@contextmanager
def build_lock() -> Iterator[None]:
    """Held while CMake runs in build/ or a folder in it: Ninja can't share a folder, and the tests
    run in several processes."""
    BUILD.mkdir(exist_ok=True)
    with (BUILD / "tests.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
        yield
