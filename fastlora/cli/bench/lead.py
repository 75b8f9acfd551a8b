"""Starts workers, one for each allocator, and collects their rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from ctypes.util import find_library
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from ..errors import CliError
from .case import Case
from .rows import Row, case_row
from .worker import Request

ALLOCATORS = ("glibc", "tcmalloc")
_TCMALLOC = "libtcmalloc_minimal.so.4"
_FOLDERS = (
    *("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib"),
    *("/usr/local/lib", str(Path(sys.prefix) / "lib")),
)
_OTHERS = ("tcmalloc", "jemalloc", "mimalloc")


@dataclass
class Results:
    """What the workers sent: rows, and who was refused in which row and why."""

    rows: list[Row] = field(default_factory=list)
    refused: list[tuple[Row, str]] = field(default_factory=list)
    wrong: list[tuple[Row, str]] = field(default_factory=list)


def tcmalloc() -> str | None:
    """Where tcmalloc lies, or None."""
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


def measure(request: Request, emit: Callable[[str, dict[str, Any]], None], into: Results) -> None:
    """Runs `request` in a worker; its rows go to `into` as they come.

    Args:
        request: what to measure, under which allocator.
        emit: told of every event, with its fields.
        into: the results of this and of earlier workers.

    Raises:
        RuntimeError: the worker failed; rows that it had sent by then are kept.
    """
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "fastlora.cli.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment(request.allocator),
        )
        assert process.stdin is not None and process.stdout is not None
        failure = ""
        try:
            process.stdin.write(request.as_json() + "\n")
            process.stdin.close()
            for line in process.stdout:
                event = json.loads(line)
                name = event.pop("event")
                if name == "row":
                    into.rows.append(event["row"])
                elif name == "refused":
                    (into.wrong if event["wrong"] else into.refused).append(
                        (event["row"], event["reason"])
                    )
                elif name == "error":
                    failure = event["text"]
                emit(name, event)
            status = process.wait()
        finally:
            process.kill()
            process.wait()
        if status:
            raise RuntimeError(f"the measuring process failed: {failure or _last(log, status)}")


def add_memory(
    case: Case, request: Request, rows: list[Row], emit: Callable[[str, dict[str, Any]], None]
) -> None:
    """Measures the memory of `case` with every provider that has a row, in processes of their own.

    Args:
        case: in "step" or "inference" mode.
        request: the one that the rows come from.
        rows: get `peak_mb` and `saved_bytes`.
        emit: told of every process that starts.

    Raises:
        RuntimeError: a process failed.
    """
    for row in rows:
        if row != {**row, **case_row(case, row["provider"], row["adapter_dtype"])}:
            continue
        emit("case", {"text": f"memory of {row['provider']}: {case}"})
        task = {"case": case.as_dict(), "provider": row["provider"], "threads": request.threads}
        with tempfile.TemporaryFile("w+") as log:
            done = subprocess.run(
                [sys.executable, "-m", "fastlora.cli.bench.memory"],
                input=json.dumps(task) + "\n",
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment(request.allocator),
                check=False,
            )
            if done.returncode:
                reason = _last(log, done.returncode)
                raise RuntimeError(f"measuring the memory of {row['provider']} failed: {reason}")
        memory = json.loads(done.stdout)
        row["peak_mb"] = f"{memory['peak_mb']:.4g}"
        row["saved_bytes"] = f"{memory['saved_bytes']:.4g}"


def _last(log: IO[str], status: int) -> str:
    """The last line of what a process wrote to its stderr."""
    log.seek(0)
    lines = log.read().strip().splitlines()
    return lines[-1] if lines else f"it ended with status {status}"
